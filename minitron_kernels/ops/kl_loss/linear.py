"""linear_kl_loss and its gradients: autograd around the opaque op of linear_op.py.

Gradients are made in the forward, where the logits are; the backward scales them. Two make them in the
backward instead, from the logits again: a loss per token (reduction="none"), whose incoming gradients are not
known before; and one with grad_head_accumulator, since what is added to a caller's buffer must be added once,
with the right factor, and only if there is a backward. A forward may run twice (checkpoint) or for nothing.

A grad_head_buffer is written over, so it may be in the forward. Its version is saved with it, and tells the
backward whether another call has written over it since; see head_buffer.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitron_kernels.ops.kl_loss import head_buffer
from minitron_kernels.ops.kl_loss.checks import as_saved
from minitron_kernels.ops.kl_loss.divergence import METRIC_CE
from minitron_kernels.ops.kl_loss.linear_op import linear_kl_loss_op
from minitron_kernels.ops.kl_loss.options import LossOptions
from minitron_kernels.ops.kl_loss.record import LossRecord, TokenTerms
from minitron_kernels.ops.kl_loss.rows import columns, no_second_derivative, returned_terms
from minitron_kernels.ops.kl_loss.scaling import scaled
from minitron_kernels.ops.kl_loss.sums import sum_rows
from minitron_kernels.ops.kl_loss.tokens import Tokens
from minitron_kernels.ops.kl_loss.vocab_parallel import Parallel


def _dtypes(
    hidden: Tensor, head: Tensor, bias: Tensor | None
) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    return hidden.dtype, head.dtype, torch.float32 if bias is None else bias.dtype


class Teacher(NamedTuple):
    """Of a student's tokens: hidden states, head and bias, or a SparseTeacher's ids and outcomes."""

    hidden: Tensor | None = None
    head: Tensor | None = None
    bias: Tensor | None = None
    ids: Tensor | None = None
    outcomes: Tensor | None = None


Terms = tuple[Tensor, Tensor | None, Tensor | None]  # a loss; row losses and metrics where they are asked for


class _Reduced(torch.autograd.Function):
    """sum(row_weight * loss rows + ce_weight * cross-entropy), gradients made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        teacher_bias: Tensor | None,
        ids: Tensor | None,
        outcomes: Tensor | None,
        mask: Tensor | None,
        labels: Tensor | None,
        row_weight: Tensor,
        ce_weight: Tensor | None,
        grad_head_buffer: Tensor | None,
        needs_grad: tuple[bool, bool, bool],
        needs_metrics: bool,
        rest: tuple[Any, ...],
        backend: str,
    ) -> Terms:
        loss, _, *grads, metrics = linear_kl_loss_op(
            student_hidden,
            student_head,
            student_bias,
            teacher_hidden,
            teacher_head,
            teacher_bias,
            ids,
            outcomes,
            mask,
            row_weight,
            None,
            None,
            labels,
            ce_weight,
            None,
            *needs_grad,
            needs_metrics,
            *rest,
            grad_head_buffer=grad_head_buffer,
        )
        if grad_head_buffer is not None:
            grads[1] = grad_head_buffer
        ctx.save_for_backward(*grads, head_buffer.version_of(grad_head_buffer))
        ctx.grad_head_buffer = grad_head_buffer
        ctx.needs_grad, ctx.backend = needs_grad, backend
        ctx.dtypes = _dtypes(student_hidden, student_head, student_bias)
        ce = None if ce_weight is None else metrics[:, METRIC_CE]
        total = _weighted_sum(loss, row_weight, ce, ce_weight)
        if not needs_metrics:
            return total, None, None
        rows, metrics = loss.clone(), metrics.clone()  # see sums.py
        ctx.mark_non_differentiable(rows, metrics)
        return total, rows, metrics

    @staticmethod
    @no_second_derivative("linear_kl_loss")
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *made, version = ctx.saved_tensors
        head_buffer.check_version(ctx.grad_head_buffer, version)
        grads = [
            scaled(grad, grad_loss, dtype, ctx.backend) if wanted else None
            for grad, dtype, wanted in zip(made, ctx.dtypes, ctx.needs_grad, strict=True)
        ]
        head_buffer.give(ctx.grad_head_buffer, grads[1])
        return (*map(_as_own, grads), *(None,) * 14)


class _PerToken(torch.autograd.Function):
    """Loss rows, and cross-entropy rows with the other metrics; the gradients are made in the backward, when
    each row's factor is known."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        teacher_bias: Tensor | None,
        ids: Tensor | None,
        outcomes: Tensor | None,
        mask: Tensor | None,
        labels: Tensor | None,
        grad_head_accumulator: Tensor | None,
        grad_head_buffer: Tensor | None,
        needs_grad: tuple[bool, bool, bool],
        needs_metrics: bool,
        rest: tuple[Any, ...],
    ) -> tuple[Tensor | None, ...]:
        inputs = (
            student_hidden,
            student_head,
            student_bias,
            teacher_hidden,
            teacher_head,
            teacher_bias,
            ids,
            outcomes,
            mask,
        )
        loss, stats, *_, metrics = linear_kl_loss_op(
            *inputs, None, None, None, labels, None, None, False, False, False, needs_metrics, *rest
        )
        ctx.save_for_backward(*map(as_saved, (*inputs, labels)), stats, metrics)
        # not saved: other micro-batches may add to it before this one's backward does
        ctx.grad_head_accumulator, ctx.grad_head_buffer = grad_head_accumulator, grad_head_buffer
        ctx.version = head_buffer.version_of(grad_head_buffer)
        ctx.needs_grad, ctx.rest = needs_grad, rest
        return returned_terms(ctx, loss, metrics if needs_metrics else None)

    @staticmethod
    @no_second_derivative("linear_kl_loss")
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_ce: Tensor | None = None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        *inputs, labels, stats, metrics = ctx.saved_tensors
        if labels is None:
            grad_ce = None
        if grad_loss is None:
            grad_loss = stats.new_zeros(())
        accumulator, buffer = ctx.grad_head_accumulator, ctx.grad_head_buffer
        head_buffer.check_version(buffer, ctx.version)
        _, _, *grads, _ = linear_kl_loss_op(
            *inputs,
            grad_loss,
            stats,
            accumulator,
            labels,
            grad_ce,
            None if grad_ce is None else metrics,
            *ctx.needs_grad,
            False,
            *ctx.rest,
            grad_head_buffer=buffer,
        )
        if buffer is not None:
            grads[1] = buffer
        head_buffer.give(buffer, grads[1])
        returned = (ctx.needs_grad[0], ctx.needs_grad[1] and accumulator is None, ctx.needs_grad[2])
        dtypes = _dtypes(*inputs[:3])
        grads = [
            _as_own(grad.to(dtype)) if keep else None
            for grad, dtype, keep in zip(grads, dtypes, returned, strict=True)
        ]
        return (*grads, *(None,) * 12)


def _as_own(grad: Tensor | None) -> Tensor | None:
    """The same memory as a tensor that nobody else holds: autograd makes it .grad, others it copies."""
    return None if grad is None else grad.detach()


def _weighted_sum(loss: Tensor, row_weight: Tensor, ce: Tensor | None, ce_weight: Tensor | None) -> Tensor:
    """sum(row_weight * loss + ce_weight * ce) over rows."""
    weight = row_weight.to(loss.dtype)
    rows = loss * weight
    if ce is not None and ce_weight is not None:  # a KL of weight 0 is left out, even if it is infinite
        rows = torch.where(weight == 0, 0.0, rows) + ce * ce_weight.to(loss.dtype)
    return sum_rows(rows)


def linear_kl_rows(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: Teacher,
    mask: Tensor | None,
    row_weight: Tensor | None,
    grad_head_accumulator: Tensor | None,
    vocab_size: int,
    options: LossOptions,
    backend: str,
    schedule: str,
    workspace_bytes: int,
    engine: str | None = None,
    *,
    labels: Tensor | None = None,
    ce_weight: Tensor | None = None,
    needs_metrics: bool = False,
    parallel: Parallel = Parallel(),  # noqa: B008  immutable
    grad_head_buffer: Tensor | None = None,
) -> tuple[Tensor, TokenTerms | None]:
    """Loss rows [N], or with a row_weight their sum with the cross-entropy's; and the terms of tokens.

    The student is hidden, head and bias. Without a row_weight cross-entropy is a term, and differentiable as
    the loss is; terms are None unless metrics are needed, and those beside a sum have no gradient.
    With a group in `parallel` heads are this rank's, and vocab_size is 0 where it is not known.
    `backend` is what pick() chose; on the CPU there is one, and `engine` says how it multiplies.
    """
    grad_mode = torch.is_grad_enabled()
    hidden, head, bias = student
    needs_grad = (
        grad_mode and hidden.requires_grad,
        grad_mode and (head.requires_grad or grad_head_accumulator is not None),
        grad_mode and bias is not None and bias.requires_grad,
    )
    needs_metrics = needs_metrics or ce_weight is not None
    rest = (vocab_size, *options.as_arguments(), backend, schedule, workspace_bytes, engine, *parallel)
    if any(needs_grad) and row_weight is not None and grad_head_accumulator is None:
        total, rows, metrics = _Reduced.apply(
            hidden,
            head,
            bias,
            *teacher,
            mask,
            labels,
            row_weight,
            ce_weight,
            grad_head_buffer if needs_grad[1] else None,
            needs_grad,
            needs_metrics,
            rest,
            backend,
        )
        return total, TokenTerms(rows, *columns(metrics)) if needs_metrics else None
    if any(needs_grad):
        terms = TokenTerms(
            *_PerToken.apply(
                hidden,
                head,
                bias,
                *teacher,
                mask,
                labels,
                grad_head_accumulator,
                grad_head_buffer if needs_grad[1] else None,
                needs_grad,
                needs_metrics,
                rest,
            )
        )
    else:
        loss, *_, metrics = linear_kl_loss_op(
            hidden,
            head,
            bias,
            *teacher,
            mask,
            None,
            None,
            None,
            labels,
            None,
            None,
            False,
            False,
            False,
            needs_metrics,
            *rest,
        )
        terms = TokenTerms(loss, *columns(metrics)) if needs_metrics else TokenTerms(loss)
    result = terms.kl if row_weight is None else _weighted_sum(terms.kl, row_weight, terms.ce, ce_weight)
    return result, terms if needs_metrics else None


def linear_result(
    tokens: Tokens,
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: Teacher,
    grad_head_accumulator: Tensor | None,
    vocab_size: int,
    options: LossOptions,
    backend: str,
    schedule: str,
    workspace_bytes: int,
    parallel: Parallel,
    grad_head_buffer: Tensor | None = None,
) -> Tensor | LossRecord:
    """What linear_kl_loss() and linear_sparse_kl_loss() return; see linear_kl_rows()."""
    row_weight, ce_weight = tokens.row_weights()
    result, terms = linear_kl_rows(
        student,
        teacher,
        tokens.computed,
        row_weight,
        grad_head_accumulator,
        vocab_size,
        options,
        backend,
        schedule,
        workspace_bytes,
        labels=tokens.targets,
        ce_weight=ce_weight,
        needs_metrics=tokens.needs_metrics,
        parallel=parallel,
        grad_head_buffer=grad_head_buffer,
    )
    if row_weight is None:
        result = tokens.loss(TokenTerms(result) if terms is None else terms)
    return tokens.result(result, terms)
