"""Epilogues on logits in memory: rows of kl_loss and linear_kl_loss, or tiles of the vocabulary.

    forward       grid (N): one program a row, block after block, each logit read once (for JSD twice: M is
                  known only after the sums). Writes loss and stats.
    grad          grid (N, blocks): each logit read once, each gradient written once, padding included. Also
                  dz of linear_kl_loss, in the dtype of its GEMMs.
    tile_stats    grid (N): merges a tile of linear_kl_loss into the running state (5, N) of its rows.
    tile_mixture  grid (N): adds a tile's JSD terms to the running sums (2, N), from final stats.

Without labels, metrics and ce_weight (None) nothing is compiled for them. With them no logit is read twice,
but for a row's label: one element more.

Offsets of rows are 64 bit. Only tiling and flags are constexpr, so new N and V recompile nothing (but for
whether they are divisible by 16). No atomics: bitwise equal from run to run.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from minitron_kernels.ops.kl_loss.kernel_triton.divergence import (
    INF,
    JSD,
    block_kl,
    block_masses,
    empty_state,
    grad_of_s,
    log_ratio,
    merge_states,
    mixture_terms,
    row_stats,
    softcap_grad,
    transform,
)
from minitron_kernels.ops.kl_loss.kernel_triton.metrics import (
    at_temperature_one,
    block_metrics,
    empty_metrics,
    less_target,
    load_metric_state,
    merge_metrics,
    row_metrics,
    store_metric_state,
    store_metrics,
)

# A chunk of rows may start anywhere in these: their alignment is not a reason to compile anew.
PER_ROW = (
    "mask_ptr", "weight_ptr", "loss_ptr", "stats_ptr", "state_ptr", "sums_ptr",
    "labels_ptr", "metrics_ptr", "metric_state_ptr", "ce_weight_ptr",
)  # fmt: skip


@triton.jit
def load_logits(ptr, bias_ptr, columns, inside, factor, over_cap, cap, CAP: tl.constexpr):
    """Transformed logits of some columns of a row, -inf where not inside."""
    z = tl.load(ptr + columns, mask=inside, other=-INF).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return transform(z, factor, over_cap, cap, CAP)


@triton.jit
def counts_of(mask_ptr, row, stride_mn):
    """Whether the row is a valid token's; its logits are not read otherwise."""
    counts = True
    if mask_ptr is not None:
        counts = tl.load(mask_ptr + row * stride_mn) != 0
    return counts


@triton.jit
def load_label(labels_ptr, row, stride_ln, first_token, end):
    """The column of a row's label, [1]; -1 where it is not one of the columns 0 .. end."""
    label = tl.load(labels_ptr + row * stride_ln + tl.arange(0, 1)) - first_token
    return tl.where((label >= 0) & (label < end), label, -1).to(tl.int32)


@triton.jit
def load_label_y(
    ptr, bias_ptr, label, factor, over_cap, cap, tau, CAP: tl.constexpr, TEMPERED: tl.constexpr
):  # fmt: skip
    """y of a label that load_label() found, else -inf."""
    s = load_logits(ptr, bias_ptr, label, label >= 0, factor, over_cap, cap, CAP)
    return at_temperature_one(s, tau, TEMPERED)


@triton.jit
def _merge_row(
    student_ptr, teacher_ptr, student_bias_ptr, teacher_bias_ptr, end,
    max_s, sum_s, max_t, sum_t, kl, sum_y, dot_y, total_y,
    s_factor, s_over_cap, s_cap, t_factor, t_over_cap, t_cap, tau,
    DIVERGENCE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK_V: tl.constexpr,
    METRICS: tl.constexpr, TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """The state after the tokens 0 .. end of one row, and that of its metrics."""
    for begin in range(0, end, BLOCK_V):
        offs_v = begin + tl.arange(0, BLOCK_V)[None, :]
        s = load_logits(
            student_ptr, student_bias_ptr, offs_v, offs_v < end, s_factor, s_over_cap, s_cap, CAP_S
        )
        t = load_logits(
            teacher_ptr, teacher_bias_ptr, offs_v, offs_v < end, t_factor, t_over_cap, t_cap, CAP_T
        )
        b_max_s, e_s, b_sum_s, b_max_t, e_t, b_sum_t = block_masses(s, t)
        if METRICS:
            b_sum_y, b_dot_y, b_total_y = block_metrics(
                s, e_s, b_max_s, b_sum_s, offs_v < end, tau, TEMPERED, SMOOTHED
            )
        b_kl = block_kl(s, e_s, b_max_s, b_sum_s, t, e_t, b_max_t, b_sum_t, DIVERGENCE, KEEP_EXP=True)
        a_max_s, a_sum_y = max_s, sum_y if TEMPERED else sum_s
        max_s, sum_s, max_t, sum_t, kl = merge_states(
            max_s, sum_s, max_t, sum_t, kl, b_max_s, b_sum_s, b_max_t, b_sum_t, b_kl, DIVERGENCE
        )
        if METRICS:
            merged, dot_y = merge_metrics(
                max_s, a_max_s, a_sum_y, dot_y, b_max_s, b_sum_y, b_dot_y, tau, TEMPERED
            )
            total_y += b_total_y
            if TEMPERED:  # else it is sum_s
                sum_y = merged
    if METRICS and not TEMPERED:
        sum_y = sum_s
    return max_s, sum_s, max_t, sum_t, kl, sum_y, dot_y, total_y


@triton.jit
def _mixture_row(
    student_ptr, teacher_ptr, student_bias_ptr, teacher_bias_ptr, end,
    max_s, inv_sum_s, max_t, inv_sum_t, lse_diff, share_s, share_t,
    s_factor, s_over_cap, s_cap, t_factor, t_over_cap, t_cap,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """KL(T || M) and KL(S || M) of the tokens 0 .. end of one row, last block first: it is still in cache."""
    of_teacher = tl.zeros((1,), tl.float32)
    of_student = tl.zeros((1,), tl.float32)
    for done in range(0, end, BLOCK_V):
        begin = (end - 1 - done) // BLOCK_V * BLOCK_V
        offs_v = begin + tl.arange(0, BLOCK_V)[None, :]
        inside = offs_v < end
        s = load_logits(student_ptr, student_bias_ptr, offs_v, inside, s_factor, s_over_cap, s_cap, CAP_S)
        t = load_logits(teacher_ptr, teacher_bias_ptr, offs_v, inside, t_factor, t_over_cap, t_cap, CAP_T)
        d = log_ratio(s, t, max_s, max_t, lse_diff)
        a, b = mixture_terms(s - max_s, t - max_t, d, inv_sum_s, inv_sum_t, share_s, share_t)
        of_teacher += tl.sum(tl.where(inside, a, 0.0), 1)
        of_student += tl.sum(tl.where(inside, b, 0.0), 1)
    return of_teacher, of_student


@triton.jit
def store_stats(stats_ptr, rows, inside, counts, max_s, inv_sum_s, max_t, inv_sum_t, lse_diff, kl):
    """Writes stats [N, 6] of some rows; zeros where they do not count."""
    out = stats_ptr + rows * 6
    tl.store(out, tl.where(counts, max_s, 0.0), mask=inside)
    tl.store(out + 1, tl.where(counts, inv_sum_s, 0.0), mask=inside)
    tl.store(out + 2, tl.where(counts, max_t, 0.0), mask=inside)
    tl.store(out + 3, tl.where(counts, inv_sum_t, 0.0), mask=inside)
    tl.store(out + 4, tl.where(counts, lse_diff, 0.0), mask=inside)
    tl.store(out + 5, tl.where(counts, kl, 0.0), mask=inside)


@triton.jit(do_not_specialize=["stride_mn", "stride_ln"], do_not_specialize_on_alignment=PER_ROW)
def forward_kernel(
    student_ptr,  # (N, >= V), stride 1 in the vocabulary
    teacher_ptr,  # likewise
    student_bias_ptr,  # (V) or None
    teacher_bias_ptr,  # likewise
    mask_ptr,  # (N) uint8 or None
    loss_ptr,  # (N) fp32
    stats_ptr,  # (N, 6) fp32
    labels_ptr,  # (N) int64 or None
    metrics_ptr,  # (N, 4) fp32 or None
    V, stride_sn, stride_tn, stride_mn,
    s_factor, s_over_cap, s_cap, t_factor, t_over_cap, t_cap, share_s, share_t,
    stride_ln, tau, smoothing, inv_vocab,
    DIVERGENCE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK_V: tl.constexpr,
    TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """Loss, stats and metrics of whole rows."""
    row = tl.program_id(0).to(tl.int64)
    counts = counts_of(mask_ptr, row, stride_mn)
    end = tl.where(counts, V, 0)
    student_ptr += row * stride_sn
    teacher_ptr += row * stride_tn
    max_s, sum_s, max_t, sum_t, kl = empty_state(1)
    sum_y, dot_y, total_y = empty_metrics(1)
    label_y = max_s
    if labels_ptr is not None:
        label_y = load_label_y(
            student_ptr, student_bias_ptr, load_label(labels_ptr, row, stride_ln, 0, end),
            s_factor, s_over_cap, s_cap, tau, CAP_S, TEMPERED,
        )  # fmt: skip
    max_s, sum_s, max_t, sum_t, kl, sum_y, dot_y, total_y = _merge_row(
        student_ptr, teacher_ptr, student_bias_ptr, teacher_bias_ptr, end,
        max_s, sum_s, max_t, sum_t, kl, sum_y, dot_y, total_y,
        s_factor, s_over_cap, s_cap, t_factor, t_over_cap, t_cap, tau, DIVERGENCE, CAP_S, CAP_T, BLOCK_V,
        metrics_ptr is not None, TEMPERED, SMOOTHED,
    )  # fmt: skip
    inv_sum_s, inv_sum_t, lse_diff, loss, kl = row_stats(max_s, sum_s, max_t, sum_t, kl, DIVERGENCE)
    if DIVERGENCE == JSD:
        of_teacher, kl = _mixture_row(
            student_ptr, teacher_ptr, student_bias_ptr, teacher_bias_ptr, end,
            max_s[:, None], inv_sum_s[:, None], max_t[:, None], inv_sum_t[:, None], lse_diff[:, None],
            share_s, share_t,
            s_factor, s_over_cap, s_cap, t_factor, t_over_cap, t_cap, CAP_S, CAP_T, BLOCK_V,
        )  # fmt: skip
        loss = share_t * of_teacher + share_s * kl
    rows = row + tl.arange(0, 1)
    tl.store(loss_ptr + rows, tl.where(counts, loss, 0.0))
    store_stats(stats_ptr, rows, rows >= 0, counts, max_s, inv_sum_s, max_t, inv_sum_t, lse_diff, kl)
    if metrics_ptr is not None:
        inv_sum_y, ce, entropy, label_logprob = row_metrics(
            max_s, sum_y, dot_y, total_y, label_y, smoothing, inv_vocab, tau,
            labels_ptr is not None, TEMPERED, SMOOTHED,
        )  # fmt: skip
        store_metrics(metrics_ptr, rows, rows >= 0, counts, inv_sum_y, ce, entropy, label_logprob)


@triton.jit(
    do_not_specialize=["stride_mn", "stride_wn", "stride_ln", "stride_cn", "first_token"],
    do_not_specialize_on_alignment=PER_ROW,
)
def grad_kernel(
    student_ptr,  # (N, >= V), stride 1 in the vocabulary
    teacher_ptr,  # likewise
    student_bias_ptr,  # (V) or None
    teacher_bias_ptr,  # likewise
    mask_ptr,  # (N) uint8 or None
    weight_ptr,  # (N) fp32, the gradient of each row's loss
    stats_ptr,  # (N, 6) fp32
    grad_ptr,  # (N, columns), of any dtype
    labels_ptr,  # (N) int64 or None
    metrics_ptr,  # (N, 4) fp32 or None
    ce_weight_ptr,  # (N) fp32 or None, the gradient of each row's cross-entropy
    V, columns, stride_sn, stride_tn, stride_mn, stride_wn, stride_gn,
    s_factor, s_over_cap, s_cap, t_factor, t_over_cap, t_cap, share_s, share_t,
    stride_ln, stride_cn, first_token, tau, smoothing, inv_vocab,
    DIVERGENCE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK_V: tl.constexpr,
    TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """The gradient of sum(weight * loss + ce_weight * cross-entropy) to the raw student logits."""
    row = tl.program_id(0).to(tl.int64)
    counts = counts_of(mask_ptr, row, stride_mn)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (offs_v < V) & counts
    student_ptr += row * stride_sn
    teacher_ptr += row * stride_tn
    s = load_logits(student_ptr, student_bias_ptr, offs_v, inside, s_factor, s_over_cap, s_cap, CAP_S)
    t = load_logits(teacher_ptr, teacher_bias_ptr, offs_v, inside, t_factor, t_over_cap, t_cap, CAP_T)
    stats_ptr += row * 6
    max_s, inv_sum_s = tl.load(stats_ptr), tl.load(stats_ptr + 1)
    max_t, inv_sum_t = tl.load(stats_ptr + 2), tl.load(stats_ptr + 3)
    lse_diff, kl = tl.load(stats_ptr + 4), tl.load(stats_ptr + 5)
    weight = tl.load(weight_ptr + row * stride_wn)
    grad = grad_of_s(s, t, max_s, inv_sum_s, max_t, inv_sum_t, lse_diff, kl, share_s, share_t, DIVERGENCE)
    if ce_weight_ptr is None:
        grad *= weight * softcap_grad(s, s_factor, s_cap, CAP_S)
    else:
        inv_sum_y = inv_sum_s
        if TEMPERED:
            inv_sum_y = tl.load(metrics_ptr + row * 4)
        p_y = tl.exp(at_temperature_one(s - max_s, tau, TEMPERED)) * inv_sum_y
        is_label = offs_v == load_label(labels_ptr, row, stride_ln, first_token, V)
        of_y = less_target(p_y, is_label, smoothing, inv_vocab, SMOOTHED)
        ce_weight = at_temperature_one(tl.load(ce_weight_ptr + row * stride_cn), tau, TEMPERED)
        grad = tl.where(weight == 0.0, 0.0, grad * weight)  # also of a divergence that is infinite
        grad = (grad + of_y * ce_weight) * softcap_grad(s, s_factor, s_cap, CAP_S)
    # a masked-out token gets none, and s is -inf in padding too
    grad = tl.where(s == -INF, 0.0, grad)
    tl.store(grad_ptr + row * stride_gn + offs_v, grad.to(grad_ptr.dtype.element_ty), mask=offs_v < columns)


@triton.jit(
    do_not_specialize=["stride_mn", "stride_state", "stride_ln", "stride_metric", "first_token"],
    do_not_specialize_on_alignment=PER_ROW,
)
def tile_stats_kernel(
    student_ptr,  # (N, V) fp32 logits of a tile, stride 1 in the vocabulary
    teacher_ptr,  # likewise
    student_bias_ptr,  # (V) or None
    teacher_bias_ptr,  # likewise
    mask_ptr,  # (N) uint8 or None
    state_ptr,  # (5, N) fp32, merged into; not read if FIRST
    labels_ptr,  # (N) int64 or None
    metric_state_ptr,  # (4, N) fp32 or None, likewise
    V, stride_sn, stride_tn, stride_mn, stride_state,
    s_factor, s_over_cap, s_cap, t_factor, t_over_cap, t_cap,
    stride_ln, stride_metric, first_token, tau,
    FIRST: tl.constexpr,
    DIVERGENCE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK_V: tl.constexpr,
    TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """Merges a tile into the states of its rows."""
    row = tl.program_id(0).to(tl.int64)
    end = tl.where(counts_of(mask_ptr, row, stride_mn), V, 0)
    student_ptr += row * stride_sn
    state_ptr += row + tl.arange(0, 1)
    max_s, sum_s, max_t, sum_t, kl = empty_state(1)
    sum_y, dot_y, total_y = empty_metrics(1)
    label_y = max_s
    if not FIRST:
        max_s, sum_s = tl.load(state_ptr), tl.load(state_ptr + stride_state)
        max_t, sum_t = tl.load(state_ptr + 2 * stride_state), tl.load(state_ptr + 3 * stride_state)
        kl = tl.load(state_ptr + 4 * stride_state)
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
    max_s, sum_s, max_t, sum_t, kl, sum_y, dot_y, total_y = _merge_row(
        student_ptr, teacher_ptr + row * stride_tn, student_bias_ptr, teacher_bias_ptr, end,
        max_s, sum_s, max_t, sum_t, kl, sum_y, dot_y, total_y,
        s_factor, s_over_cap, s_cap, t_factor, t_over_cap, t_cap, tau, DIVERGENCE, CAP_S, CAP_T, BLOCK_V,
        metric_state_ptr is not None, TEMPERED, SMOOTHED,
    )  # fmt: skip
    tl.store(state_ptr, max_s)
    tl.store(state_ptr + stride_state, sum_s)
    tl.store(state_ptr + 2 * stride_state, max_t)
    tl.store(state_ptr + 3 * stride_state, sum_t)
    tl.store(state_ptr + 4 * stride_state, kl)
    if metric_state_ptr is not None:
        store_metric_state(metric_state_ptr, stride_metric, every, sum_y, dot_y, total_y, label_y)


@triton.jit(do_not_specialize=["stride_mn", "stride_sums"], do_not_specialize_on_alignment=PER_ROW)
def tile_mixture_kernel(
    student_ptr,  # (N, V) fp32 logits of a tile, stride 1 in the vocabulary
    teacher_ptr,  # likewise
    student_bias_ptr,  # (V) or None
    teacher_bias_ptr,  # likewise
    mask_ptr,  # (N) uint8 or None
    stats_ptr,  # (N, 6) fp32
    sums_ptr,  # (2, N) fp32, added to; not read if FIRST
    V, stride_sn, stride_tn, stride_mn, stride_sums,
    s_factor, s_over_cap, s_cap, t_factor, t_over_cap, t_cap, share_s, share_t,
    FIRST: tl.constexpr,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Adds a tile's terms of JSD to the sums of its rows."""
    row = tl.program_id(0).to(tl.int64)
    end = tl.where(counts_of(mask_ptr, row, stride_mn), V, 0)
    stats_ptr += row * 6
    of_teacher, of_student = _mixture_row(
        student_ptr + row * stride_sn, teacher_ptr + row * stride_tn,
        student_bias_ptr, teacher_bias_ptr, end,
        tl.load(stats_ptr), tl.load(stats_ptr + 1), tl.load(stats_ptr + 2), tl.load(stats_ptr + 3),
        tl.load(stats_ptr + 4), share_s, share_t,
        s_factor, s_over_cap, s_cap, t_factor, t_over_cap, t_cap, CAP_S, CAP_T, BLOCK_V,
    )  # fmt: skip
    sums_ptr += row + tl.arange(0, 1)
    if not FIRST:
        of_teacher += tl.load(sums_ptr)
        of_student += tl.load(sums_ptr + stride_sums)
    tl.store(sums_ptr, of_teacher)
    tl.store(sums_ptr + stride_sums, of_student)
