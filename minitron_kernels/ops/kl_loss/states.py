"""What parts of a vocabulary know of each token, merged in torch.

Shards of two models in float64, for the CPU, whose tiles merge so in csrc/kl_loss/cpu/row_merger.h; GPUs
merge them by their kernels of finish_stats. And metric states of a student alone, for a sparse teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minitron_kernels.ops.kl_loss.divergence import NUM_METRIC_STATE, NUM_STATE, Divergence
from minitron_kernels.ops.kl_loss.options import LossOptions


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


def metric_state_of(metrics: Tensor, options: LossOptions, total_vocab: int) -> Tensor:
    """What the metrics of a shard say, [4, N]: sum_y, total_y, entropy, log p(label).

    total_y is sum (y - max_y), out of a cross-entropy whose label_smoothing is 1 over total_vocab; 0 if there
    is to be no smoothing. Where all tokens are masked out there is no entropy and no label.
    """
    inv_sum, ce, entropy, label = metrics.double().unbind(1)
    total = torch.zeros_like(ce)
    if options.label_smoothing:
        total = ((-inv_sum.log() - ce) * total_vocab).masked_fill(inv_sum == math.inf, -math.inf)
    state = torch.stack((1 / inv_sum, total, entropy, label))
    state[2].masked_fill_(inv_sum == math.inf, 0.0)
    state[3].masked_fill_(inv_sum == math.inf, -math.inf)
    return state.to(metrics.dtype)


def merge_metrics(
    states: Tensor, has_labels: bool, mask: Tensor | None, options: LossOptions, widths: Sequence[int]
) -> Tensor:
    """Max_s and metric states of shards, [R, 5, N], to metrics [N, 4]; widths: tokens of each shard."""
    max_s, sum_y, total, entropy, label = states.double().unbind(1)
    tokens = torch.tensor(widths, dtype=torch.float64, device=states.device)[:, None]
    side = _Side.of(max_s / options.inv_tau, sum_y)
    log_share = side.below + side.share.log()
    # the chain rule of entropy; a shard without probability has none
    own = (side.mass * (entropy - log_share)).masked_fill(side.mass == 0, 0.0)
    columns = [1 / side.total, torch.zeros_like(side.total), own.sum(0), torch.zeros_like(side.total)]
    if has_labels:
        e = options.label_smoothing
        columns[3] = (label + log_share).masked_fill(label == -math.inf, -math.inf).amax(0)
        if e < 1:
            columns[1] = -(1 - e) * columns[3]
        if e > 0:
            from_top = (total + side.below * tokens).masked_fill(tokens == 0, 0.0).sum(0)
            columns[1] = columns[1] + e * (side.total.log() - from_top / sum(widths))
    metrics = torch.stack(columns, 1)
    return (metrics if mask is None else metrics.masked_fill(~mask[:, None], 0.0)).to(states.dtype)


def finite(top: Tensor) -> Tensor:
    """What to subtract for a maximum, so that exp(-inf - it) is 0 and not NaN."""
    return top.clamp(min=torch.finfo(top.dtype).min)


def merge_metric_states(tops: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    """Max_y [P, N] and metric states [P, 4, N] of parts of a vocabulary, as one: [N] and [4, N]."""
    sum_y, dot_y, total_y, label = parts.unbind(1)
    top = tops.amax(0)
    below = tops - finite(top)
    scale = below.exp()
    below = below.masked_fill(scale == 0, 0.0)
    dot = (scale * (dot_y + below * sum_y)).sum(0)
    return top, torch.stack(((scale * sum_y).sum(0), dot, total_y.sum(0), label.amax(0)))


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
