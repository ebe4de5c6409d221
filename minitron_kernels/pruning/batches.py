"""Calibration batches: what a model is called with, and which of its tokens count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# what is handed to the model; anything else in a batch (labels, texts) is not needed and left out
INPUTS = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)
_FORMS = "a tensor of token ids or a mapping with input_ids (a dict, a tokenizer's BatchEncoding)"


class Tokens:
    """The tokens of a batch [B, S]: which count, and where sequences begin.

    Args:
        shape: (B, S).
        mask: [B, S] bool, true where a token counts; None for all.
        cu_seqlens: int64 borders of packed sequences in the B·S tokens; None where each row is one.
    """

    def __init__(self, shape: tuple[int, int], mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
        self.shape = shape
        self.num_sequences = shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        if mask is not None and cu_seqlens is not None:
            mask = mask.reshape(-1)
        self._mask, self._cu_seqlens = mask, cu_seqlens
        self._on: dict[torch.device, tuple[Tensor | None, Tensor | None]] = {}

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """(mask, cu_seqlens) as accumulate_importance_() takes them: copied once to each device."""
        if device not in self._on:
            mask, borders = self._mask, self._cu_seqlens
            self._on[device] = (
                None if mask is None else mask.to(device),
                None if borders is None else borders.to(device),
            )
        return self._on[device]

    def arrange(self, x: Tensor) -> Tensor:
        """Activations [B, S, C] as they go with cu_seqlens: [B·S, C] where sequences are packed."""
        return x if self._cu_seqlens is None else x.reshape(-1, x.shape[-1])

    def owners(self, device: torch.device) -> Tensor:
        """[B·S] int64, the sequence of each token."""
        _, borders = self.on(device)
        at = torch.arange(self.shape[0] * self.shape[1], device=device)
        if borders is None:
            return at // max(self.shape[1], 1)
        return torch.searchsorted(borders[1:], at, right=True)


def read_batch(batch: Any, name: str, device: torch.device | None, *, whole: bool) -> tuple[dict, Tokens]:
    """A batch as the model's arguments and its tokens.

    Rows that are padded on the left get positions that begin with the first token that counts, as generate()
    does. Packed sequences are known by `cu_seq_lens_q`, or, as transformers does without an attention mask,
    by positions that do not rise by one.

    Args:
        batch: see collect_importance().
        name: of the batch, for errors.
        device: where the model wants its inputs; None to leave them where they are.
        whole: whether rows are whole sequences, so that positions can be told or made from them; not so where
            context-parallel ranks hold pieces.

    Raises:
        TypeError, ValueError: it is no such batch.
    """
    inputs = _inputs(batch, name)
    ids = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
    shape = tuple(ids.shape[:2])
    mask = _mask(inputs, name, shape)
    borders = None
    if "cu_seq_lens_q" in inputs:
        borders = inputs["cu_seq_lens_q"]
        if not isinstance(borders, Tensor) or borders.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: cu_seq_lens_q must be an int32 or int64 tensor, got {_what(borders)}")
        borders = borders.long()
    elif whole and "position_ids" in inputs and "attention_mask" not in inputs:
        borders = _packed(inputs["position_ids"], shape)
    if whole and mask is not None and "position_ids" not in inputs and borders is None:
        counted_before = mask.long().cumsum(1) - 1
        at = torch.arange(shape[1], device=mask.device)
        if bool(((counted_before != at) & mask).any()):
            inputs["position_ids"] = counted_before.clamp(min=0)
    if device is not None:
        inputs = {
            key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()
        }
    return inputs, Tokens((shape[0], shape[1]), mask, borders)


def _what(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _inputs(batch: Any, name: str) -> dict[str, Any]:
    """The model's arguments, ids as [B, S]."""
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise TypeError(f"{name} must be {_FORMS}, got {type(batch).__name__}")
    inputs = {key: batch[key] for key in INPUTS if key in batch and batch[key] is not None}
    if "input_ids" in inputs:
        ids = inputs["input_ids"]
        if (
            not isinstance(ids, Tensor)
            or ids.dtype not in (torch.int64, torch.int32)
            or ids.dim() not in (1, 2)
        ):
            raise TypeError(
                f"{name}: input_ids must be an integer tensor [B, S] or [S], got {_what(ids)}; a tokenizer "
                'gives one with return_tensors="pt"'
            )
        if ids.dim() == 1:
            inputs["input_ids"] = ids[None]
    elif "inputs_embeds" in inputs:
        x = inputs["inputs_embeds"]
        if not isinstance(x, Tensor) or x.dim() != 3:
            raise TypeError(f"{name}: inputs_embeds must be a tensor [B, S, hidden], got {_what(x)}")
    else:
        raise ValueError(f"{name} must have input_ids, got the keys {', '.join(map(str, batch)) or 'none'}")
    for key in ("attention_mask", "position_ids", "token_type_ids"):
        if isinstance(inputs.get(key), Tensor) and inputs[key].dim() == 1 and key in batch:
            inputs[key] = inputs[key][None]
    return inputs


def _mask(inputs: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Tensor | None:
    """Where a token counts; None where all do."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
        raise ValueError(
            f"{name}: attention_mask must be a tensor {list(shape)}, as input_ids, 0 where a token is "
            f"padding; got {_what(mask)}"
        )
    counted = mask != 0
    return None if bool(counted.all()) else counted


def _packed(positions: Any, shape: tuple[int, ...]) -> Tensor | None:
    """Borders of packed sequences by their positions; None where each row is one sequence."""
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return None
    positions = positions.expand(shape[0], -1)
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions.diff(dim=1) != 1
    if not bool(begins[:, 1:].any()):
        return None
    total = torch.tensor([positions.numel()], device=positions.device)
    return torch.cat([begins.reshape(-1).nonzero().flatten(), total])
