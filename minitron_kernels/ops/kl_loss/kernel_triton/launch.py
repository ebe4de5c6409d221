"""Launchers of the Triton kernels on logits in memory, for CUDA and ROCm tensors.

kl_loss_forward(), kl_loss_forward_metrics() and kl_loss_backward() serve the ops of these names, the rest is
what linear_gpu.py is made of; csrc/kl_loss/kl_loss.cpp says what each takes and writes. None waits for the
GPU; all allocate from torch's allocator on the current stream.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from minitron_kernels.ops.kl_loss.divergence import NUM_METRICS, NUM_STATS
from minitron_kernels.ops.kl_loss.kernel_triton.arguments import (
    OfLabels,
    Options,
    block_of,
    check_dtypes,
    kernel_options,
    mask_of,
    stride_of,
)
from minitron_kernels.ops.kl_loss.kernel_triton.rows import (
    forward_kernel,
    grad_kernel,
    tile_mixture_kernel,
    tile_stats_kernel,
)

FORWARD_BLOCK, GRAD_BLOCK = 4096, 2048

Logits = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # student, teacher, and the bias of each


def forward(
    logits: Logits,
    mask: Tensor | None,
    loss: Tensor,
    stats: Tensor,
    vocab_size: int,
    options: Options,
    labels: Tensor | None = None,
    metrics: Tensor | None = None,
) -> None:
    """Writes loss [N], stats [N, 6] and metrics [N, 4] of whole rows of logits."""
    student, teacher, *biases = logits
    if student.shape[0] == 0:
        return
    mask_bytes, mask_stride = mask_of(mask)
    o = kernel_options(*options)
    of = OfLabels.of(metrics is not None, labels, o, vocab_size)
    with torch.cuda.device_of(student):
        forward_kernel[(student.shape[0],)](
            student, teacher, *biases, mask_bytes, loss, stats, of.labels, metrics,
            vocab_size, student.stride(0), teacher.stride(0), mask_stride,
            *o.floats, *o.shares, of.stride, o.tau, *of.smoothing,
            DIVERGENCE=o.divergence, **o.caps, **of.kinds, **block_of(vocab_size, FORWARD_BLOCK),
        )  # fmt: skip


def grad(
    logits: Logits,
    mask: Tensor | None,
    weight: Tensor,
    stats: Tensor,
    out: Tensor,
    vocab_size: int,
    options: Options,
    labels: Tensor | None = None,
    metrics: Tensor | None = None,
    ce_weight: Tensor | None = None,
    first_token: int = 0,
    total_vocab: int = 0,
) -> None:
    """Writes the gradient of sum(weight * loss + ce_weight * cross-entropy) to the raw student logits.

    0 from column vocab_size on. ce_weight needs labels, and metrics that the forward wrote.
    """
    student, teacher, *biases = logits
    rows, columns = out.shape
    if rows == 0:
        return
    mask_bytes, mask_stride = mask_of(mask)
    block = block_of(columns, GRAD_BLOCK)
    o = kernel_options(*options)
    of = OfLabels.of(ce_weight is not None, labels, o, total_vocab or vocab_size)
    with torch.cuda.device_of(student):
        grad_kernel[(rows, triton.cdiv(columns, block["BLOCK_V"]))](
            student, teacher, *biases, mask_bytes, weight, stats, out,
            of.labels, metrics if of.kinds["TEMPERED"] else None, ce_weight,
            vocab_size, columns, student.stride(0), teacher.stride(0), mask_stride, weight.stride(0),
            out.stride(0), *o.floats, *o.shares,
            of.stride, stride_of(ce_weight), first_token, o.tau, *of.smoothing,
            DIVERGENCE=o.divergence, **o.caps, **of.kinds, **block,
        )  # fmt: skip


def forward_grad(
    logits: Logits,
    mask: Tensor | None,
    weight: Tensor,
    loss: Tensor,
    stats: Tensor,
    out: Tensor,
    vocab_size: int,
    options: Options,
    labels: Tensor | None = None,
    metrics: Tensor | None = None,
    ce_weight: Tensor | None = None,
) -> None:
    """forward(), then grad() with the stats and metrics that it wrote."""
    forward(logits, mask, loss, stats, vocab_size, options, labels, metrics)
    grad(logits, mask, weight, stats, out, vocab_size, options, labels, metrics, ce_weight)


def tile_stats(
    logits: Logits,
    mask: Tensor | None,
    state: Tensor,
    first: bool,
    options: Options,
    labels: Tensor | None = None,
    metric_state: Tensor | None = None,
    first_token: int = 0,
) -> None:
    """Merges a tile of the vocabulary into the state [5, N] and the metric_state [4, N] of its rows.

    `first` starts them.
    """
    student, teacher, *biases = logits
    rows, columns = student.shape
    if rows == 0:
        return
    mask_bytes, mask_stride = mask_of(mask)
    o = kernel_options(*options)
    of = OfLabels.of(metric_state is not None, labels, o)
    with torch.cuda.device_of(student):
        tile_stats_kernel[(rows,)](
            student, teacher, *biases, mask_bytes, state, of.labels, metric_state,
            columns, student.stride(0), teacher.stride(0), mask_stride, state.stride(0),
            *o.floats, of.stride, stride_of(metric_state), first_token, o.tau,
            FIRST=first, DIVERGENCE=o.divergence, **o.caps, **of.kinds, **block_of(columns, FORWARD_BLOCK),
        )  # fmt: skip


def tile_mixture(
    logits: Logits, mask: Tensor | None, stats: Tensor, sums: Tensor, first: bool, options: Options
) -> None:
    """Adds a tile's terms of JSD to the sums [2, N] of its rows; `first` starts them."""
    student, teacher, *biases = logits
    rows, columns = student.shape
    if rows == 0:
        return
    mask_bytes, mask_stride = mask_of(mask)
    o = kernel_options(*options)
    with torch.cuda.device_of(student):
        tile_mixture_kernel[(rows,)](
            student, teacher, *biases, mask_bytes, stats, sums,
            columns, student.stride(0), teacher.stride(0), mask_stride, sums.stride(0),
            *o.floats, *o.shares,
            FIRST=first, **o.caps, **block_of(columns, FORWARD_BLOCK),
        )  # fmt: skip


def kl_loss_forward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    vocab_size: int,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """The op kl_loss_forward: loss [N] and stats [N, 6]."""
    loss, stats = _outputs(student_logits, teacher_logits)
    forward((student_logits, teacher_logits, None, None), mask, loss, stats, vocab_size, options)
    return loss, stats


def kl_loss_forward_metrics(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    vocab_size: int,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op kl_loss_forward_metrics: these and metrics [N, 4]."""
    loss, stats = _outputs(student_logits, teacher_logits)
    metrics = stats.new_empty((stats.shape[0], NUM_METRICS))
    logits = (student_logits, teacher_logits, None, None)
    forward(logits, mask, loss, stats, vocab_size, options, labels, metrics)
    return loss, stats, metrics


def _outputs(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    check_dtypes(student_logits=student_logits, teacher_logits=teacher_logits)
    rows = student_logits.shape[0]
    loss = student_logits.new_empty(rows, dtype=torch.float32)
    return loss, loss.new_empty((rows, NUM_STATS))


def kl_loss_backward(
    grad_loss: Tensor,
    stats: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    vocab_size: int,
    options: Options,
    labels: Tensor | None = None,
    metrics: Tensor | None = None,
    ce_weight: Tensor | None = None,
) -> Tensor:
    """The op kl_loss_backward: the gradient to student_logits."""
    out = student_logits.new_empty(student_logits.shape)
    logits = (student_logits, teacher_logits, None, None)
    grad(logits, mask, grad_loss, stats, out, vocab_size, options, labels, metrics, ce_weight)
    return out
