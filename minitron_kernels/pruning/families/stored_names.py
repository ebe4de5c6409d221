"""StoredNames: what tensors are called in checkpoints of a family that have other names than its models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class StoredNames:
    """Names of tensors in a family's checkpoints.

    Args:
        renamed: (part of a name in the model, the same part in a checkpoint), in order. A part that begins
            with "." may be anywhere in a name; any other is its beginning. transformers renames likewise when
            it loads and saves (conversion_mapping.py); other programs know only the checkpoint's names.
            Checkpoints with the model's names are accepted too.
        computed: names inside a layer of buffers that old checkpoints hold, and that transformers computes.

    Example:
        >>> names = StoredNames(renamed=(("model.layers.", "transformer.h."), (".self_attn.", ".attn.")))
        >>> names.in_model("transformer.h.0.attn.q_proj.weight")
        'model.layers.0.self_attn.q_proj.weight'
        >>> names.in_checkpoint("model.layers.0.self_attn.q_proj.weight")
        'transformer.h.0.attn.q_proj.weight'
    """

    renamed: tuple[tuple[str, str], ...] = ()
    computed: tuple[str, ...] = ()

    def in_model(self, name: str) -> str:
        """The name in the model of a tensor in a checkpoint."""
        return _replaced(name, ((there, own) for own, there in self.renamed))

    def in_checkpoint(self, name: str) -> str:
        """The name in a checkpoint of a tensor of the model."""
        return _replaced(name, self.renamed)

    def used_by(self, names: Iterable[str], embedding: str) -> bool:
        """Whether these are names in a checkpoint: the embedding has another than in the model."""
        called = f"{self.in_checkpoint(f'{embedding}.')}weight"
        return called != f"{embedding}.weight" and called in set(names)


def _replaced(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        if old.startswith(".") and old in name:
            name = name.replace(old, new, 1)
        elif name.startswith(old):
            name = new + name[len(old) :]
    return name
