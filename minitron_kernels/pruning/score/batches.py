"""Calibration batches: the arguments that a model is called with, and which tokens are valid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minitron_kernels.pruning.score.packing import WAYS, Layout, check_borders, lay_out, what

# the entries of a batch that are used; others (labels, texts) are not needed and ignored
INPUTS = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "seq_idx",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)
# entries that would change the forward pass, but are not supported: to ignore them would give wrong scores
_REFUSED = (
    "past_key_values",
    "cache",
    "pixel_values",
    "cu_seqlens",
    "cu_seq_lens",
    "segment_ids",
    "sequence_ids",
    "document_ids",
)
_FORMS = "a tensor of token ids or a mapping with input_ids (a dict, a tokenizer's BatchEncoding)"


class Tokens:
    """The tokens of a batch [B, S]: which are valid, and where sequences begin.

    Args:
        shape: (B, S).
        mask: [B, S] bool, true where a token is valid; None for all.
        cu_seqlens: int64 borders of packed sequences in the B·S tokens; None where each row is one sequence.
    """

    def __init__(self, shape: tuple[int, int], mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
        self.shape = shape
        self.packed = cu_seqlens is not None
        self.num_sequences = shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        if mask is not None and cu_seqlens is not None:
            mask = mask.reshape(-1)
        self._mask, self._cu_seqlens = mask, cu_seqlens
        self._on: dict[torch.device, tuple[Tensor | None, Tensor | None]] = {}

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """(mask, cu_seqlens) as accumulate_importance_() takes them, copied to each device once."""
        if device not in self._on:
            mask, borders = self._mask, self._cu_seqlens
            self._on[device] = (
                None if mask is None else mask.to(device),
                None if borders is None else borders.to(device),
            )
        return self._on[device]

    def arrange(self, x: Tensor) -> Tensor:
        """Activations [B, S, C] in the shape that cu_seqlens needs: [B·S, C] where sequences are packed."""
        return x.reshape(-1, x.shape[-1]) if self.packed else x

    def owners(self, device: torch.device) -> Tensor:
        """[B·S] int64, the sequence of each token."""
        _, borders = self.on(device)
        at = torch.arange(self.shape[0] * self.shape[1], device=device)
        if borders is None:
            return at // max(self.shape[1], 1)
        return torch.searchsorted(borders[1:], at, right=True)


def read_batch(
    batch: Any, name: str, device: torch.device | None, *, whole: bool, vocab: int, one_row: bool = False
) -> tuple[dict[str, Any], Tokens]:
    """The model's arguments and the tokens of a batch, both from one layout (packing.py): the sequences that
    are scored are those that the model attends to.

    Args:
        batch: see collect_importance().
        name: of the batch, for error messages.
        device: where the model wants its inputs; None to leave them where they are.
        whole: whether rows are whole sequences, so that their layout may be changed. False where
            context-parallel ranks hold pieces, which go to the model as they are.
        vocab: the size of the vocabulary; token ids must be below.
        one_row: join packed rows to a single one.

    Raises:
        TypeError, ValueError: the batch is not one that collect_importance() takes.
    """
    inputs = _inputs(batch, name)
    tokens = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
    _check_tokens(tokens, name, vocab)
    shape = tuple(tokens.shape[:2])
    mask, numbers = _mask(inputs, name, shape)
    if whole:
        layout = lay_out(inputs, mask, numbers, name, one_row=one_row)
    else:
        layout = _piece(inputs, mask, numbers, name)
    inputs = layout.inputs
    if device is not None:
        inputs = {
            key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()
        }
    return inputs, Tokens(layout.shape, layout.mask, layout.cu_seqlens)


def _piece(inputs: dict[str, Any], mask: Tensor | None, numbers: Tensor | None, name: str) -> Layout:
    """A context-parallel rank's batch, as it is: only the model knows how ranks attend to each other."""
    if numbers is not None or "seq_idx" in inputs:
        raise ValueError(
            f"{name}: context-parallel pieces of packed sequences must be given by cu_seq_lens_q, got "
            f"{'seq_idx' if numbers is None else 'sequence numbers in attention_mask'}"
        )
    shape = (inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]).shape
    borders = check_borders(inputs, name) if "cu_seq_lens_q" in inputs else None
    return Layout(inputs, (shape[0], shape[1]), mask, borders)


def _inputs(batch: Any, name: str) -> dict[str, Any]:
    """The entries of a batch that are used, each with a batch dimension."""
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise TypeError(f"{name} must be {_FORMS}, got {type(batch).__name__}")
    if refused := [key for key in _REFUSED if batch.get(key) is not None]:
        raise ValueError(f"{name}: {refused[0]} is not read: leave it out. {WAYS}")
    inputs = {key: batch[key] for key in INPUTS if key in batch and batch[key] is not None}
    if "input_ids" in inputs:
        ids = inputs["input_ids"]
        if (
            not isinstance(ids, Tensor)
            or ids.dtype not in (torch.int64, torch.int32)
            or ids.dim() not in (1, 2)
        ):
            raise TypeError(
                f"{name}: input_ids must be an integer tensor [B, S] or [S], got {what(ids)}; a tokenizer "
                'gives one with return_tensors="pt"'
            )
        if "inputs_embeds" in inputs:
            raise ValueError(f"{name} must have input_ids or inputs_embeds, got both")
        if ids.dim() == 1:
            inputs["input_ids"] = ids[None]
    elif "inputs_embeds" in inputs:
        x = inputs["inputs_embeds"]
        if not isinstance(x, Tensor) or x.dim() != 3:
            raise TypeError(f"{name}: inputs_embeds must be a tensor [B, S, hidden], got {what(x)}")
    else:
        raise ValueError(f"{name} must have input_ids, got the keys {', '.join(map(str, batch)) or 'none'}")
    for key in ("attention_mask", "position_ids", "token_type_ids", "seq_idx"):
        if isinstance(inputs.get(key), Tensor) and inputs[key].dim() == 1:
            inputs[key] = inputs[key][None]
    types = inputs.pop("token_type_ids", None)
    if types is not None and (not isinstance(types, Tensor) or bool(types.any())):
        raise ValueError(
            f"{name}: token_type_ids must be 0 everywhere, since causal language models have no token types; "
            f"got others in {what(types)}: leave them out. {WAYS}"
        )
    return inputs


def _check_tokens(tokens: Tensor, name: str, vocab: int) -> None:
    if tokens.numel() == 0:
        raise ValueError(f"{name} must have at least one token, got {what(tokens)}: leave it out")
    if tokens.is_floating_point():
        return
    low, high = (int(end) for end in tokens.aminmax())
    if low < 0 or high >= vocab:
        got = f"{low}; -100 belongs in labels only" if low < 0 else f"{high}: another model's tokenizer?"
        raise ValueError(f"{name}: input_ids must be in the model's vocabulary [0, {vocab}), got {got}")


def _mask(
    inputs: Mapping[str, Any], name: str, shape: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """(bool mask of valid tokens, None if all are; numbers of packed sequences, None if there are none)."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return None, None
    wanted = (
        f"{name}: attention_mask must be a tensor {list(shape)}, as input_ids, 1 where a token is valid and 0"
    )
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
        raise ValueError(f"{wanted} where it is padding; got {what(mask)}. {WAYS}")
    valid = mask != 0
    numbers = None
    if mask.dtype != torch.bool and bool(((mask != 1) & valid).any()):
        if mask.is_floating_point() or mask.is_complex() or bool((mask < 0).any()):
            low, high = mask.aminmax()
            raise ValueError(
                f"{wanted} where it is padding (additive masks are not supported); got values from "
                f"{low.item():g} to {high.item():g}"
            )
        numbers = mask
    return (None if bool(valid.all()) else valid), numbers
