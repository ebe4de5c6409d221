"""linear_kl_loss as one opaque op: plan, scratch memory and the native call, then autograd around it.

Gradients are made in the forward, where the logits are; the backward scales them. Two make them in the
backward instead, from the logits again: a loss per token (reduction="none"), whose incoming gradients are not
known before; and one with grad_head_accumulator, since what is added to a caller's buffer must be added once,
with the right factor, and only if there is a backward. A forward may run twice (checkpoint) or for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minitron_kernels import _workspace
from minitron_kernels.ops.kl_loss.checks import as_saved
from minitron_kernels.ops.kl_loss.divergence import NUM_STATS
from minitron_kernels.ops.kl_loss.epilogues import EPILOGUES
from minitron_kernels.ops.kl_loss.linear_gpu import linear_kl_loss_
from minitron_kernels.ops.kl_loss.options import LossOptions
from minitron_kernels.ops.kl_loss.plan import grad_dtype
from minitron_kernels.ops.kl_loss.plan_cpu import operand_type
from minitron_kernels.ops.kl_loss.plan_cpu import plan as plan_cpu
from minitron_kernels.ops.kl_loss.rows import no_second_derivative
from minitron_kernels.ops.kl_loss.scaling import scaled
from minitron_kernels.ops.kl_loss.sums import sum_rows


def _loss_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("minitron_kernels::linear_kl_loss", mutates_args=("grad_head_accumulator",))
def _linear_kl_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    stats: Tensor | None,
    grad_head_accumulator: Tensor | None,
    needs_hidden: bool,
    needs_head: bool,
    needs_bias: bool,
    vocab_size: int,
    numbers: Sequence[float],
    values: Tensor | None,
    backend: str,
    schedule: str,
    workspace_bytes: int,
    engine: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row losses [N], stats [N, 6], and the gradients of sum(row_weight * loss) that are needed, else empty.

    With `stats` of an earlier call, only the gradients are made. row_weight: [N] or 0-dim, or None for 1.
    `numbers` and `values` are those of LossOptions.as_arguments().
    """
    options = LossOptions.from_arguments(numbers, values)
    N, loss_dtype = student_hidden.shape[0], _loss_dtype(student_hidden)
    loss, new_stats, grad_hidden, grad_head, grad_bias = _fake(
        student_hidden, student_head, stats, grad_head_accumulator, needs_hidden, needs_head, needs_bias
    )
    if student_hidden.device.type != "cpu":
        linear_kl_loss_(
            (loss, new_stats, grad_hidden, grad_head, grad_bias),
            (student_hidden, student_head, student_bias),
            (teacher_hidden, teacher_head, teacher_bias),
            mask,
            row_weight,
            stats,
            grad_head_accumulator,
            (needs_hidden, needs_head, needs_bias),
            vocab_size,
            options,
            schedule,
            workspace_bytes,
            EPILOGUES[backend](),
        )
        return loss, new_stats, grad_hidden, grad_head, grad_bias
    count = N if mask is None else int(mask.sum())
    plan = plan_cpu(
        count,
        vocab_size,
        student_hidden.shape[1],
        teacher_hidden.shape[1],
        dtype=grad_dtype(student_head.dtype),
        grad_hidden=needs_hidden,
        grad_head=needs_head,
        grad_bias=needs_bias,
        grad_head_accumulator=grad_head_accumulator is not None,
        divergence_needs_kl=options.divergence.needs_second_look,
        schedule=schedule,
        workspace_bytes=workspace_bytes,
        engine=engine
        or operand_type(student_hidden.dtype, student_head.dtype, teacher_hidden.dtype, teacher_head.dtype),
    )

    def vector(x: Tensor | None, length: int) -> Tensor | None:
        return None if x is None else x[:length].to(loss_dtype).contiguous()

    weight = None if row_weight is None else row_weight.to(loss_dtype).expand(N).contiguous()
    with _workspace.borrow(plan.total_bytes, student_hidden.device) as workspace:
        torch.ops.minitron_kernels.linear_kl_loss_cpu_(
            _rows(student_hidden),
            _rows(student_head),
            _rows(teacher_hidden),
            _rows(teacher_head),
            vector(student_bias, vocab_size),
            vector(teacher_bias, vocab_size),
            mask,
            weight,
            loss,
            new_stats if stats is None else stats.contiguous(),
            stats is not None,
            grad_hidden if needs_hidden else None,
            grad_head if grad_head.numel() else None,
            grad_bias[:vocab_size] if needs_bias else None,
            grad_head_accumulator,
            workspace,
            vocab_size,
            options,
            plan.numbers,
        )
    if needs_bias:
        grad_bias[vocab_size:] = 0
    return loss, new_stats, grad_hidden, grad_head, grad_bias


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _fake(
    student_hidden: Tensor,
    student_head: Tensor,
    stats: Tensor | None,
    grad_head_accumulator: Tensor | None,
    needs_hidden: bool,
    needs_head: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (N, H), rows = student_hidden.shape, student_head.shape[0]
    loss_dtype = _loss_dtype(student_hidden)

    def grad(x: Tensor, shape: tuple[int, ...], wanted: bool) -> Tensor:
        return x.new_empty(shape if wanted else (0,), dtype=grad_dtype(x.dtype))

    return (
        student_hidden.new_empty(N, dtype=loss_dtype),
        student_hidden.new_empty((N, NUM_STATS) if stats is None else (0,), dtype=loss_dtype),
        grad(student_hidden, (N, H), needs_hidden),
        grad(student_head, (rows, H), needs_head and grad_head_accumulator is None),
        student_hidden.new_empty(rows if needs_bias else 0, dtype=loss_dtype),
    )


@_linear_kl_loss.register_fake
def _(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    stats: Tensor | None,
    grad_head_accumulator: Tensor | None,
    needs_hidden: bool,
    needs_head: bool,
    needs_bias: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _fake(
        student_hidden, student_head, stats, grad_head_accumulator, needs_hidden, needs_head, needs_bias
    )


def _dtypes(
    hidden: Tensor, head: Tensor, bias: Tensor | None
) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    return hidden.dtype, head.dtype, torch.float32 if bias is None else bias.dtype


class _Reduced(torch.autograd.Function):
    """sum(row_weight * loss rows), gradients made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        teacher_bias: Tensor | None,
        mask: Tensor | None,
        row_weight: Tensor,
        needs_grad: tuple[bool, bool, bool],
        rest: tuple[Any, ...],
        backend: str,
    ) -> Tensor:
        loss, _, *grads = _linear_kl_loss(
            student_hidden,
            student_head,
            teacher_hidden,
            teacher_head,
            student_bias,
            teacher_bias,
            mask,
            row_weight,
            None,
            None,
            *needs_grad,
            *rest,
        )
        ctx.save_for_backward(*grads)
        ctx.needs_grad, ctx.backend = needs_grad, backend
        ctx.dtypes = _dtypes(student_hidden, student_head, student_bias)
        return sum_rows(loss * row_weight.to(loss.dtype))

    @staticmethod
    @no_second_derivative("linear_kl_loss")
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grads = [
            scaled(grad, grad_loss, dtype, ctx.backend) if wanted else None
            for grad, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_grad, strict=True)
        ]
        return (*grads, *(None,) * 8)


class _PerToken(torch.autograd.Function):
    """Loss rows; the gradients are made in the backward, when each row's factor is known."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        teacher_bias: Tensor | None,
        mask: Tensor | None,
        grad_head_accumulator: Tensor | None,
        needs_grad: tuple[bool, bool, bool],
        rest: tuple[Any, ...],
    ) -> Tensor:
        inputs = (
            student_hidden,
            student_head,
            teacher_hidden,
            teacher_head,
            student_bias,
            teacher_bias,
            mask,
        )
        loss, stats, *_ = _linear_kl_loss(*inputs, None, None, None, False, False, False, *rest)
        ctx.save_for_backward(*map(as_saved, inputs), stats)
        # not saved: other micro-batches may add to it before this one's backward does
        ctx.grad_head_accumulator = grad_head_accumulator
        ctx.needs_grad, ctx.rest = needs_grad, rest
        return loss

    @staticmethod
    @no_second_derivative("linear_kl_loss")
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, stats = ctx.saved_tensors
        accumulator = ctx.grad_head_accumulator
        _, _, *grads = _linear_kl_loss(*inputs, grad_loss, stats, accumulator, *ctx.needs_grad, *ctx.rest)
        returned = (ctx.needs_grad[0], ctx.needs_grad[1] and accumulator is None, ctx.needs_grad[2])
        dtypes = _dtypes(inputs[0], inputs[1], inputs[4])
        grads = [
            grad.to(dtype) if keep else None
            for grad, dtype, keep in zip(grads, dtypes, returned, strict=True)
        ]
        return (*grads, *(None,) * 7)


def linear_kl_rows(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    mask: Tensor | None,
    row_weight: Tensor | None,
    grad_head_accumulator: Tensor | None,
    vocab_size: int,
    options: LossOptions,
    backend: str,
    schedule: str,
    workspace_bytes: int,
    engine: str | None = None,
) -> Tensor:
    """Loss rows [N], or with a row_weight (0-dim) their weighted sum. A side is hidden, head and bias.

    `backend` is what pick() chose; on the CPU there is one, and `engine` says how it multiplies.
    """
    grad_mode = torch.is_grad_enabled()
    hidden, head, bias = student
    needs_grad = (
        grad_mode and hidden.requires_grad,
        grad_mode and (head.requires_grad or grad_head_accumulator is not None),
        grad_mode and bias is not None and bias.requires_grad,
    )
    rest = (vocab_size, *options.as_arguments(), backend, schedule, workspace_bytes, engine)
    if any(needs_grad) and row_weight is not None and grad_head_accumulator is None:
        return _Reduced.apply(hidden, head, bias, *teacher, mask, row_weight, needs_grad, rest, backend)
    if any(needs_grad):
        loss = _PerToken.apply(hidden, head, bias, *teacher, mask, grad_head_accumulator, needs_grad, rest)
    else:
        loss = _linear_kl_loss(
            hidden, head, *teacher[:2], bias, teacher[2], mask, None, None, None, False, False, False, *rest
        )[0]
    return loss if row_weight is None else sum_rows(loss * row_weight.to(loss.dtype))
