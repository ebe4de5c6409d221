"""The kernels on fp32 tiles of logits that the GPU schedules of linear_kl_loss are made of, by backend.

A tile of logits is (student [N, V], teacher [N, V], and the bias of each, float32 [V] or None).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Epilogues:
    """Kernels on fp32 tiles of logits; see csrc/kl_loss/kl_loss.cpp for what each takes and writes.

    The first argument is the tile; for student_stats and student_grad its student's logits, then its bias.
    """

    forward: Callable[..., None]
    grad: Callable[..., None]
    forward_grad: Callable[..., None]  # forward and grad of rows whose stats are not known
    tile_stats: Callable[..., None]
    tile_mixture: Callable[..., None]
    finish_stats: Callable[..., None]
    finish_mixture: Callable[..., None]
    student_stats: Callable[..., None]  # tile_stats and grad of the student alone
    student_grad: Callable[..., None]
    linear_stats: Callable[..., None] | None = None  # stats without logits in memory, where there is such


def triton_epilogues() -> Epilogues:
    """The Triton kernels."""
    from minitron_kernels.ops.kl_loss.kernel_triton import launch as k
    from minitron_kernels.ops.kl_loss.kernel_triton import launch_linear, launch_student

    return Epilogues(
        k.forward,
        k.grad,
        k.forward_grad,
        k.tile_stats,
        k.tile_mixture,
        launch_linear.finish_stats,
        launch_linear.finish_mixture,
        launch_student.student_stats,
        launch_student.student_grad,
        launch_linear.linear_stats,
    )


def native_epilogues(ops: Any = None) -> Epilogues:
    """The CUDA C++ kernels, and nothing else: no linear_stats, so that no call needs triton.

    Args:
        ops: the namespace of torch.ops that they are registered in; the library's own by default.
    """
    k = torch.ops.minitron_kernels if ops is None else ops

    def on_logits(op: Callable[..., None]) -> Callable[..., None]:
        return lambda logits, *rest, **more: op(*logits, *rest, **more)

    return Epilogues(
        forward=on_logits(k.kl_tile_forward_),
        grad=on_logits(k.kl_tile_grad_),
        forward_grad=on_logits(k.kl_tile_forward_grad_),
        tile_stats=on_logits(k.kl_tile_stats_),
        tile_mixture=on_logits(k.kl_tile_mixture_),
        finish_stats=k.kl_finish_stats_,
        finish_mixture=k.kl_finish_mixture_,
        student_stats=k.kl_student_stats_,
        student_grad=k.kl_student_grad_,
    )


# by the name that pick() returns
EPILOGUES = {"native": native_epilogues, "triton": triton_epilogues}
