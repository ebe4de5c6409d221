"""Forward KL of logits whose vocabulary is divided over ranks; plain PyTorch, a few rows at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitron_kernels.ops.kl_loss.checks import check_floating

_CHUNK_BYTES = 64 << 20  # of the fp32 copies of a chunk's logits


def sharded_forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    valid: Tensor,
    *,
    temperature: float,
    num_items: float | Tensor | None,
    group: Any,
) -> Tensor:
    """τ² Σ KL(softmax(teacher/τ) ‖ softmax(student/τ)) / num_items over a vocabulary in parts.

    Args:
        student_logits: [..., V of this rank]; parts may differ in size, and be empty.
        teacher_logits: [..., V of this rank], the same tokens of the vocabulary.
        valid: [...] bool, the same on all ranks of the group.
        temperature: τ.
        num_items: the divisor; None: the valid positions.
        group: the ranks that hold the parts.

    Returns:
        0-dim float32 (float64 for float64), the same on all ranks; the gradient is that of this rank's
        logits, whole: nothing is to be summed over the ranks.

    Raises:
        TypeError, ValueError: shapes or dtypes; on this rank alone, the others wait for the group's timeout.

    Three all-reduces, of two, two and one number a token. Where no position is valid there are none.
    """
    check_floating(student_logits=student_logits, teacher_logits=teacher_logits)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student_logits and teacher_logits must have the same shape on a rank, got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if valid.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"labels must have one entry per token, shape {tuple(student_logits.shape[:-1])}; got "
            f"{tuple(valid.shape)}"
        )
    rows = valid.reshape(-1).nonzero().squeeze(-1)
    shape = valid.numel(), student_logits.shape[-1]  # not -1: a rank's part may be empty
    student, teacher = student_logits.reshape(shape), teacher_logits.detach().reshape(shape)
    kl = _ShardedKL.apply(student, teacher, rows, temperature, group)
    divisor = max(rows.numel(), 1) if num_items is None or rows.numel() == 0 else num_items
    if isinstance(divisor, Tensor):
        divisor = divisor.to(kl.device)
    return kl.sum() * temperature**2 / divisor


class _ShardedKL(torch.autograd.Function):
    """KL of each of `rows`, [n]; the gradient is made from the logits and their global log-sum-exps."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, rows: Tensor, temperature: float, group: Any
    ) -> Tensor:
        wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        maxima = torch.full((2, rows.numel()), -torch.inf, dtype=wide, device=student.device)
        sums, kl = torch.zeros_like(maxima), torch.zeros_like(maxima[0])
        ctx.wide, ctx.temperature = wide, temperature
        chunks = list(_chunks(rows, student.shape[1], wide))
        if student.shape[1]:
            for at, part in chunks:
                for i, x in enumerate((student, teacher)):
                    maxima[i, at] = x[part].to(wide).amax(-1) / temperature
        if rows.numel():
            dist.all_reduce(maxima, dist.ReduceOp.MAX, group=group)
        for at, part in chunks:
            for i, x in enumerate((student, teacher)):
                sums[i, at] = (x[part].to(wide) / temperature - maxima[i, at, None]).exp().sum(-1)
        if rows.numel():
            dist.all_reduce(sums, group=group)
        lse = maxima + sums.log()
        for at, part in chunks:
            s = student[part].to(wide) / temperature - lse[0, at, None]
            t = teacher[part].to(wide) / temperature - lse[1, at, None]
            p = t.exp()
            # Σ p (eʳ − 1 − r) over all tokens is the KL, as Σ p_S = Σ p_T, and its terms are all ≥ 0
            ratio = torch.where(p > 0, s - t, 0)
            term = torch.where(p > 0, p * (torch.expm1(ratio) - ratio), s.exp())
            # far apart eʳ overflows where p eʳ does not
            kl[at] = torch.where(ratio > 1, s.exp() - p - p * ratio, term).sum(-1)
        if rows.numel():
            dist.all_reduce(kl, group=group)
        ctx.save_for_backward(student, teacher, rows, lse)
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, rows, lse = ctx.saved_tensors
        grad = torch.zeros_like(student)
        for at, part in _chunks(rows, student.shape[1], ctx.wide):
            s, t = (
                (x[part].to(ctx.wide) / ctx.temperature - lse[i, at, None]).exp_()
                for i, x in enumerate((student, teacher))
            )
            grad[part] = s.sub_(t).mul_((grads[0][at] / ctx.temperature)[:, None]).to(grad.dtype)
        return grad, None, None, None, None


def _chunks(rows: Tensor, V: int, dtype: torch.dtype) -> list[tuple[slice, Tensor]]:
    count = max(1, _CHUNK_BYTES // (max(V, 1) * dtype.itemsize))
    starts = range(0, rows.numel(), count)
    return [(slice(start, start + count), rows[start : start + count]) for start in starts]
