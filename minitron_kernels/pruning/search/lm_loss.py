"""The loss of a language model on held-out text: the score by which Minitron ranks candidates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitron_kernels._modules import eval_mode
from minitron_kernels._tensors import bytes_of
from minitron_kernels.pruning.score.collect import BatchReader
from minitron_kernels.pruning.score.hooks import HookedModel

_CHUNK_ELEMENTS = 1 << 24  # logits that are converted to fp32 at a time: 64 MiB


class LMLoss:
    """A score function: the mean cross-entropy of the next token on held-out batches, in nats.

        loss(model) = 1/n Σ over pairs of -log softmax(logits of token i)[token i + 1]

    over the n pairs of neighbouring valid tokens of the same sequence: no token is predicted out of padding
    or out of another sequence. It is a mean over tokens, so that it does not depend on how text is divided
    into batches. The logits are the model's own, of one batch at a time; logarithms are taken in fp32 (in
    float64 for a model in float64), and summed in float64.

    Args:
        batches: as for collect_importance(): token ids [B, S], or mappings with input_ids, attention_mask,
            position_ids, ...; packed sequences as there. Kept in memory. Entries "labels" must equal
            input_ids at valid tokens, since every valid token counts.
        name: of this loss in results and progress files; default: "lm_loss", with the number of token ids and
            a hash of all that the batches hold.

    Raises:
        TypeError, ValueError: no batches; a batch is not as above, or has no pair of tokens. Calls raise them
            too, for a batch that the model cannot read, and a model without a head.

    Source: Minitron (arXiv 2407.14679) section 2.3 and 4; its sequel (arXiv 2408.11796) section 3.

    Example:
        >>> loss = LMLoss(held_out_batches)                             # doctest: +SKIP
        >>> loss(model)                                                 # doctest: +SKIP
        2.871
    """

    def __init__(self, batches: Iterable[Any], *, name: str | None = None) -> None:
        if isinstance(batches, Mapping | str | bytes) or not isinstance(batches, Iterable):
            raise TypeError(
                f"batches must be an iterable of batches, got {type(batches).__name__}; one batch goes in a "
                "list"
            )
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("batches must hold at least one batch, got none: a generator that is used up?")
        for number, batch in enumerate(self.batches):
            _check_labels(batch, f"batches[{number}]")
        self.name = _name(self.batches) if name is None else name

    def __call__(self, model: nn.Module) -> float:
        """The loss of a model, in nats per token. The model is put into eval mode meanwhile."""
        hooked = HookedModel(model)
        read = BatchReader(hooked, whole=True)
        total, count = 0.0, 0
        with torch.no_grad(), eval_mode(hooked.root):
            for number, batch in enumerate(self.batches):
                name = f"batches[{number}]"
                inputs, tokens = read(batch, name)
                if "input_ids" not in inputs:
                    raise ValueError(f"{name} must have input_ids, whose next ones are predicted")
                output = hooked.root(**inputs, use_cache=False)
                logits = getattr(output, "logits", None)
                if logits is None:
                    raise TypeError(
                        f"model must have a head that gives logits, got {type(hooked.root).__name__}"
                    )
                mask, _ = tokens.on(logits.device)
                owners = tokens.owners(logits.device)
                valid = torch.ones_like(owners, dtype=torch.bool) if mask is None else mask.flatten()
                follows = (owners[1:] == owners[:-1]) & valid[1:] & valid[:-1]
                at = follows.nonzero().flatten()
                labels = inputs["input_ids"].to(logits.device).long().flatten()[at + 1]
                total += _sum_of_losses(logits.flatten(0, 1), at, labels)
                count += len(at)
        if not count:
            raise ValueError("batches must hold a pair of neighbouring valid tokens, got none")
        return total / count


def _sum_of_losses(logits: Tensor, at: Tensor, labels: Tensor) -> float:
    """Σ cross-entropy of the rows `at` of logits [N, V], of a few rows at a time."""
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    wide = torch.promote_types(logits.dtype, torch.float32)
    for part, label in zip(at.split(rows), labels.split(rows), strict=True):
        total += F.cross_entropy(logits[part].to(wide), label, reduction="none").double().sum()
    return float(total)


def _check_labels(batch: Any, name: str) -> None:
    """Checks that labels say nothing else than input_ids: they are not read."""
    if not isinstance(batch, Mapping) or batch.get("labels") is None:
        return
    labels, ids, mask = (batch.get(key) for key in ("labels", "input_ids", "attention_mask"))
    if not isinstance(labels, Tensor) or not isinstance(ids, Tensor) or labels.shape != ids.shape:
        raise ValueError(f"{name}: labels must have the shape of input_ids, or be left out")
    differ = labels.to(ids.device) != ids
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        differ &= mask.to(ids.device) != 0
    if bool(differ.any()):
        raise ValueError(
            f"{name}: labels must equal input_ids at valid tokens, but differ at {int(differ.sum())}: every "
            "valid token counts here. Leave labels out, or give a score_func of your own that reads them"
        )


def _name(batches: list[Any]) -> str:
    """ "lm_loss of N tokens" and a hash of all tensors and other values of the batches."""
    whole, count = hashlib.sha256(), 0
    for batch in batches:
        entries = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        if not isinstance(entries, Mapping):
            raise TypeError(f"batches must be tensors or mappings, got {type(batch).__name__}")
        for key in sorted(map(str, entries)):
            value = entries[key]
            if isinstance(value, Tensor):
                whole.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
                for piece in bytes_of(value):
                    whole.update(piece)
                count += value.numel() if key == "input_ids" else 0
            else:
                whole.update(f"{key} {value!r}".encode())
    return f"lm_loss of {count:,} tokens, sha256 {whole.hexdigest()[:16]}"
