"""Divergence of rows of logits by the native kernels, with its gradient.

The backward reads the logits again (they are the caller's and still there) instead of keeping a gradient, so
any incoming gradient is exact and the forward allocates O(N).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minitron_kernels import _native

NUM_STATS = 6  # Stat in csrc/kl_loss/kl_loss_cpu.h

NO_DOUBLE_BACKWARD = (
    "{} has no second derivative: its gradient is made by a kernel. "
    "For double backward use backend='reference'"
)


def kl_rows(
    student: Tensor, teacher: Tensor, mask: Tensor | None, vocab_size: int, *options: float
) -> Tensor:
    """[N, Vs], [N, Vt] with stride 1 along the vocabulary -> [N] in nats; differentiable in student."""
    loss, _ = torch.ops.minitron_kernels.kl_loss_forward(student, teacher, mask, vocab_size, *options)
    return loss


def _stats_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _fake_forward(student: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    N, dtype = student.shape[0], _stats_dtype(student)
    return student.new_empty(N, dtype=dtype), student.new_empty((N, NUM_STATS), dtype=dtype)


def _fake_backward(grad_loss: Tensor, stats: Tensor, student: Tensor, *_: Any) -> Tensor:
    return student.new_empty(student.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, mask, *rest = inputs
    ctx.save_for_backward(student, teacher, mask, output[1])
    ctx.rest = rest
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    student, teacher, mask, stats = ctx.saved_tensors
    grad = None
    if grad_loss is not None and ctx.needs_input_grad[0]:
        grad = torch.ops.minitron_kernels.kl_loss_backward(
            grad_loss.to(stats.dtype).contiguous(), stats, student, teacher, mask, *ctx.rest
        )
    return (grad, *(None,) * (2 + len(ctx.rest)))


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(NO_DOUBLE_BACKWARD.format("kl_loss"))


if _native.available():
    torch.library.register_fake("minitron_kernels::kl_loss_forward", _fake_forward)
    torch.library.register_fake("minitron_kernels::kl_loss_backward", _fake_backward)
    torch.library.register_autograd(
        "minitron_kernels::kl_loss_forward", _backward, setup_context=_setup_context
    )
    torch.library.register_autograd("minitron_kernels::kl_loss_backward", _no_double_backward)
