"""Divergence of rows of logits by the native or the Triton kernels, with its gradient.

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
    backend: str, student: Tensor, teacher: Tensor, mask: Tensor | None, vocab_size: int, *options: float
) -> Tensor:
    """[N, Vs], [N, Vt] with stride 1 along the vocabulary -> [N] in nats; differentiable in student."""
    if backend == "triton":
        return _triton_forward(student, teacher, mask, vocab_size, *options)[0]
    return torch.ops.minitron_kernels.kl_loss_forward(student, teacher, mask, vocab_size, *options)[0]


# custom_op reads the schema off the signature: these are the native ops' arguments
@torch.library.custom_op("minitron_kernels::kl_loss_forward_triton", mutates_args=())
def _triton_forward(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    vocab_size: int,
    beta: float,
    inv_tau: float,
    student_scale: float,
    student_softcap: float,
    teacher_scale: float,
    teacher_softcap: float,
) -> tuple[Tensor, Tensor]:
    from minitron_kernels.ops.kl_loss.kernel_triton import kl_loss_forward

    options = (beta, inv_tau, student_scale, student_softcap, teacher_scale, teacher_softcap)
    return kl_loss_forward(student, teacher, mask, vocab_size, *options)


@torch.library.custom_op("minitron_kernels::kl_loss_backward_triton", mutates_args=())
def _triton_backward(
    grad_loss: Tensor,
    stats: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    vocab_size: int,
    beta: float,
    inv_tau: float,
    student_scale: float,
    student_softcap: float,
    teacher_scale: float,
    teacher_softcap: float,
) -> Tensor:
    from minitron_kernels.ops.kl_loss.kernel_triton import kl_loss_backward

    options = (beta, inv_tau, student_scale, student_softcap, teacher_scale, teacher_softcap)
    return kl_loss_backward(grad_loss, stats, student, teacher, mask, vocab_size, *options)


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


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(NO_DOUBLE_BACKWARD.format("kl_loss"))


def _register(suffix: str) -> None:
    """Shapes and gradient of the ops kl_loss_forward and kl_loss_backward of a backend."""
    forward, backward = f"kl_loss_forward{suffix}", f"kl_loss_backward{suffix}"

    def gradient(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        student, teacher, mask, stats = ctx.saved_tensors
        grad = None
        if grad_loss is not None and ctx.needs_input_grad[0]:
            op = getattr(torch.ops.minitron_kernels, backward)
            weight = grad_loss.to(stats.dtype).contiguous()
            grad = op(weight, stats, student, teacher, mask, *ctx.rest)
        return (grad, *(None,) * (2 + len(ctx.rest)))

    torch.library.register_fake(f"minitron_kernels::{forward}", _fake_forward)
    torch.library.register_fake(f"minitron_kernels::{backward}", _fake_backward)
    torch.library.register_autograd(f"minitron_kernels::{forward}", gradient, setup_context=_setup_context)
    torch.library.register_autograd(f"minitron_kernels::{backward}", _no_double_backward)


_register("_triton")
if _native.available():
    _register("")
