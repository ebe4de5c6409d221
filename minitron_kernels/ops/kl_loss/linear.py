"""linear_kl_loss as one opaque op: plan, scratch memory and the native call, then autograd around it.

Gradients are made in the forward, where the logits are; the backward scales them. Only a loss per token
(reduction="none"), whose incoming gradients are not known yet, makes them in the backward, from the logits
again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minitron_kernels import _workspace
from minitron_kernels.ops.kl_loss.epilogues import EPILOGUES
from minitron_kernels.ops.kl_loss.linear_gpu import linear_kl_loss_
from minitron_kernels.ops.kl_loss.options import LossOptions
from minitron_kernels.ops.kl_loss.plan import operand_type, plan_linear_kl_loss
from minitron_kernels.ops.kl_loss.rows import NO_DOUBLE_BACKWARD, NUM_STATS
from minitron_kernels.ops.kl_loss.sums import sum_rows


def _loss_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _grad_dtype(x: Tensor) -> torch.dtype:
    # fp16 gradients wait for the loss scale in fp32: p / N of a rare token is below fp16's smallest number
    return torch.float32 if x.dtype == torch.float16 else x.dtype


@torch.library.custom_op("minitron_kernels::linear_kl_loss", mutates_args=("head_accumulator",))
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
    head_accumulator: Tensor | None,
    want_hidden: bool,
    want_head: bool,
    want_bias: bool,
    vocab_size: int,
    beta: float,
    inv_tau: float,
    student_scale: float,
    student_softcap: float,
    teacher_scale: float,
    teacher_softcap: float,
    backend: str,
    schedule: str,
    workspace_bytes: int,
    engine: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row losses [N], stats [N, 6], and the gradients of sum(row_weight * loss) that are wanted, else empty.

    With `stats` of an earlier call, only the gradients are made. row_weight: [N] or 0-dim, or None for 1.
    """
    N, loss_dtype = student_hidden.shape[0], _loss_dtype(student_hidden)
    loss, new_stats, grad_hidden, grad_head, grad_bias = _fake(
        student_hidden, student_head, stats, head_accumulator, want_hidden, want_head, want_bias
    )
    if student_hidden.device.type != "cpu":
        linear_kl_loss_(
            (loss, new_stats, grad_hidden, grad_head, grad_bias),
            (student_hidden, student_head, student_bias),
            (teacher_hidden, teacher_head, teacher_bias),
            mask,
            row_weight,
            stats,
            head_accumulator,
            (want_hidden, want_head, want_bias),
            vocab_size,
            (beta, inv_tau, student_scale, student_softcap, teacher_scale, teacher_softcap),
            schedule,
            workspace_bytes,
            EPILOGUES[backend](),
        )
        return loss, new_stats, grad_hidden, grad_head, grad_bias
    count = N if mask is None else int(mask.sum())
    plan = plan_linear_kl_loss(
        count,
        vocab_size,
        student_hidden.shape[1],
        teacher_hidden.shape[1],
        dtype=_grad_dtype(student_head),
        grad_hidden=want_hidden,
        grad_head=want_head,
        grad_bias=want_bias,
        grad_head_accumulator=head_accumulator is not None,
        divergence_needs_kl=0 < beta < 1,
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
            grad_hidden if want_hidden else None,
            grad_head if grad_head.numel() else None,
            grad_bias[:vocab_size] if want_bias else None,
            head_accumulator,
            workspace,
            vocab_size,
            beta,
            inv_tau,
            student_scale,
            student_softcap,
            teacher_scale,
            teacher_softcap,
            plan.schedule,
            plan.chunk_rows,
            plan.tile,
            plan.super_tiles,
            plan.stored_tiles,
            plan.engine,
        )
    if want_bias:
        grad_bias[vocab_size:] = 0
    return loss, new_stats, grad_hidden, grad_head, grad_bias


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _fake(
    student_hidden: Tensor,
    student_head: Tensor,
    stats: Tensor | None,
    head_accumulator: Tensor | None,
    want_hidden: bool,
    want_head: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (N, H), rows = student_hidden.shape, student_head.shape[0]
    loss_dtype = _loss_dtype(student_hidden)

    def grad(x: Tensor, shape: tuple[int, ...], wanted: bool) -> Tensor:
        return x.new_empty(shape if wanted else (0,), dtype=_grad_dtype(x))

    return (
        student_hidden.new_empty(N, dtype=loss_dtype),
        student_hidden.new_empty((N, NUM_STATS) if stats is None else (0,), dtype=loss_dtype),
        grad(student_hidden, (N, H), want_hidden),
        grad(student_head, (rows, H), want_head and head_accumulator is None),
        student_hidden.new_empty(rows if want_bias else 0, dtype=loss_dtype),
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
    head_accumulator: Tensor | None,
    want_hidden: bool,
    want_head: bool,
    want_bias: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _fake(student_hidden, student_head, stats, head_accumulator, want_hidden, want_head, want_bias)


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * factor in the parameter's dtype; on the CPU a factor of 1, the usual one, costs nothing."""
    if not torch.compiler.is_compiling() and factor.device.type == "cpu" and float(factor) == 1.0:
        return grad.to(dtype)
    return (grad * factor.to(grad.dtype)).to(dtype)


def _dtypes(
    hidden: Tensor, head: Tensor, bias: Tensor | None
) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    return hidden.dtype, head.dtype, torch.float32 if bias is None else bias.dtype


def _returned(wants: tuple[bool, bool, bool], lent: bool) -> tuple[bool, bool, bool]:
    """Which gradients autograd is handed: the head's not, where it went into the caller's buffer."""
    return wants[0], wants[1] and not lent, wants[2]


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
        head_accumulator: Tensor | None,
        wants: tuple[bool, bool, bool],
        rest: tuple[Any, ...],
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
            head_accumulator,
            *wants,
            *rest,
        )
        ctx.save_for_backward(*grads)
        ctx.wants = wants
        ctx.lent = head_accumulator is not None
        ctx.dtypes = _dtypes(student_hidden, student_head, student_bias)
        return sum_rows(loss * row_weight.to(loss.dtype))

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(NO_DOUBLE_BACKWARD.format("linear_kl_loss"))
        if ctx.lent and grad_loss.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_lent(float(grad_loss))
        grads = [
            _scaled(grad, grad_loss, dtype) if returned else None
            for grad, dtype, returned in zip(
                ctx.saved_tensors, ctx.dtypes, _returned(ctx.wants, ctx.lent), strict=True
            )
        ]
        return (*grads, *(None,) * 8)


def _check_lent(factor: float) -> None:
    if factor != 1.0:
        raise RuntimeError(
            f"the loss was multiplied by {factor} before backward(), but its head gradient has been added to "
            "grad_head_accumulator in the forward, unscaled: pass num_items= (the tokens of all "
            "micro-batches) instead of dividing the loss"
        )


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
        head_accumulator: Tensor | None,
        wants: tuple[bool, bool, bool],
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
        ctx.save_for_backward(*inputs, stats, head_accumulator)
        ctx.wants, ctx.rest = wants, rest
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(NO_DOUBLE_BACKWARD.format("linear_kl_loss"))
        *inputs, stats, head_accumulator = ctx.saved_tensors
        _, _, *grads = _linear_kl_loss(*inputs, grad_loss, stats, head_accumulator, *ctx.wants, *ctx.rest)
        returned = _returned(ctx.wants, head_accumulator is not None)
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
    head_accumulator: Tensor | None,
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
    wants = (
        grad_mode and hidden.requires_grad,
        grad_mode and (head.requires_grad or head_accumulator is not None),
        grad_mode and bias is not None and bias.requires_grad,
    )
    rest = (vocab_size, *options, backend, schedule, workspace_bytes, engine)
    if not any(wants):
        loss = _linear_kl_loss(
            hidden, head, *teacher[:2], bias, teacher[2], mask, None, None, None, False, False, False, *rest
        )[0]
        return loss if row_weight is None else sum_rows(loss * row_weight.to(loss.dtype))
    if row_weight is None:
        return _PerToken.apply(hidden, head, bias, *teacher, mask, head_accumulator, wants, rest)
    return _Reduced.apply(hidden, head, bias, *teacher, mask, row_weight, head_accumulator, wants, rest)
