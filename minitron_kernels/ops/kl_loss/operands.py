"""The operands of a call: a model's side of it, what it has to do with labels; and rows cut into slices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

Side = tuple[Tensor, Tensor, Tensor | None]  # hidden states, head, bias


class TokenMetrics(NamedTuple):
    """What a call has to do with labels and metrics, at the least nothing."""

    labels: Tensor | None = None  # [N] int64, -1 where there is none
    metrics: Tensor | None = None  # [N, NUM_METRICS], written; with stats of an earlier call read
    ce_weight: Tensor | None = None  # [N] or 0-dim: the cross-entropy's factor in the loss


NO_METRICS = TokenMetrics()


def slices(begin: int, end: int, size: int) -> Iterator[slice]:
    """Of `size` each, but for the last."""
    return (slice(at, min(at + size, end)) for at in range(begin, end, size))
