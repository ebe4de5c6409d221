"""What a call of linear_kl_loss is given of each token, and the factors of its gradient on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minitron_kernels.ops.kl_loss.divergence import STAT_KL, Divergence
from minitron_kernels.ops.kl_loss.options import LossOptions

Side = tuple[Tensor, Tensor, Tensor | None]  # hidden states, head, bias
_HALF_REACH = 2.0**15  # the largest |dz| in fp16


class TokenMetrics(NamedTuple):
    """What a call has to do with labels and metrics, at the least nothing."""

    labels: Tensor | None = None  # [N] int64, -1 where there is none
    metrics: Tensor | None = None  # [N, NUM_METRICS], written; with stats of an earlier call read
    ce_weight: Tensor | None = None  # [N] or 0-dim: the cross-entropy's factor in the loss


NO_METRICS = TokenMetrics()


def row_weights(
    row_weight: Tensor | None,
    ce_weight: Tensor | None,
    mask: Tensor | None,
    kind: torch.dtype,
    options: LossOptions,
    stats: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Factors of the rows' divergence and cross-entropy, [N] fp32, and what products are multiplied by.

    In fp16 the gradient of a mean would lie below the smallest number, and that of a low temperature or of
    reverse KL where the teacher has all but ruled out a token beyond the largest: all are scaled to reach
    _HALF_REACH. A row's |dz| is at most its weight times scale / tau, for reverse KL times 1 + its loss; and
    that of the cross-entropy its weight times scale.
    """
    rows = stats.shape[0]
    weight = stats.new_ones(()) if row_weight is None else row_weight.to(torch.float32)
    of_ce = None if ce_weight is None else ce_weight.to(torch.float32)
    if kind != torch.float16:
        return weight.expand(rows), None if of_ce is None else of_ce.expand(rows), None
    reach = weight.abs() * (options.inv_tau * options.student_scale)
    if options.divergence is Divergence.REVERSE_KL:
        # a row whose loss is infinite has no gradient, the others keep theirs
        reach = reach * (1.0 + torch.nan_to_num(stats[:, STAT_KL], nan=0.0, posinf=0.0))
    if of_ce is not None:
        reach = reach + of_ce.abs() * options.student_scale
    valid = reach if mask is None else torch.where(mask, reach, 0.0)
    top = valid.amax().clamp_min(torch.finfo(torch.float32).tiny)
    of_ce = None if of_ce is None else (of_ce / top * _HALF_REACH).expand(rows)
    return (weight / top * _HALF_REACH).expand(rows), of_ce, top / _HALF_REACH
