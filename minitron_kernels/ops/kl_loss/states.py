"""What shards of a vocabulary know of each token, merged in float64 torch: for the CPU, whose tiles merge so
in csrc/kl_loss/cpu/row_merger.h. GPUs merge by their kernels of finish_stats.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from minitron_kernels.ops.kl_loss.divergence import NUM_METRIC_STATE, NUM_STATE, Divergence


def empty_state(like: Tensor, fields: int, rows: int) -> Tensor:
    """Of no tokens, [fields, N]: max_s, sum_s, max_t, sum_t, kl, and behind them sums and a label's logit."""
    state = like.new_zeros((fields, rows))
    state[0:3:2] = -math.inf
    state[NUM_STATE + NUM_METRIC_STATE - 1 :] = -math.inf
    return state


def state_of(loss: Tensor, stats: Tensor) -> Tensor:
    """The state [5, N] of tokens whose loss and stats are known as if there were no others."""
    max_s, inv_sum_s, max_t, inv_sum_t = stats[:, :4].unbind(1)
    return torch.stack((max_s, 1 / inv_sum_s, max_t, 1 / inv_sum_t, loss))


class _Side(NamedTuple):
    """One model's part of the probability, by rank: mass = exp(below) * share."""

    top: Tensor  # [N], the largest of all maxima
    total: Tensor  # [N], sum exp(x - top)
    mass: Tensor  # [R, N], as what follows
    below: Tensor
    share: Tensor
    masked_out: Tensor

    @staticmethod
    def of(maxima: Tensor, sums: Tensor) -> _Side:
        top = maxima.amax(0)
        below = torch.where(maxima == top, 0.0, maxima - top)
        total = (sums * below.exp()).sum(0)
        share = sums / total
        # a NaN among the logits is in the sum
        masked_out = (maxima == -math.inf) & (sums == 0)
        return _Side(top, total, below.exp() * share, below, share, masked_out)


def merge_states(
    states: Tensor, mask: Tensor | None, divergence: Divergence, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """States [R, 5, N] -> loss [N] and stats [N, 6] of the whole vocabulary; 0 where mask is False.

    JSD's loss and kl come later; those here mean nothing.
    """
    max_s, sum_s, max_t, sum_t, kl = states.double().unbind(1)
    student, teacher = _Side.of(max_s, sum_s), _Side.of(max_t, sum_t)
    x, y = (student, teacher) if divergence is Divergence.REVERSE_KL else (teacher, student)
    # The chain rule of KL; a probability below the smallest normal number is 0, whatever the ratio is.
    ratio = (x.below - y.below) + (x.share / y.share).log()
    terms = torch.where(y.masked_out, x.mass * math.inf + y.mass, x.mass * (ratio + kl) + (y.mass - x.mass))
    loss = torch.where(x.mass < torch.finfo(dtype).tiny, y.mass, terms).sum(0)
    shift = _shift_between(student.top.to(dtype), teacher.top.to(dtype)).double()
    lse_diff = (student.top - teacher.top - shift) + (student.total.log() - teacher.total.log())
    needed = loss if divergence is Divergence.REVERSE_KL else torch.zeros_like(loss)
    columns = (student.top, 1 / student.total, teacher.top, 1 / teacher.total, lse_diff, needed)
    stats = torch.stack(columns, 1)
    if mask is not None:
        loss, stats = loss.masked_fill(~mask, 0.0), stats.masked_fill(~mask[:, None], 0.0)
    return loss.to(dtype), stats.to(dtype)


def _shift_between(max_s: Tensor, max_t: Tensor) -> Tensor:
    """What the CPU's kernels take off the logits without rounding: shift_between() of cpu/kernels.h."""
    rounds = 1.5 * 2.0 ** (52 if max_s.dtype == torch.float64 else 23)
    return ((max_s - max_t) + rounds) - rounds
