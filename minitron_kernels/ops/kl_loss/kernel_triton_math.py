"""The formulas of the divergences on blocks of logits in registers, shared by every Triton kernel of kl_loss.

    s, t: transformed logits [rows, vocabulary], -inf beyond the vocabulary
    state of some tokens of a row: max_s, sum_s, max_t, sum_t, kl, each [rows]

A state holds the maximum and the sum of exp of either side and KL(X || Y) of the two distributions given that
the token is one of these; X, Y = teacher, student for forward KL and the reverse for reverse KL. By the chain
rule the KL of two parts is p KL_a + p' KL_b plus the KL of the parts' masses, so that blocks, tiles and
splits merge by one rule, and one look at each logit is enough for a loss whose terms are all >= 0. Masses are
known to 1e-7, which leaves a loss L an error of no more than about 1e-7 sqrt(L).
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

FORWARD: tl.constexpr = tl.constexpr(0)
REVERSE: tl.constexpr = tl.constexpr(1)
JSD: tl.constexpr = tl.constexpr(2)

NEAR: tl.constexpr = tl.constexpr(0.5)  # |d| below which the series holds to 1e-7
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)
INF: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit
def tanh(y):
    """A continued fraction where 1 - 2 / (exp(2y) + 1) would lose digits."""
    y2 = y * y
    near = y * (945.0 + y2 * (105.0 + y2)) / (945.0 + y2 * (420.0 + 15.0 * y2))
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(y)) + 1.0)
    return tl.where(tl.abs(y) < 0.6, near, tl.where(y < 0.0, -far, far))


@triton.jit
def transform(z, factor, scale_over_cap, cap_over_tau, CAP: tl.constexpr):
    """cap * tanh(scale * z / cap) / tau, or scale * z / tau. -inf, an impossible token, stays -inf."""
    if CAP:
        y = z * scale_over_cap
        return tl.where(y == -INF, y, tanh(y) * cap_over_tau)
    else:
        return z * factor


@triton.jit
def slope(s, factor, cap_over_tau, CAP: tl.constexpr):
    """d s / d z at the transformed logit s."""
    if CAP:
        ratio = s / cap_over_tau
        return factor * ((1.0 - ratio) * (1.0 + ratio))
    else:
        return factor


@triton.jit
def bregman_near(d):
    """d + exp(-d) - 1 >= 0 for |d| < NEAR, by its series."""
    y = -1.0 / 40320.0 * d + 1.0 / 5040.0
    y = y * -d + 1.0 / 720.0
    y = y * -d + 1.0 / 120.0
    y = y * -d + 1.0 / 24.0
    y = y * -d + 1.0 / 6.0
    y = y * -d + 0.5
    return y * d * d


@triton.jit
def log1p_gap_near(a):
    """a - log1p(a) >= 0 for -0.4 < a < 0.7, from log1p(a) = 2 atanh(a / (2 + a))."""
    y = a / (2.0 + a)
    y2 = y * y
    z = 1.0 / 13.0 * y2 + 1.0 / 11.0
    z = z * y2 + 1.0 / 9.0
    z = z * y2 + 1.0 / 7.0
    z = z * y2 + 0.2
    z = z * y2 + 1.0 / 3.0
    return y * (a - 2.0 * y2 * z)


@triton.jit
def kl_term(p_x, p_y, d):
    """p_x d + p_y - p_x, a term of KL(X || Y), with d = log p_x - log p_y; its extra parts sum to 0.

    p_x = 0 wins over an infinite or undefined d; a NaN in p_x or p_y survives.
    """
    far = tl.where(p_x == 0.0, 0.0, p_x * d) + (p_y - p_x)
    return tl.where(tl.abs(d) < NEAR, p_x * bregman_near(d), far)


@triton.jit
def _settled(kl, sum_x, sum_y):
    """KL is 0 where X has no mass, and infinite where Y alone has none; a NaN in sum_x survives."""
    return tl.where(sum_x == 0.0, 0.0, tl.where(sum_y == 0.0, sum_x * INF, kl))


@triton.jit
def _block_kl(x, e_x, max_x, sum_x, y, e_y, max_y, sum_y, KEEP_EXP: tl.constexpr):
    gap = (max_y - max_x) + tl.log(sum_y / sum_x)
    if KEEP_EXP:
        p_x = e_x * (1.0 / sum_x)[:, None]
        p_y = e_y * (1.0 / sum_y)[:, None]
    else:
        p_x = tl.exp(x - (tl.maximum(max_x, LOWEST) + tl.log(sum_x))[:, None])
        p_y = tl.exp(y - (tl.maximum(max_y, LOWEST) + tl.log(sum_y))[:, None])
    return _settled(tl.sum(kl_term(p_x, p_y, (x - y) + gap[:, None]), 1), sum_x, sum_y)


@triton.jit
def block_state(s, t, KIND: tl.constexpr, KEEP_EXP: tl.constexpr):
    """The state of the tokens of one block; JSD has no kl before the whole row is known: 0.

    KEEP_EXP: exponentials stay in registers for the kl; they are made twice where registers are short.
    """
    max_s, max_t = tl.max(s, 1), tl.max(t, 1)  # passes over NaN, which the sums then keep
    # never -inf is subtracted: exp(-inf - it) is to be 0 and not NaN
    e_s = tl.exp(s - tl.maximum(max_s, LOWEST)[:, None])
    e_t = tl.exp(t - tl.maximum(max_t, LOWEST)[:, None])
    sum_s, sum_t = tl.sum(e_s, 1), tl.sum(e_t, 1)
    if KIND == FORWARD:
        kl = _block_kl(t, e_t, max_t, sum_t, s, e_s, max_s, sum_s, KEEP_EXP)
    elif KIND == REVERSE:
        kl = _block_kl(s, e_s, max_s, sum_s, t, e_t, max_t, sum_t, KEEP_EXP)
    else:
        kl = tl.zeros_like(max_s)
    return max_s, sum_s, max_t, sum_t, kl


@triton.jit
def empty_state(ROWS: tl.constexpr):
    """The state of no token; merging with it changes nothing."""
    none = tl.full((ROWS,), -float("inf"), tl.float32)
    zero = tl.zeros((ROWS,), tl.float32)
    return none, zero, none, zero, zero


@triton.jit
def _part_kl(mass_x, sum_x, mass_y, sum_y, d, kl):
    p = mass_x / sum_x
    return kl_term(p, mass_y / sum_y, d) + tl.where(p == 0.0, 0.0, p * kl)


@triton.jit
def _merged_kl(
    max_x, sum_x, a_max_x, a_sum_x, a_mass_x, b_max_x, b_sum_x, b_mass_x,
    max_y, sum_y, a_max_y, a_sum_y, a_mass_y, b_max_y, b_sum_y, b_mass_y, a_kl, b_kl,
):  # fmt: skip
    # lse_y - lse_x of all, of a and of b; their differences are log (mass of X / mass of Y) of a part, also
    # where a mass is too small for a float
    gap = (max_y - max_x) + tl.log(sum_y / sum_x)
    a_gap = (a_max_y - a_max_x) + tl.log(a_sum_y / a_sum_x)
    b_gap = (b_max_y - b_max_x) + tl.log(b_sum_y / b_sum_x)
    kl = _part_kl(a_mass_x, sum_x, a_mass_y, sum_y, gap - a_gap, a_kl)
    kl += _part_kl(b_mass_x, sum_x, b_mass_y, sum_y, gap - b_gap, b_kl)
    return _settled(kl, sum_x, sum_y)


@triton.jit
def merge_states(
    a_max_s, a_sum_s, a_max_t, a_sum_t, a_kl, b_max_s, b_sum_s, b_max_t, b_sum_t, b_kl, KIND: tl.constexpr
):
    """The state of the tokens of both."""
    max_s, max_t = tl.maximum(a_max_s, b_max_s), tl.maximum(a_max_t, b_max_t)
    base_s, base_t = tl.maximum(max_s, LOWEST), tl.maximum(max_t, LOWEST)
    a_mass_s, b_mass_s = a_sum_s * tl.exp(a_max_s - base_s), b_sum_s * tl.exp(b_max_s - base_s)
    a_mass_t, b_mass_t = a_sum_t * tl.exp(a_max_t - base_t), b_sum_t * tl.exp(b_max_t - base_t)
    sum_s, sum_t = a_mass_s + b_mass_s, a_mass_t + b_mass_t
    if KIND == FORWARD:
        kl = _merged_kl(
            max_t, sum_t, a_max_t, a_sum_t, a_mass_t, b_max_t, b_sum_t, b_mass_t,
            max_s, sum_s, a_max_s, a_sum_s, a_mass_s, b_max_s, b_sum_s, b_mass_s, a_kl, b_kl,
        )  # fmt: skip
    elif KIND == REVERSE:
        kl = _merged_kl(
            max_s, sum_s, a_max_s, a_sum_s, a_mass_s, b_max_s, b_sum_s, b_mass_s,
            max_t, sum_t, a_max_t, a_sum_t, a_mass_t, b_max_t, b_sum_t, b_mass_t, a_kl, b_kl,
        )  # fmt: skip
    else:
        kl = a_kl
    return max_s, sum_s, max_t, sum_t, kl


@triton.jit
def row_stats(max_s, sum_s, max_t, sum_t, kl, KIND: tl.constexpr):
    """inv_sum_s, inv_sum_t, gap = lse_s - lse_t, the loss, and the kl that the gradient needs.

    A row impossible throughout has sum 0 and becomes NaN, as a softmax of it is.
    """
    gap = (max_s - max_t) + tl.log(sum_s / sum_t)
    loss = tl.where((sum_s == 0.0) | (sum_t == 0.0), float("nan"), kl)
    return 1.0 / sum_s, 1.0 / sum_t, gap, loss, loss if KIND == REVERSE else tl.zeros_like(loss)


@triton.jit
def _mixture_ratio(s, t, gap):
    """d = lt - ls, 0 for a token impossible in both; and exp(-|d|) - 1 with all its digits near 0."""
    d = tl.where((s == -INF) & (t == -INF), 0.0, (t - s) + gap)
    size = tl.abs(d)
    return d, size, tl.where(size < NEAR, bregman_near(size) - size, tl.exp(-size) - 1.0)


@triton.jit
def mixture_terms(s, t, max_s, inv_sum_s, max_t, inv_sum_t, gap, beta):
    """Terms of KL(T || M) and KL(S || M), M = beta T + (1 - beta) S.

    All is told by the larger of p_s and p_t and by smaller / larger = 1 + u, u = exp(-|d|) - 1, which cannot
    overflow: m = larger (1 + a), a = weight of the smaller * u.
    """
    d, size, u = _mixture_ratio(s, t, gap)
    teacher_larger = d > 0.0
    p = tl.exp(tl.where(teacher_larger, t - max_t, s - max_s)) * tl.where(
        teacher_larger, inv_sum_t, inv_sum_s
    )
    weight = tl.where(teacher_larger, 1.0 - beta, beta)  # of the smaller in M
    other = 1.0 - weight
    a = weight * u
    e = 1.0 + u
    log_m = tl.log(other + weight * e)  # log (m / larger), without cancellation
    larger = p * tl.where(a > -0.4, log1p_gap_near(a), a - log_m)
    v = bregman_near(-size) + size  # larger / smaller - 1
    far = tl.where(e == 0.0, 0.0, e * (-size - log_m)) - other * u
    smaller = p * tl.where(size < NEAR, e * log1p_gap_near(other * v), far)
    return tl.where(teacher_larger, larger, smaller), tl.where(teacher_larger, smaller, larger)


@triton.jit
def grad_of_s(s, t, max_s, inv_sum_s, max_t, inv_sum_t, gap, kl, beta, KIND: tl.constexpr):
    """d loss / d s of a possible token."""
    p_s = tl.exp(s - max_s) * inv_sum_s
    if KIND == FORWARD:
        d = (t - s) + gap
        p_t = tl.exp(t - max_t) * inv_sum_t
        # p_t expm1(-d): close to each other, p_s - p_t is no more than their last bits
        return tl.where(tl.abs(d) < NEAR, p_t * (bregman_near(d) - d), p_s - p_t)
    elif KIND == REVERSE:
        return tl.where(p_s == 0.0, 0.0, p_s * (-((t - s) + gap) - kl))
    else:
        d, size, u = _mixture_ratio(s, t, gap)
        teacher_larger = d > 0.0
        weight = tl.where(teacher_larger, 1.0 - beta, beta)
        a = weight * u
        log_m = tl.where(a > -0.4, a - log1p_gap_near(a), tl.log((1.0 - weight) + weight * (1.0 + u)))
        b = (1.0 - weight) * (bregman_near(-size) + size)
        near = log1p_gap_near(b) - b  # ls - lm where the student is the smaller
        ls_minus_lm = tl.where(teacher_larger, tl.where(size < NEAR, near, -size - log_m), -log_m)
        return tl.where(p_s == 0.0, 0.0, (1.0 - beta) * p_s * (ls_minus_lm - kl))
