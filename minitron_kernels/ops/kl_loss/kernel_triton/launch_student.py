"""Launchers of the Triton kernels on the student's logits alone; as in launch.py, none waits for the GPU."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from minitron_kernels.ops.kl_loss.kernel_triton.arguments import (
    OfLabels,
    Options,
    block_of,
    kernel_options,
    mask_of,
    stride_of,
)
from minitron_kernels.ops.kl_loss.kernel_triton.student import student_grad_kernel, student_stats_kernel

STATS_BLOCK, GRAD_BLOCK = 4096, 2048


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether they are one tensor, or the same part of one."""
    return a is b or (a.data_ptr() == b.data_ptr() != 0 and a.stride() == b.stride())


def student_stats(
    student: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    state: Tensor,
    first: bool,
    options: Options,
    labels: Tensor | None = None,
    metric_state: Tensor | None = None,
    first_token: int = 0,
) -> None:
    """Merges a tile of the vocabulary into the state [2, N] and the metric_state [4, N] of its rows.

    `first` starts them.
    """
    rows, columns = student.shape
    if rows == 0:
        return
    mask_bytes, mask_stride = mask_of(mask)
    o = kernel_options(*options)
    of = OfLabels.of(metric_state is not None, labels, o)
    with torch.cuda.device_of(student):
        student_stats_kernel[(rows,)](
            student, bias, mask_bytes, state, of.labels, metric_state,
            columns, student.stride(0), mask_stride, state.stride(0), *o.floats[:3],
            of.stride, stride_of(metric_state), first_token, o.tau,
            FIRST=first, CAP_S=o.caps["CAP_S"], **of.kinds, **block_of(columns, STATS_BLOCK),
        )  # fmt: skip


def student_grad(
    student: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    weight: Tensor,
    lse: Tensor,
    out: Tensor,
    vocab_size: int,
    options: Options,
    labels: Tensor | None = None,
    lse_y: Tensor | None = None,
    ce_weight: Tensor | None = None,
    first_token: int = 0,
    total_vocab: int = 0,
) -> None:
    """Writes the gradient of sum(weight * lse + ce_weight * cross-entropy) to the raw student logits.

    0 from column vocab_size on. ce_weight needs labels and lse_y; at temperature 1 an lse_y that is lse, or
    None, spares the second exponential.
    """
    rows, columns = out.shape
    if rows == 0:
        return
    mask_bytes, mask_stride = mask_of(mask)
    block = block_of(columns, GRAD_BLOCK)
    o = kernel_options(*options)
    of = OfLabels.of(ce_weight is not None, labels, o, total_vocab or vocab_size)
    same = ce_weight is None or (o.tau == 1 and (lse_y is None or _same(lse_y, lse)))
    with torch.cuda.device_of(student):
        student_grad_kernel[(rows, triton.cdiv(columns, block["BLOCK_V"]))](
            student, bias, mask_bytes, weight, lse, out, of.labels, None if same else lse_y, ce_weight,
            vocab_size, columns, student.stride(0), mask_stride, weight.stride(0), lse.stride(0),
            out.stride(0), *o.floats[:3], of.stride, stride_of(lse_y), stride_of(ce_weight), first_token,
            o.tau, *of.smoothing,
            CAP_S=o.caps["CAP_S"], **of.kinds, **block,
        )  # fmt: skip
