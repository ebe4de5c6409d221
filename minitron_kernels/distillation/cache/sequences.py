"""The sequences of a batch: the slots of each, and the digest by which a cache finds it.

A sequence is what attends to itself alone: the valid tokens of a row, or in a packed row a run of tokens
whose position_ids rise by one from 0. Padding is no part of it, on either side, so that another batch size,
order, padding or packing finds the same rows. A prefix of a cached sequence is another sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

_INTEGERS = (torch.int64, torch.int32)
_BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
# entries that say nothing about which tokens are seen
_NOT_LOOKED_AT = (
    "labels",
    "max_length_q",
    "max_length_k",
    "use_cache",
    "return_dict",
    "logits_to_keep",
    "num_items_in_batch",
    "return_loss",
)


class Sequence(NamedTuple):
    """One sequence of a batch: its tokens stand in the slots [begin, end) of a row."""

    row: int
    begin: int
    end: int
    tokens: Tensor  # [end - begin] int64, on the CPU


def digest(tokens: Tensor) -> bytes:
    """The key of a sequence: SHA-256 of its token ids [T], each as 8 little-endian bytes."""
    return hashlib.sha256(tokens.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes()).digest()


def described(tokens: Tensor) -> str:
    """A sequence as error messages name it."""
    some = ", ".join(map(str, tokens[:8].tolist()))
    dots = ", ..." if len(tokens) > 8 else ""
    return f"the sequence of {len(tokens)} tokens [{some}{dots}] (SHA-256 {digest(tokens).hex()[:16]})"


def sequences_of(batch: Mapping[str, Any]) -> list[Sequence]:
    """The sequences of a batch, row by row.

    Args:
        batch: `input_ids` [B, T] or [T], and where there are, `attention_mask` [B, T] of 0 and 1 with the
            valid tokens of a row side by side, or `position_ids` [B, T] or [1, T]. Positions that begin
            anew at 0 divide a row into packed sequences; cu_seq_lens_q, cu_seq_lens_k and seq_idx may say
            the same again. `labels` and what has no part in the forward pass are not looked at.

    Raises:
        TypeError, ValueError: an entry that this does not know, or that the tokens alone do not answer for
            (images, embeddings, token types); a mask with holes; packed sequences beside a mask, which
            transformers then lets attend to each other; entries that contradict each other.
    """
    known = ("input_ids", "attention_mask", "position_ids", *_BORDERS, *_NOT_LOOKED_AT)
    if unknown := [key for key, value in batch.items() if key not in known and value is not None]:
        raise ValueError(
            f"batch has {unknown[0]!r}: a cache knows a sequence by its token ids alone, and cannot tell "
            f"what this entry changes. Leave it out, or run the teacher itself. Known are {', '.join(known)}"
        )
    if "input_ids" not in batch:
        raise ValueError(f"batch must have input_ids [B, T], got {', '.join(batch) or 'nothing'}")
    ids = _integers(batch["input_ids"], "input_ids")
    if ids.dim() not in (1, 2):
        raise ValueError(f"input_ids must be [B, T] or [T], got {tuple(ids.shape)}")
    ids = ids.reshape(-1, ids.shape[-1]) if ids.numel() else ids.reshape(0, 0)
    valid = _valid(batch.get("attention_mask"), ids)
    begins = _begins(batch, ids, valid)
    found = []
    for row in range(ids.shape[0]):
        edges = begins[row].nonzero().flatten().tolist()
        slots = valid[row].nonzero().flatten()
        if len(slots) == 0:
            continue
        last = int(slots[-1]) + 1
        if last - int(slots[0]) != len(slots):
            raise ValueError(
                f"attention_mask has a hole in row {row}: its valid tokens must be side by side, padding "
                "before or behind them"
            )
        for begin, end in zip(edges, [*edges[1:], last], strict=True):
            found.append(Sequence(row, begin, end, ids[row, begin:end]))
    return found


def _integers(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be int64 or int32, got {value.dtype}")
    return value.detach().to("cpu", torch.int64)


def _valid(mask: Any, ids: Tensor) -> Tensor:
    """[B, T] bool, true at valid tokens."""
    if mask is None:
        return torch.ones(ids.shape, dtype=torch.bool, device="cpu")
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor, got {type(mask).__name__}")
    mask = mask.detach().cpu()
    if mask.dim() == 1:
        mask = mask[None]
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask must be {tuple(ids.shape)} as input_ids, got {tuple(mask.shape)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            "attention_mask must be 0 or 1: give packed sequences by position_ids that begin anew, without it"
        )
    return mask.bool()


def _begins(batch: Mapping[str, Any], ids: Tensor, valid: Tensor) -> Tensor:
    """[B, T] bool, true at the first token of each sequence."""
    begins = valid.clone()
    begins[:, 1:] &= ~valid[:, :-1]
    positions = batch.get("position_ids")
    borders = [key for key in _BORDERS if batch.get(key) is not None]
    if positions is None:
        if borders:
            raise ValueError(
                f"batch has {borders[0]} without position_ids: most attention ignores it, and the sequences "
                "then see each other. Give position_ids that begin at 0 with each sequence too"
            )
        return begins
    positions = _integers(positions, "position_ids")
    if positions.dim() == 1:
        positions = positions[None]
    if positions.dim() != 2 or positions.shape[1] != ids.shape[1] or positions.shape[0] not in (1, len(ids)):
        raise ValueError(f"position_ids must be {tuple(ids.shape)} or [1, T], got {tuple(positions.shape)}")
    positions = positions.expand(ids.shape)
    anew = begins.clone()
    anew[:, 1:] |= valid[:, 1:] & (positions.diff(dim=1) != 1)
    slots = torch.arange(ids.shape[1], device="cpu").expand(ids.shape)
    # counted from the row's first slot, padding included, they are what a model takes by default
    starts_well = (positions == 0) | (begins & (positions == slots))
    if bool((anew & ~starts_well).any()):
        row, slot = (anew & ~starts_well).nonzero()[0].tolist()
        raise ValueError(
            f"position_ids must rise by one from 0 in each sequence; a sequence begins at slot {slot} of row "
            f"{row} with position {int(positions[row, slot])}"
        )
    if batch.get("attention_mask") is not None and bool((anew & ~begins).any()):
        raise ValueError(
            "batch has attention_mask and position_ids that begin anew: beside a mask transformers ignores "
            "the positions, and packed sequences see each other. Leave attention_mask out"
        )
    for key in borders:
        _check_borders(batch[key], key, anew)
    return anew


def _check_borders(value: Any, key: str, anew: Tensor) -> None:
    value = _integers(value, key)
    if key == "seq_idx":
        value = value.reshape(-1, anew.shape[1]) if value.numel() else value
        if value.shape[0] not in (1, len(anew)):
            raise ValueError(f"seq_idx must be {tuple(anew.shape)} as input_ids, got {tuple(value.shape)}")
        given = torch.ones(anew.shape, dtype=torch.bool, device="cpu")
        given[:, 1:] = (value.diff(dim=1) != 0).expand(len(anew), -1)
    else:
        given = torch.zeros(anew.numel() + 1, dtype=torch.bool, device="cpu")
        if value.dim() != 1 or bool(((value < 0) | (value > anew.numel())).any()):
            raise ValueError(f"{key} must be borders in the batch's {anew.numel()} tokens, got {value}")
        given[value] = True
        if not bool(given[-1]):
            raise ValueError(f"{key} must end at the batch's {anew.numel()} tokens, got {value.tolist()}")
        given = given[:-1].reshape(anew.shape)
    if not torch.equal(given, anew):
        raise ValueError(f"{key} and position_ids must give the same sequences")
