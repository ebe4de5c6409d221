"""The sum over rows behind reduction="mean" and "sum"."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_rows(rows: Tensor) -> Tensor:
    """Σ rows, [N] -> 0-dim of the same dtype. On the CPU in float64, one row after the other.

    torch.sum() adds in an order that depends on the number of rows and of threads. In this order a row of 0,
    as masked ones are, changes no bit: the sum is what it would be if the row were not there.
    """
    if rows.device.type != "cpu":
        return rows.sum()
    # the dtype as an argument: a .to() that has nothing to do returns its own input, and under torch.compile
    # torch 2.11 gives an autograd.Function no gradient where its output is an intermediate result too
    return rows.cumsum(0, dtype=torch.float64)[-1:].sum(dtype=rows.dtype)
