"""Which positions of a batch have a next token to predict, and what it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minitron_kernels.ops.kl_loss.labels import counted, shift_labels

# of packed sequences: [n + 1] token offsets at which they begin, the last one their end
_OFFSETS = ("cu_seq_lens_q", "cu_seqlens", "cu_seqlens_q", "cu_seq_lens")


def predicts_next(batch: Mapping[str, Any]) -> Tensor | None:
    """[B, T] bool: the positions whose next token is a real one of the same sequence; None: not known.

        position t counts  ⇔  t + 1 < T, tokens t and t + 1 are real, and both are of one sequence

    Real is what `attention_mask` [B, T] is not 0 at (where it numbers sequences, of one sequence is what has
    the same number). Sequences packed into a row are told apart by `position_ids` [B, T] that do not rise,
    `seq_idx` [B, T] that changes, or `cu_seq_lens_q` [n + 1], all that are there.

    Args:
        batch: `input_ids` [B, T] or `inputs_embeds` [B, T, H] or `labels` [B, T], and the above.

    Returns:
        None, where a batch has an attention mask of another form (4 dimensions, or one for each kind of
        layer) and nothing else: it does not say which tokens are real.

    Raises:
        ValueError: shapes that do not fit.
    """
    shape, device = _shape(batch)
    same = torch.ones((shape[0], max(shape[1] - 1, 0)), dtype=torch.bool, device=device)
    mask = batch.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        return None
    if mask is not None:
        mask = _fitting("attention_mask", mask, shape, device)
        same &= (mask[:, 1:] == mask[:, :-1]) & (mask[:, 1:] != 0)
    positions = batch.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() <= 2:
        positions = _fitting("position_ids", positions, shape, device)
        same &= positions[:, 1:] > positions[:, :-1]
    if isinstance(batch.get("seq_idx"), Tensor):
        sequence = _fitting("seq_idx", batch["seq_idx"], shape, device)
        same &= sequence[:, 1:] == sequence[:, :-1]
    for name in _OFFSETS:
        if batch.get(name) is not None:
            same &= _within(name, batch[name], shape, device)
    last = torch.zeros((shape[0], min(shape[1], 1)), dtype=torch.bool, device=device)
    return torch.cat((same, last), 1)


def targets_of(batch: Mapping[str, Any], ignore_index: int = -100) -> tuple[Tensor | None, Tensor | None]:
    """(targets, mask) of a batch, as DistillationLoss takes them: labels [B, T] at their positions, mask [B,
    T].

    With `labels`, aligned with input_ids as Hugging Face has them, these say which positions count; they are
    shifted, and what predicts_next() denies is set to `ignore_index`: a position in the padding, and the last
    one of a packed sequence, whatever label stands there. Without labels the positions of predicts_next()
    count. `shift_labels` [B, T] in a batch are targets that someone has shifted already.

    Raises:
        ValueError: no labels, and an attention mask that does not say which tokens are real.
    """
    counts = predicts_next(batch)
    targets = batch.get("shift_labels")
    if targets is None and batch.get("labels") is not None:
        targets = shift_labels(batch["labels"], ignore_index)
    if targets is None:
        if counts is None:
            raise ValueError(
                "this batch has no labels, and its attention_mask is not [batch, tokens]: which of its "
                "tokens are padding is not known. Add labels, -100 at what does not count"
            )
        return None, counts
    if counts is not None:
        targets = targets.masked_fill(~counts, ignore_index)
    return targets, None


def count_targets(batch: Mapping[str, Any], ignore_index: int = -100) -> Tensor:
    """How many positions of a batch count, 0-dim int64: what num_items is the sum of over micro-batches."""
    targets, mask = targets_of(batch, ignore_index)
    valid = mask if targets is None else counted(targets, ignore_index)
    assert valid is not None
    return valid.sum()


def _shape(batch: Mapping[str, Any]) -> tuple[tuple[int, int], torch.device]:
    for name, dims in (("input_ids", 2), ("inputs_embeds", 3), ("labels", 2), ("shift_labels", 2)):
        x = batch.get(name)
        if x is not None:
            if not isinstance(x, Tensor) or x.dim() != dims:
                wanted = "[batch, tokens]" if dims == 2 else "[batch, tokens, hidden]"
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"{name} must be a tensor {wanted}, got {got}")
            return (x.shape[0], x.shape[1]), x.device
    raise ValueError(f"a batch needs input_ids, inputs_embeds or labels, got {sorted(batch)}")


def _fitting(name: str, x: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    """[B, T] of something that may have been given once for all rows."""
    if x.dim() == 1:
        x = x[None]
    if x.shape[-1] != shape[1] or x.shape[0] not in (1, shape[0]):
        raise ValueError(f"{name} must be [batch, tokens] = {shape}, got {tuple(x.shape)}")
    return x.to(device).expand(shape)


def _within(name: str, offsets: Any, shape: tuple[int, int], device: torch.device) -> Tensor:
    """[1, T - 1]: whether token t + 1 belongs to the sequence of token t, of one flattened row."""
    offsets = torch.as_tensor(offsets, device=device).flatten()
    if shape[0] != 1:
        raise ValueError(f"{name} tells apart the sequences of one row, got a batch of {shape[0]} rows")
    following = torch.arange(1, shape[1], device=device, dtype=offsets.dtype)
    return (~torch.isin(following, offsets) & (following < offsets[-1]))[None]
