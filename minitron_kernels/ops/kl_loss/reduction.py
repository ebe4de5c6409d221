"""What the losses of tokens are divided by: reduction= and num_items=."""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_kernels.ops.kl_loss.checks import check_tensor, number, positive

REDUCTIONS = ("mean", "sum", "none")


def row_factor(
    reduction: str,
    num_items: float | Tensor | None,
    rows: int,
    mask: Tensor | None,
) -> tuple[float, Tensor | None]:
    """What the sum over rows is multiplied by: a number times a 0-dim tensor (or None).

    Where no token is valid the factor is finite, whatever num_items is, so that the loss is 0.
    """
    if reduction not in REDUCTIONS:
        hint = _BATCHMEAN if reduction == "batchmean" else ""
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}{hint}")
    if reduction != "mean":
        if num_items is not None:
            raise ValueError(f'num_items is what reduction="mean" divides by; got reduction={reduction!r}')
        return 1.0, None
    if num_items is None:
        if mask is None:
            return 1.0 / max(rows, 1), None  # to the bit what a mask gives
        return 1.0, mask.sum().clamp(min=1).to(torch.float64).reciprocal()
    if rows == 0:
        return 0.0, None
    if isinstance(num_items, Tensor):
        count = _items_tensor(num_items, mask)
        if isinstance(count, Tensor):
            return 1.0, count
        num_items = count
    num_items = number("num_items", num_items)
    if num_items == 0 and mask is not None:
        return 1.0, _reciprocal(torch.zeros((), dtype=torch.float64, device=mask.device), mask)
    return 1.0 / positive("num_items", num_items), None


_BATCHMEAN = (
    '. F.kl_div\'s "batchmean" divides by the size of the batch: for that pass num_items=batch_size; '
    'here "mean" divides by the valid tokens'
)


def _items_tensor(num_items: Tensor, mask: Tensor | None) -> Tensor | float:
    """1 / num_items as a tensor where its value cannot be looked at without waiting, else num_items."""
    check_tensor("num_items", num_items)
    if num_items.numel() != 1:
        raise ValueError(f"num_items must have one element, got shape {tuple(num_items.shape)}")
    if num_items.device.type == "cpu" and not torch.compiler.is_compiling():
        return num_items.item()
    if mask is not None and num_items.device.type != "cpu" and num_items.device != mask.device:
        raise ValueError(f"num_items is on {num_items.device}, but the student is on {mask.device}")
    return _reciprocal(num_items.reshape(()).to(torch.float64).clamp(min=0), mask)


def _reciprocal(count: Tensor, mask: Tensor | None) -> Tensor:
    """1 / count; 0 where no token is valid. Of 0 where some are: inf, or on the CPU at once an error."""
    if mask is None:
        return count.reciprocal()
    any_row = mask.any()
    known = count.device.type == mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if known and any_row:
        positive("num_items", float(count))
    return torch.where(any_row, count.to(mask.device).reciprocal(), 0.0)
