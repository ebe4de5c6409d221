"""The sum over rows behind reduction="mean" and "sum"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def sum_rows(rows: Tensor) -> Tensor:
    """Σ rows, [N] -> 0-dim of the same dtype. On the CPU in float64, one row after the other.

    torch.sum() adds in an order that depends on the number of rows and of threads. In this order a row of 0,
    as masked ones are, changes no bit: the sum is what it would be if the row were not there.
    """
    if rows.device.type != "cpu":
        return rows.sum()
    if rows.requires_grad and _is_plain_backward():
        return _Sum.apply(rows)
    return _sum(rows)


def _is_plain_backward() -> bool:
    """Neither a transform nor a tracer takes the derivative."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


class _Sum(torch.autograd.Function):
    """_sum() with the derivative of a sum, where that of cumsum() is seven operations."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.shape = rows.shape
        return _sum(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.expand(ctx.shape)


def _sum(rows: Tensor) -> Tensor:
    # the dtype as an argument: a .to() that has nothing to do returns its own input, and under torch.compile
    # torch 2.11 gives an autograd.Function no gradient where its output is an intermediate result too
    return rows.cumsum(0, dtype=torch.float64)[-1:].sum(dtype=rows.dtype)
