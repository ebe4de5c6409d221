"""Divergence of rows of logits by the native or the Triton kernels, with its gradient.

The backward reads the logits again (they are the caller's and still there) instead of keeping a gradient, so
any incoming gradient is exact and the forward allocates O(N).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minitron_kernels import _native
from minitron_kernels._opaque import opaque_op
from minitron_kernels.ops.kl_loss.checks import as_saved
from minitron_kernels.ops.kl_loss.divergence import NUM_METRICS, NUM_STATS
from minitron_kernels.ops.kl_loss.options import LossOptions


def kl_rows(
    backend: str, student: Tensor, teacher: Tensor, mask: Tensor | None, vocab_size: int, options: LossOptions
) -> Tensor:
    """[N, Vs], [N, Vt] with stride 1 along the vocabulary -> [N] in nats; differentiable in student."""
    arguments = (vocab_size, *options.as_arguments(), backend)
    if torch.is_grad_enabled() and student.requires_grad:
        return _Rows.apply(student, teacher, mask, arguments)
    return _forward(student, teacher, mask, arguments)[0]


def kl_rows_with_metrics(
    backend: str,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    vocab_size: int,
    options: LossOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kl_rows(), cross-entropy (differentiable too), entropy and log p(label) of each row.

    labels: [N] int64, -1 where mask is False; without them cross-entropy and log p(label) are 0.
    """
    arguments = (vocab_size, *options.as_arguments(), backend)
    if torch.is_grad_enabled() and student.requires_grad:
        return _RowsWithMetrics.apply(student, teacher, mask, labels, arguments)
    loss, _, metrics = _forward_metrics(student, teacher, mask, labels, arguments)
    return (loss, *columns(metrics))


def columns(metrics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, entropy and log p(label) out of metrics [N, NUM_METRICS], each in memory of its own."""
    # torch 2.11 gives an autograd.Function no gradient if what it returns is also one of its intermediates
    _, ce, entropy, label_logprob = (column.clone() for column in metrics.unbind(1))
    return ce, entropy, label_logprob


def returned_terms(ctx: Any, loss: Tensor, metrics: Tensor | None) -> tuple[Tensor | None, ...]:
    """What an autograd.Function's forward returns of rows: loss, cross-entropy, entropy and log p(label).

    The latter two have no gradient; without metrics there is the loss alone.
    """
    ctx.set_materialize_grads(False)
    if metrics is None:
        return loss, None, None, None
    ce, entropy, label_logprob = columns(metrics)
    ctx.mark_non_differentiable(entropy, label_logprob)
    return loss, ce, entropy, label_logprob


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, name: str) -> Tensor:
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.name} has no second derivative: its gradient is made by a kernel. "
            "For double backward use backend='reference'"
        )


def no_second_derivative(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For the backward of an autograd.Function: its gradients raise an error once they are differentiated."""

    def decorate(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def wrapped(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
            if not torch.is_grad_enabled():
                return backward(ctx, *incoming)
            with torch.no_grad():
                grads = backward(ctx, *incoming)
            return tuple(
                None if g is None else _NoSecondDerivative.apply(g.detach().requires_grad_(), name)
                for g in grads
            )

        return wrapped

    return decorate


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor | None, arguments: tuple[Any, ...]
    ) -> Tensor:
        loss, stats = _forward(student, teacher, mask, arguments)
        ctx.save_for_backward(*map(as_saved, (student, teacher, mask)), stats)
        ctx.arguments = arguments
        return loss

    @staticmethod
    @no_second_derivative("kl_loss")
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, mask, stats = ctx.saved_tensors
        weight = grad_loss.to(stats.dtype).contiguous()
        return _backward(weight, stats, student, teacher, mask, ctx.arguments), None, None, None


class _RowsWithMetrics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None,
        labels: Tensor | None,
        arguments: tuple[Any, ...],
    ) -> tuple[Tensor | None, ...]:
        loss, stats, metrics = _forward_metrics(student, teacher, mask, labels, arguments)
        ctx.save_for_backward(*map(as_saved, (student, teacher, mask, labels)), stats, metrics)
        ctx.arguments = arguments
        return returned_terms(ctx, loss, metrics)

    @staticmethod
    @no_second_derivative("kl_loss")
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_ce: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        student, teacher, mask, labels, stats, metrics = ctx.saved_tensors
        weight, ce_weight = (
            None if grad is None else grad.to(stats.dtype).contiguous() for grad in (grad_loss, grad_ce)
        )
        if weight is None:
            weight = stats.new_zeros(stats.shape[:1])
        of_ce = None if ce_weight is None or labels is None else (labels, metrics, ce_weight)
        grad = _backward(weight, stats, student, teacher, mask, ctx.arguments, of_ce)
        return grad, None, None, None, None


def _forward_metrics(
    student: Tensor, teacher: Tensor, mask: Tensor | None, labels: Tensor | None, arguments: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    vocab_size, numbers, values, backend = arguments
    if backend == "native" and values is None:
        return torch.ops.minitron_kernels.kl_loss_forward_metrics(
            student, teacher, mask, labels, vocab_size, numbers
        )
    return _forward_metrics_op(student, teacher, mask, labels, *arguments)


def _forward(
    student: Tensor, teacher: Tensor, mask: Tensor | None, arguments: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    vocab_size, numbers, values, backend = arguments
    if backend == "native" and values is None:  # an op in C++ costs a tenth of one in Python
        return torch.ops.minitron_kernels.kl_loss_forward(student, teacher, mask, vocab_size, numbers)
    return _forward_op(student, teacher, mask, *arguments)


def _backward(
    weight: Tensor,
    stats: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    arguments: tuple[Any, ...],
    of_ce: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """of_ce: labels, metrics and the incoming gradient of the cross-entropy."""
    vocab_size, numbers, values, backend = arguments
    ce = () if of_ce is None else of_ce
    if backend == "native" and values is None:
        return torch.ops.minitron_kernels.kl_loss_backward(
            weight, stats, student, teacher, mask, vocab_size, numbers, *ce
        )
    return _backward_op(weight, stats, student, teacher, mask, *arguments, *ce)


@opaque_op("minitron_kernels::kl_rows_forward")
def _forward_op(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    vocab_size: int,
    numbers: Sequence[float],
    values: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    options = LossOptions.from_arguments(numbers, values)
    return _kernels(backend)[0](student, teacher, mask, vocab_size, options)


@opaque_op("minitron_kernels::kl_rows_forward_metrics")
def _forward_metrics_op(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    vocab_size: int,
    numbers: Sequence[float],
    values: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    options = LossOptions.from_arguments(numbers, values)
    return _kernels(backend)[2](student, teacher, mask, labels, vocab_size, options)


@opaque_op("minitron_kernels::kl_rows_backward")
def _backward_op(
    weight: Tensor,
    stats: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    vocab_size: int,
    numbers: Sequence[float],
    values: Tensor | None,
    backend: str,
    labels: Tensor | None = None,
    metrics: Tensor | None = None,
    ce_weight: Tensor | None = None,
) -> Tensor:
    options = LossOptions.from_arguments(numbers, values)
    backward = _kernels(backend)[1]
    return backward(weight, stats, student, teacher, mask, vocab_size, options, labels, metrics, ce_weight)


def _kernels(backend: str) -> tuple[Callable[..., Any], ...]:
    """Forward, backward, and forward with metrics."""
    if backend == "native":
        ops = torch.ops.minitron_kernels
        return ops.kl_loss_forward, ops.kl_loss_backward, ops.kl_loss_forward_metrics
    from minitron_kernels.ops.kl_loss.kernel_triton import launch

    return launch.kl_loss_forward, launch.kl_loss_backward, launch.kl_loss_forward_metrics


def _fake_forward(student: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    N, dtype = student.shape[0], torch.float64 if student.dtype == torch.float64 else torch.float32
    return student.new_empty(N, dtype=dtype), student.new_empty((N, NUM_STATS), dtype=dtype)


def _fake_forward_metrics(student: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, stats = _fake_forward(student)
    return loss, stats, stats.new_empty((student.shape[0], NUM_METRICS))


def _fake_backward(weight: Tensor, stats: Tensor, student: Tensor, *_: Any) -> Tensor:
    return student.new_empty(student.shape)


_forward_op.register_fake(_fake_forward)
_forward_metrics_op.register_fake(_fake_forward_metrics)
_backward_op.register_fake(_fake_backward)
if _native.available():
    torch.library.register_fake("minitron_kernels::kl_loss_forward", _fake_forward)
    torch.library.register_fake("minitron_kernels::kl_loss_forward_metrics", _fake_forward_metrics)
    torch.library.register_fake("minitron_kernels::kl_loss_backward", _fake_backward)
