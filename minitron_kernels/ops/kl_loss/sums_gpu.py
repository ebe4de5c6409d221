"""How gradients of linear_kl_loss add up on a GPU: sums of GEMMs in fp32, and what rows are weighted by."""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_kernels.ops.kl_loss import gemm_gpu
from minitron_kernels.ops.kl_loss.divergence import Divergence
from minitron_kernels.ops.kl_loss.options import LossOptions
from minitron_kernels.ops.kl_loss.plan_gpu import sum_has_memory

_HALF_REACH = 2.0**15  # the largest |dz| in fp16


class GradientSum:
    """A gradient that is the sum of several GEMMs: added up in fp32, then written in its own dtype.

    Args:
        out: what to write; what to add to if `adds`.
        kind: dtype of the products' operands.
        parts: how many products are added; with the last of them `out` is written.
        unscale: 0-dim, to be multiplied by at the end; None for 1.
        adds: whether `out` already holds a sum.
        rounds: whether a single product may be rounded to the dtype of `out` by its GEMM.
    """

    def __init__(
        self,
        out: Tensor,
        kind: torch.dtype,
        parts: int,
        unscale: Tensor | None,
        *,
        adds: bool = False,
        rounds: bool = True,
    ) -> None:
        self.out, self.unscale, self.adds, self.missing = out, unscale, adds, parts
        in_place = not sum_has_memory(out.dtype, kind, parts, adds, rounds)
        self.sum = out if in_place else None
        self.started = in_place and adds

    def add(self, a: Tensor, b: Tensor) -> None:
        """The sum, plus a @ b."""
        if self.sum is None:
            dtype = torch.promote_types(self.out.dtype, torch.float32)
            self.sum = torch.empty(self.out.shape, dtype=dtype, device=self.out.device)
        gemm_gpu.matmul(a, b, self.sum, self.started)
        self.started = True
        self.missing -= 1
        if self.missing == 0:
            self._write(self.sum)

    def _write(self, total: Tensor) -> None:
        self.sum = None  # its memory is the next sum's
        if self.unscale is not None:
            total.mul_(self.unscale)
        if total is not self.out:
            self.out.add_(total) if self.adds else self.out.copy_(total)


def add_rows(dz: Tensor, out: Tensor, first: bool) -> None:
    """The bias's gradient of some rows."""
    total = dz.sum(0, dtype=out.dtype)
    out.copy_(total) if first else out.add_(total)


def gradient_weights(
    row_weight: Tensor | None,
    ce_weight: Tensor | None,
    mask: Tensor | None,
    kind: torch.dtype,
    options: LossOptions,
    kl: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Factors of the rows' divergence and cross-entropy, [N] fp32, and what products are multiplied by.

    In fp16 the gradient of a mean would lie below the smallest number, and that of a low temperature or of
    reverse KL where the teacher has all but ruled out a token beyond the largest: all are scaled to reach
    _HALF_REACH. A row's |dz| is at most its weight times scale / tau, for reverse KL times 1 + its loss; and
    that of the cross-entropy its weight times scale.
    """
    rows = kl.shape[0]
    weight = kl.new_ones(()) if row_weight is None else row_weight.to(kl.dtype)
    of_ce = None if ce_weight is None else ce_weight.to(kl.dtype)
    if kind != torch.float16:
        return weight.expand(rows), None if of_ce is None else of_ce.expand(rows), None
    reach = weight.abs() * (options.inv_tau * options.student_scale)
    if options.divergence is Divergence.REVERSE_KL:
        # a row whose loss is infinite has no gradient, the others keep theirs
        reach = reach * (1.0 + torch.nan_to_num(kl, nan=0.0, posinf=0.0))
    if of_ce is not None:
        reach = reach + of_ce.abs() * options.student_scale
    valid = reach if mask is None else torch.where(mask, reach, 0.0)
    top = valid.amax().clamp_min(torch.finfo(torch.float32).tiny)
    of_ce = None if of_ce is None else (of_ce / top * _HALF_REACH).expand(rows)
    return (weight / top * _HALF_REACH).expand(rows), of_ce, top / _HALF_REACH
