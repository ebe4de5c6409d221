"""The formulas of the metrics: what else is known of a row's student than its divergence. On blocks of logits
in registers, shared by the kernels; Metric and MetricState in csrc/kl_loss/loss_options.h say what is stored.

    y = s tau: the transformed logits at temperature 1
    state of some tokens of a row, beside the max_s of divergence.py, each [rows]:
        sum_y = sum exp(y - max_y)    dot_y = sum exp(y - max_y) (y - max_y) <= 0, max_y = max_s tau
        total_y = sum y, only if SMOOTHED    label_y: y of the label, -inf where it is not one of these tokens

TEMPERED: tau is not 1. Otherwise y is s and sum_y is sum_s, which the kernels then have already: nothing has
a second exponential, and no register holds the same sum twice.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from minitron_kernels.ops.kl_loss.kernel_triton.divergence import INF, LOWEST


@triton.jit
def at_temperature_one(s, tau, TEMPERED: tl.constexpr):
    """The y of an s, or of a difference of two."""
    return s * tau if TEMPERED else s


@triton.jit
def empty_metrics(ROWS: tl.constexpr):
    """sum_y, dot_y and total_y of no tokens; merging with them changes nothing."""
    zero = tl.zeros((ROWS,), tl.float32)
    return zero, zero, zero


@triton.jit
def _below(sum_y, dot_y, max_s, top_s, tau, TEMPERED: tl.constexpr):
    """sum_y and dot_y of a part, from the maximum of the whole, which is no lower. Nothing cancels."""
    fall = at_temperature_one(max_s - tl.maximum(top_s, LOWEST), tau, TEMPERED)
    share = tl.exp(fall)
    return sum_y * share, tl.where(share == 0.0, 0.0, share * (dot_y + sum_y * fall))


@triton.jit
def merge_metrics(
    top_s, a_max_s, a_sum_y, a_dot_y, b_max_s, b_sum_y, b_dot_y, tau, TEMPERED: tl.constexpr
):  # fmt: skip
    """sum_y and dot_y of the tokens of both; top_s: the larger of their maxima."""
    a_sum_y, a_dot_y = _below(a_sum_y, a_dot_y, a_max_s, top_s, tau, TEMPERED)
    b_sum_y, b_dot_y = _below(b_sum_y, b_dot_y, b_max_s, top_s, tau, TEMPERED)
    return a_sum_y + b_sum_y, a_dot_y + b_dot_y


@triton.jit
def block_metrics(s, e_s, max_s, sum_s, in_vocab, tau, TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr):
    """sum_y, dot_y and total_y of one block of logits, from block_mass() of them.

    To be called before the kl is made: what it needs is in registers then, and nothing else.
    """
    below, sum_y, total_y = s - tl.maximum(max_s, LOWEST)[:, None], sum_s, tl.zeros_like(sum_s)
    if TEMPERED:
        below *= tau
        e_y = tl.exp(below)
        sum_y = tl.sum(e_y, 1)
    else:
        e_y = e_s
    dot_y = tl.sum(e_y * tl.maximum(below, LOWEST), 1)  # a masked-out token adds nothing
    if SMOOTHED:
        total_y = tl.sum(tl.where(in_vocab, at_temperature_one(s, tau, TEMPERED), 0.0), 1)
    return sum_y, dot_y, total_y


@triton.jit
def row_metrics(
    max_s, sum_y, dot_y, total_y, label_y, smoothing, inv_vocab, tau,
    LABELED: tl.constexpr, TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """inv_sum_y, cross-entropy, entropy and log p(label) of whole rows.

    A row whose tokens are all masked out has sum 0 and becomes NaN, as its softmax does.
    """
    log_sum = tl.log(sum_y)
    entropy = log_sum - dot_y / sum_y
    ce, label_logprob = tl.zeros_like(entropy), tl.zeros_like(entropy)
    if LABELED:
        max_y = at_temperature_one(max_s, tau, TEMPERED)
        label_logprob = (label_y - max_y) - log_sum
        ce = -label_logprob
        if SMOOTHED:
            of_label = tl.where(smoothing == 1.0, 0.0, (1.0 - smoothing) * ce)  # also of a label of -inf
            ce = of_label + smoothing * ((max_y - total_y * inv_vocab) + log_sum)
    return 1.0 / sum_y, ce, entropy, label_logprob


@triton.jit
def store_metrics(metrics_ptr, rows, inside, counts, inv_sum_y, ce, entropy, label_logprob):
    """Writes metrics [N, 4] of some rows; zeros where they do not count."""
    out = metrics_ptr + rows * 4
    tl.store(out, tl.where(counts, inv_sum_y, 0.0), mask=inside)
    tl.store(out + 1, tl.where(counts, ce, 0.0), mask=inside)
    tl.store(out + 2, tl.where(counts, entropy, 0.0), mask=inside)
    tl.store(out + 3, tl.where(counts, label_logprob, 0.0), mask=inside)


@triton.jit
def load_metric_state(
    state_ptr, stride, inside, LABELED: tl.constexpr, TEMPERED: tl.constexpr, SMOOTHED: tl.constexpr
):  # fmt: skip
    """sum_y, dot_y, total_y and label_y of some rows from metric_state (4, N): of these what is in use."""
    dot_y = tl.load(state_ptr + stride, mask=inside, other=0.0)
    sum_y, total_y, label_y = tl.zeros_like(dot_y), tl.zeros_like(dot_y), tl.zeros_like(dot_y) - INF
    if TEMPERED:
        sum_y = tl.load(state_ptr, mask=inside, other=0.0)
    if SMOOTHED:
        total_y = tl.load(state_ptr + 2 * stride, mask=inside, other=0.0)
    if LABELED:
        label_y = tl.load(state_ptr + 3 * stride, mask=inside, other=0.0)
    return sum_y, dot_y, total_y, label_y


@triton.jit
def store_metric_state(state_ptr, stride, inside, sum_y, dot_y, total_y, label_y):
    """Writes metric_state (4, N) of some rows, all of it."""
    tl.store(state_ptr, sum_y, mask=inside)
    tl.store(state_ptr + stride, dot_y, mask=inside)
    tl.store(state_ptr + 2 * stride, total_y, mask=inside)
    tl.store(state_ptr + 3 * stride, label_y, mask=inside)


@triton.jit
def label_in(s, is_label, tau, TEMPERED: tl.constexpr):
    """label_y of a block of logits in registers, [rows]."""
    return at_temperature_one(tl.max(tl.where(is_label, s, -INF), 1), tau, TEMPERED)


@triton.jit
def less_target(p_y, is_label, smoothing, inv_vocab, SMOOTHED: tl.constexpr):
    """d cross-entropy / d y of a token: its probability less its target."""
    if SMOOTHED:
        return (p_y - smoothing * inv_vocab) - tl.where(is_label, 1.0 - smoothing, 0.0)
    else:
        return p_y - tl.where(is_label, 1.0, 0.0)
