"""The fused linear + stats kernel of linear_kl_loss: logits that exist only in registers.

    linear_kernel   grid (blocks of rows * splits of the vocabulary): for each tile of its split, both logits
                    are made by tl.dot from hidden states and heads, in fp32, reduced to the state of their
                    rows and dropped. Reads hidden states and heads, writes (splits, 5, N), and for
                    metrics (splits, 4, N).
                    With final stats given it adds up JSD's terms instead, in a second run: (splits, 2, N).
    finish_stats    grid (blocks of rows): states or sums of the splits, merged in order -> loss, stats,
                    metrics.
    finish_mixture

Programs that run together are those of all splits of a group of blocks of rows: the hidden states of a group
stay in L2 over all tiles, and the tile of the heads that a split is at is read from memory once a group. With
all blocks of rows at once, a few thousand rows of hidden states would leave L2 between two tiles.

A tile is 128 x 128 at most: its two accumulators in fp32 are half of a multiprocessor's registers, and with
128 x 256 they would be all.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from minitron_kernels.ops.kl_loss.kernel_triton.divergence import (
    INF,
    block_kl,
    block_mass,
    block_masses,
    empty_state,
    merge_states,
    mixture_terms,
    row_stats,
    transform,
)
from minitron_kernels.ops.kl_loss.kernel_triton.metrics import (
    block_metrics,
    empty_metrics,
    label_in,
    load_metric_state,
    merge_metrics,
    row_metrics,
    store_metric_state,
    store_metrics,
)
from minitron_kernels.ops.kl_loss.kernel_triton.rows import store_stats


@triton.jit
def _logits(
    hidden_ptr, head_ptr, bias_ptr, rows, N, offs_v, V, H, stride_xn, stride_wv, factor, over_cap, cap,
    CAP: tl.constexpr, EVEN_H: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Transformed logits (BLOCK_N, BLOCK_V), -inf beyond the vocabulary; rows beyond N repeat the last."""
    offs_h = tl.arange(0, BLOCK_H)
    x_ptrs = hidden_ptr + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * stride_xn + offs_h[None, :]
    w_ptrs = head_ptr + tl.minimum(offs_v, V - 1).to(tl.int64)[:, None] * stride_wv + offs_h[None, :]
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for begin in range(0, H, BLOCK_H):
        if EVEN_H:
            x, w = tl.load(x_ptrs), tl.load(w_ptrs)
        else:
            inside = (offs_h < H - begin)[None, :]
            x, w = tl.load(x_ptrs, mask=inside, other=0.0), tl.load(w_ptrs, mask=inside, other=0.0)
        z = tl.dot(x, tl.trans(w), z)
        x_ptrs += BLOCK_H
        w_ptrs += BLOCK_H
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
    return tl.where((offs_v < V)[None, :], transform(z, factor, over_cap, cap, CAP), -INF)


@triton.jit(
    do_not_specialize=["N", "splits", "tiles_per_split", "stride_ln"],
    do_not_specialize_on_alignment=["labels_ptr"],
)
def linear_kernel(
    student_ptr,  # (N, H), stride 1 in H
    student_head_ptr,  # (>= V, H), likewise
    student_bias_ptr,  # (V) or None
    teacher_ptr,  # (N, Ht)
    teacher_head_ptr,  # (>= V, Ht)
    teacher_bias_ptr,  # (V) or None
    stats_ptr,  # (N, 6) fp32; None in the first run
    out_ptr,  # (splits, 5, N) fp32; (splits, 2, N) with stats
    labels_ptr,  # (N) int64 or None
    metric_out_ptr,  # (splits, 4, N) fp32 or None
    N, V, H, Ht, stride_sn, stride_swv, stride_tn, stride_twv, splits, tiles_per_split,
    s_factor, s_over_cap, s_cap, t_factor, t_over_cap, t_cap, share_s, share_t, stride_ln, tau,
    DIVERGENCE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr,
    EVEN_S: tl.constexpr, EVEN_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
    TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """States of rows over a split of the vocabulary, or with stats given their sums for JSD."""
    group, place = tl.program_id(0) // (GROUP * splits), tl.program_id(0) % (GROUP * splits)
    blocks = tl.minimum(tl.cdiv(N, BLOCK_N) - group * GROUP, GROUP)  # the last group may have fewer
    split = place // blocks
    rows = (group * GROUP + place % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(V, BLOCK_V))
    inside = rows < N
    if stats_ptr is None:
        max_s, sum_s, max_t, sum_t, kl = empty_state(BLOCK_N)
        sum_y, dot_y, total_y = empty_metrics(BLOCK_N)
        label_y = max_s
        if labels_ptr is not None:
            label = tl.load(labels_ptr + rows.to(tl.int64) * stride_ln, mask=inside, other=-1)
            label = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)
    else:
        row_ptr = stats_ptr + rows.to(tl.int64) * 6
        max_s, inv_sum_s = tl.load(row_ptr, mask=inside), tl.load(row_ptr + 1, mask=inside)
        max_t, inv_sum_t = tl.load(row_ptr + 2, mask=inside), tl.load(row_ptr + 3, mask=inside)
        lse_diff = tl.load(row_ptr + 4, mask=inside)
        of_teacher = tl.zeros((BLOCK_N,), tl.float32)
        of_student = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(first, last):
        offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        s = _logits(
            student_ptr, student_head_ptr, student_bias_ptr, rows, N, offs_v, V, H, stride_sn, stride_swv,
            s_factor, s_over_cap, s_cap, CAP_S, EVEN_S, BLOCK_N, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        if metric_out_ptr is not None:  # before the registers hold the teacher's logits too
            if labels_ptr is not None:
                is_label = offs_v[None, :] == label[:, None]
                label_y = tl.maximum(label_y, label_in(s, is_label, tau, TEMPERED))
            b_max_s, e_s, b_sum_s = block_mass(s)
            b_sum_y, b_dot_y, b_total_y = block_metrics(
                s, e_s, b_max_s, b_sum_s, (offs_v < V)[None, :], tau, TEMPERED, SMOOTHED
            )
        t = _logits(
            teacher_ptr, teacher_head_ptr, teacher_bias_ptr, rows, N, offs_v, V, Ht, stride_tn, stride_twv,
            t_factor, t_over_cap, t_cap, CAP_T, EVEN_T, BLOCK_N, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        if stats_ptr is None:
            if metric_out_ptr is None:
                b_max_s, e_s, b_sum_s, b_max_t, e_t, b_sum_t = block_masses(s, t)
            else:
                b_max_t, e_t, b_sum_t = block_mass(t)
            b_kl = block_kl(s, e_s, b_max_s, b_sum_s, t, e_t, b_max_t, b_sum_t, DIVERGENCE, KEEP_EXP=False)
            a_max_s, a_sum_y = max_s, sum_y if TEMPERED else sum_s
            max_s, sum_s, max_t, sum_t, kl = merge_states(
                max_s, sum_s, max_t, sum_t, kl, b_max_s, b_sum_s, b_max_t, b_sum_t, b_kl, DIVERGENCE
            )
            if metric_out_ptr is not None:
                merged, dot_y = merge_metrics(
                    max_s, a_max_s, a_sum_y, dot_y, b_max_s, b_sum_y, b_dot_y, tau, TEMPERED
                )
                total_y += b_total_y
                if TEMPERED:  # else it is sum_s
                    sum_y = merged
        else:
            s, t = s - max_s[:, None], t - max_t[:, None]
            d = (t - s) + lse_diff[:, None]
            a, b = mixture_terms(s, t, d, inv_sum_s[:, None], inv_sum_t[:, None], share_s, share_t)
            in_vocab = (offs_v < V)[None, :]
            of_teacher += tl.sum(tl.where(in_vocab, a, 0.0), 1)
            of_student += tl.sum(tl.where(in_vocab, b, 0.0), 1)
    stride = N.to(tl.int64)
    if stats_ptr is None:
        out = out_ptr + split * 5 * stride + rows
        tl.store(out, max_s, mask=inside)
        tl.store(out + stride, sum_s, mask=inside)
        tl.store(out + 2 * stride, max_t, mask=inside)
        tl.store(out + 3 * stride, sum_t, mask=inside)
        tl.store(out + 4 * stride, kl, mask=inside)
        if metric_out_ptr is not None:
            if not TEMPERED:
                sum_y = sum_s
            metric_out = metric_out_ptr + split * 4 * stride + rows
            store_metric_state(metric_out, stride, inside, sum_y, dot_y, total_y, label_y)
    else:
        out = out_ptr + split * 2 * stride + rows
        tl.store(out, of_teacher, mask=inside)
        tl.store(out + stride, of_student, mask=inside)


@triton.jit(
    do_not_specialize=["N", "splits", "stride_mn"],
    do_not_specialize_on_alignment=["metric_states_ptr"],  # they may lie behind states of N rows
)
def finish_stats_kernel(
    states_ptr,  # (splits, 5, N) fp32
    mask_ptr,  # (N) uint8 or None
    loss_ptr,  # (N) fp32
    stats_ptr,  # (N, 6) fp32
    metric_states_ptr,  # (splits, 4, N) fp32 or None
    metrics_ptr,  # (N, 4) fp32 or None
    N, splits, stride_mn, tau, smoothing, inv_vocab, DIVERGENCE: tl.constexpr, BLOCK_N: tl.constexpr,
    LABELED: tl.constexpr, TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """Merges the splits of states into loss, stats and metrics."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    stride = N.to(tl.int64)
    max_s, sum_s, max_t, sum_t, kl = empty_state(BLOCK_N)
    sum_y, dot_y, total_y = empty_metrics(BLOCK_N)
    label_y = max_s
    for split in range(splits):
        part = states_ptr + split * 5 * stride + rows
        a_max_s, b_max_s = max_s, tl.load(part, mask=inside, other=0.0)
        max_s, sum_s, max_t, sum_t, kl = merge_states(
            max_s, sum_s, max_t, sum_t, kl,
            b_max_s, tl.load(part + stride, mask=inside, other=0.0),
            tl.load(part + 2 * stride, mask=inside, other=0.0),
            tl.load(part + 3 * stride, mask=inside, other=0.0),
            tl.load(part + 4 * stride, mask=inside, other=0.0), DIVERGENCE,
        )  # fmt: skip
        if metric_states_ptr is not None:
            b_sum_y, b_dot_y, b_total_y, b_label_y = load_metric_state(
                metric_states_ptr + split * 4 * stride + rows, stride, inside, LABELED, True, SMOOTHED
            )
            sum_y, dot_y = merge_metrics(
                max_s, a_max_s, sum_y, dot_y, b_max_s, b_sum_y, b_dot_y, tau, TEMPERED
            )
            total_y += b_total_y
            label_y = tl.maximum(label_y, b_label_y)
    inv_sum_s, inv_sum_t, lse_diff, loss, kl = row_stats(max_s, sum_s, max_t, sum_t, kl, DIVERGENCE)
    counts = inside
    if mask_ptr is not None:
        counts = tl.load(mask_ptr + rows * stride_mn, mask=inside, other=0) != 0
    tl.store(loss_ptr + rows, tl.where(counts, loss, 0.0), mask=inside)
    store_stats(stats_ptr, rows, inside, counts, max_s, inv_sum_s, max_t, inv_sum_t, lse_diff, kl)
    if metric_states_ptr is not None:
        inv_sum_y, ce, entropy, label_logprob = row_metrics(
            max_s, sum_y, dot_y, total_y, label_y, smoothing, inv_vocab, tau, LABELED, TEMPERED, SMOOTHED
        )
        store_metrics(metrics_ptr, rows, inside, counts, inv_sum_y, ce, entropy, label_logprob)


@triton.jit(do_not_specialize=["N", "splits", "stride_mn"])
def finish_mixture_kernel(
    sums_ptr,  # (splits, 2, N) fp32
    mask_ptr,  # (N) uint8 or None
    loss_ptr,  # (N) fp32
    stats_ptr,  # (N, 6) fp32, whose kl is written
    N, splits, stride_mn, share_s, share_t, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds up the splits of JSD's sums: the loss, and the kl of stats."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    stride = N.to(tl.int64)
    of_teacher = tl.zeros((BLOCK_N,), tl.float32)
    of_student = tl.zeros((BLOCK_N,), tl.float32)
    for split in range(splits):
        part = sums_ptr + split * 2 * stride + rows
        of_teacher += tl.load(part, mask=inside, other=0.0)
        of_student += tl.load(part + stride, mask=inside, other=0.0)
    counts = inside
    if mask_ptr is not None:
        counts = tl.load(mask_ptr + rows * stride_mn, mask=inside, other=0) != 0
    loss = share_t * of_teacher + share_s * of_student
    tl.store(loss_ptr + rows, tl.where(counts, loss, 0.0), mask=inside)
    tl.store(stats_ptr + rows * 6 + 5, tl.where(counts, of_student, 0.0), mask=inside)
