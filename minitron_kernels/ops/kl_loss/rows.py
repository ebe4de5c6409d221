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
from minitron_kernels.ops.kl_loss.checks import as_saved
from minitron_kernels.ops.kl_loss.divergence import NUM_STATS
from minitron_kernels.ops.kl_loss.options import LossOptions


def kl_rows(
    backend: str, student: Tensor, teacher: Tensor, mask: Tensor | None, vocab_size: int, options: LossOptions
) -> Tensor:
    """[N, Vs], [N, Vt] with stride 1 along the vocabulary -> [N] in nats; differentiable in student."""
    arguments = (vocab_size, *options.as_arguments(), backend)
    if torch.is_grad_enabled() and student.requires_grad:
        return _Rows.apply(student, teacher, mask, arguments)
    return _forward(student, teacher, mask, arguments)[0]


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
        def wrapped(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            if not torch.is_grad_enabled():
                return backward(ctx, grad)
            with torch.no_grad():
                grads = backward(ctx, grad)
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
) -> Tensor:
    vocab_size, numbers, values, backend = arguments
    if backend == "native" and values is None:
        return torch.ops.minitron_kernels.kl_loss_backward(
            weight, stats, student, teacher, mask, vocab_size, numbers
        )
    return _backward_op(weight, stats, student, teacher, mask, *arguments)


@torch.library.custom_op("minitron_kernels::kl_rows_forward", mutates_args=())
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


@torch.library.custom_op("minitron_kernels::kl_rows_backward", mutates_args=())
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
) -> Tensor:
    options = LossOptions.from_arguments(numbers, values)
    return _kernels(backend)[1](weight, stats, student, teacher, mask, vocab_size, options)


def _kernels(backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if backend == "native":
        ops = torch.ops.minitron_kernels
        return ops.kl_loss_forward, ops.kl_loss_backward
    from minitron_kernels.ops.kl_loss.kernel_triton import launch

    return launch.kl_loss_forward, launch.kl_loss_backward


def _fake_forward(student: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    N, dtype = student.shape[0], torch.float64 if student.dtype == torch.float64 else torch.float32
    return student.new_empty(N, dtype=dtype), student.new_empty((N, NUM_STATS), dtype=dtype)


def _fake_backward(weight: Tensor, stats: Tensor, student: Tensor, *_: Any) -> Tensor:
    return student.new_empty(student.shape)


_forward_op.register_fake(_fake_forward)
_backward_op.register_fake(_fake_backward)
if _native.available():
    torch.library.register_fake("minitron_kernels::kl_loss_forward", _fake_forward)
    torch.library.register_fake("minitron_kernels::kl_loss_backward", _fake_backward)
