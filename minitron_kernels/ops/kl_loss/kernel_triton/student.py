"""Kernels on the student's logits alone, whose teacher is known by a few numbers of a row, or elsewhere.

    student_stats  grid (N): merges a tile of the vocabulary into the running state (2, N) of its rows, max_s
                   and sum_s, and into that of their metrics. Each logit read once.
    student_grad   grid (N, blocks): each logit read once, each gradient written once, padding included.

As in rows.py: no atomics, offsets of rows are 64 bit, and new sizes recompile nothing.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from minitron_kernels.ops.kl_loss.kernel_triton.divergence import INF, LOWEST, block_mass, softcap_grad
from minitron_kernels.ops.kl_loss.kernel_triton.metrics import (
    at_temperature_one,
    block_metrics,
    empty_metrics,
    less_target,
    load_metric_state,
    merge_metrics,
    store_metric_state,
)
from minitron_kernels.ops.kl_loss.kernel_triton.rows import (
    counts_of,
    load_label,
    load_label_y,
    load_logits,
)

# A chunk of rows may start anywhere in these: their alignment is not a reason to compile anew.
PER_ROW = (
    "mask_ptr", "state_ptr", "labels_ptr", "metric_state_ptr", "weight_ptr", "lse_ptr", "lse_y_ptr",
    "ce_weight_ptr",
)  # fmt: skip


@triton.jit
def _merge_masses(a_max, a_sum, b_max, b_sum):
    """Maximum and sum of the tokens of both."""
    top = tl.maximum(a_max, b_max)
    base = tl.maximum(top, LOWEST)
    return top, a_sum * tl.exp(a_max - base) + b_sum * tl.exp(b_max - base)


@triton.jit(
    do_not_specialize=["stride_mn", "stride_state", "stride_ln", "stride_metric", "first_token"],
    do_not_specialize_on_alignment=PER_ROW,
)
def student_stats_kernel(
    student_ptr,  # (N, V) logits of a tile, stride 1 in the vocabulary
    student_bias_ptr,  # (V) or None
    mask_ptr,  # (N) uint8 or None
    state_ptr,  # (2, N) fp32, merged into; not read if FIRST
    labels_ptr,  # (N) int64 or None
    metric_state_ptr,  # (4, N) fp32 or None, likewise
    V, stride_sn, stride_mn, stride_state, s_factor, s_over_cap, s_cap,
    stride_ln, stride_metric, first_token, tau,
    FIRST: tl.constexpr, CAP_S: tl.constexpr, BLOCK_V: tl.constexpr,
    TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """Merges a tile into the states of its rows."""
    row = tl.program_id(0).to(tl.int64)
    end = tl.where(counts_of(mask_ptr, row, stride_mn), V, 0)
    student_ptr += row * stride_sn
    state_ptr += row + tl.arange(0, 1)
    max_s, sum_s = tl.full((1,), -float("inf"), tl.float32), tl.zeros((1,), tl.float32)
    sum_y, dot_y, total_y = empty_metrics(1)
    label_y = max_s
    if not FIRST:
        max_s, sum_s = tl.load(state_ptr), tl.load(state_ptr + stride_state)
    if metric_state_ptr is not None:
        metric_state_ptr += row + tl.arange(0, 1)
        every = tl.full((1,), True, tl.int1)
        if not FIRST:
            sum_y, dot_y, total_y, label_y = load_metric_state(
                metric_state_ptr, stride_metric, every, labels_ptr is not None, TEMPERED, SMOOTHED
            )
        if labels_ptr is not None:
            of_tile = load_label_y(
                student_ptr, student_bias_ptr, load_label(labels_ptr, row, stride_ln, first_token, end),
                s_factor, s_over_cap, s_cap, tau, CAP_S, TEMPERED,
            )  # fmt: skip
            label_y = tl.maximum(label_y, of_tile)
    for begin in range(0, end, BLOCK_V):
        offs_v = begin + tl.arange(0, BLOCK_V)[None, :]
        s = load_logits(
            student_ptr, student_bias_ptr, offs_v, offs_v < end, s_factor, s_over_cap, s_cap, CAP_S
        )
        b_max_s, e_s, b_sum_s = block_mass(s)
        a_max_s, a_sum_y = max_s, sum_y if TEMPERED else sum_s
        max_s, sum_s = _merge_masses(max_s, sum_s, b_max_s, b_sum_s)
        if metric_state_ptr is not None:
            b_sum_y, b_dot_y, b_total_y = block_metrics(
                s, e_s, b_max_s, b_sum_s, s != -INF, tau, TEMPERED, SMOOTHED
            )  # total_y is without tokens that are taken out
            merged, dot_y = merge_metrics(
                max_s, a_max_s, a_sum_y, dot_y, b_max_s, b_sum_y, b_dot_y, tau, TEMPERED
            )
            total_y += b_total_y
            if TEMPERED:  # else it is sum_s
                sum_y = merged
    tl.store(state_ptr, max_s)
    tl.store(state_ptr + stride_state, sum_s)
    if metric_state_ptr is not None:
        if not TEMPERED:
            sum_y = sum_s
        store_metric_state(metric_state_ptr, stride_metric, every, sum_y, dot_y, total_y, label_y)


@triton.jit(
    do_not_specialize=[
        "stride_mn", "stride_wn", "stride_lse", "stride_ln", "stride_lse_y", "stride_cn", "first_token"
    ],
    do_not_specialize_on_alignment=PER_ROW,
)  # fmt: skip
def student_grad_kernel(
    student_ptr,  # (N, >= V) logits of a tile, stride 1 in the vocabulary
    student_bias_ptr,  # (V) or None
    mask_ptr,  # (N) uint8 or None
    weight_ptr,  # (N) fp32, the gradient of each row's lse
    lse_ptr,  # (N) fp32, log sum exp s
    grad_ptr,  # (N, columns), of any dtype
    labels_ptr,  # (N) int64 or None
    lse_y_ptr,  # (N) fp32, log sum exp y; None where it is lse
    ce_weight_ptr,  # (N) fp32 or None, the gradient of each row's cross-entropy
    V, columns, stride_sn, stride_mn, stride_wn, stride_lse, stride_gn, s_factor, s_over_cap, s_cap,
    stride_ln, stride_lse_y, stride_cn, first_token, tau, smoothing, inv_vocab,
    CAP_S: tl.constexpr, BLOCK_V: tl.constexpr, TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """The gradient of sum(weight * lse + ce_weight * cross-entropy) to the raw student logits."""
    row = tl.program_id(0).to(tl.int64)
    counts = counts_of(mask_ptr, row, stride_mn)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (offs_v < V) & counts
    student_ptr += row * stride_sn
    s = load_logits(student_ptr, student_bias_ptr, offs_v, inside, s_factor, s_over_cap, s_cap, CAP_S)
    lse = tl.load(lse_ptr + row * stride_lse)
    weight = tl.load(weight_ptr + row * stride_wn)
    p_s = tl.exp(s - lse)
    if ce_weight_ptr is None:
        grad = p_s * weight
    else:
        p_y = p_s
        if lse_y_ptr is not None:
            lse_y = tl.load(lse_y_ptr + row * stride_lse_y)
            p_y = tl.exp(at_temperature_one(s, tau, TEMPERED) - lse_y)
            p_y = tl.where(lse_y == -INF, 0.0, p_y)
        is_label = offs_v == load_label(labels_ptr, row, stride_ln, first_token, V)
        of_y = less_target(p_y, is_label, smoothing, inv_vocab, SMOOTHED)
        ce_weight = at_temperature_one(tl.load(ce_weight_ptr + row * stride_cn), tau, TEMPERED)
        grad = tl.where(weight == 0.0, 0.0, p_s * weight)
    grad = tl.where(lse == -INF, 0.0, grad)  # no token has any mass
    if ce_weight_ptr is not None:
        grad += of_y * ce_weight
    grad *= softcap_grad(s, s_factor, s_cap, CAP_S)
    # a masked-out token gets none, and s is -inf in padding too
    grad = tl.where(s == -INF, 0.0, grad)
    tl.store(grad_ptr + row * stride_gn + offs_v, grad.to(grad_ptr.dtype.element_ty), mask=offs_v < columns)
