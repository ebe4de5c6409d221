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
APART: tl.constexpr = tl.constexpr(16.0)  # maxima further apart are taken off before logits are subtracted
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
def zeros_of(max_s, max_t):
    """Where either side's logits are measured from before they are subtracted.

    From 0 where the maxima lie close: the difference of two like numbers is exact, and a small log-ratio
    keeps all its digits. From each side's own maximum where they lie far apart, as after -1e4 in a whole
    stretch of one model's logits: t - s would be rounded to the digits of 1e4. Where a side has no possible
    token there is no log-ratio.
    """
    apart = tl.abs(max_s - max_t) > APART
    return tl.where(apart, max_s, 0.0), tl.where(apart, max_t, 0.0)


@triton.jit
def log_ratio(s, t, max_s, max_t, log_sums):
    """d = lt - ls of tokens, with log_sums = log (sum_s / sum_t)."""
    zero_s, zero_t = zeros_of(max_s, max_t)
    gap = log_sums - ((max_t - zero_t) - (max_s - zero_s))
    return ((t - zero_t) - (s - zero_s)) + gap


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
    if KEEP_EXP:
        p_x = e_x * (1.0 / sum_x)[:, None]
        p_y = e_y * (1.0 / sum_y)[:, None]
        d = log_ratio(y, x, max_y[:, None], max_x[:, None], tl.log(sum_y / sum_x)[:, None])
    else:
        log_x = (x - tl.maximum(max_x, LOWEST)[:, None]) - tl.log(sum_x)[:, None]
        log_y = (y - tl.maximum(max_y, LOWEST)[:, None]) - tl.log(sum_y)[:, None]
        p_x, p_y, d = tl.exp(log_x), tl.exp(log_y), log_x - log_y
    return _settled(tl.sum(kl_term(p_x, p_y, d), 1), sum_x, sum_y)


@triton.jit
def block_state(s, t, KIND: tl.constexpr, KEEP_EXP: tl.constexpr):
    """The state of the tokens of one block; JSD has no kl before the whole row is known: 0.

    KEEP_EXP: exponentials stay in registers for the kl, beside the logits. Not so where registers are short:
    they are made twice, and log-ratios always from each side's own maximum.
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
    # log (mass of X / mass of Y) of a part, also where a mass is too small for a float
    zero_y, zero_x = zeros_of(max_y, max_x)
    top = (max_x - zero_x) - (max_y - zero_y)
    a_d = ((a_max_x - zero_x) - (a_max_y - zero_y)) - top + tl.log((a_sum_x * sum_y) / (a_sum_y * sum_x))
    b_d = ((b_max_x - zero_x) - (b_max_y - zero_y)) - top + tl.log((b_sum_x * sum_y) / (b_sum_y * sum_x))
    kl = _part_kl(a_mass_x, sum_x, a_mass_y, sum_y, a_d, a_kl)
    kl += _part_kl(b_mass_x, sum_x, b_mass_y, sum_y, b_d, b_kl)
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
    """inv_sum_s, inv_sum_t, log_sums = log (sum_s / sum_t), the loss, and the kl that the gradient needs.

    A row impossible throughout has sum 0 and becomes NaN, as a softmax of it is.
    """
    loss = tl.where((sum_s == 0.0) | (sum_t == 0.0), float("nan"), kl)
    return (
        1.0 / sum_s,
        1.0 / sum_t,
        tl.log(sum_s / sum_t),
        loss,
        loss if KIND == REVERSE else tl.zeros_like(loss),
    )


@triton.jit
def _mixed(below_s, below_t, d, share_s, share_t):
    """A token by the larger of p_s and p_t: whether it is the teacher's, size = |d|, and

        smaller = larger e = larger (1 + u)    m = larger (1 + a), a = other u    m = smaller (1 + b)

    with `own` and `other`, the shares in M of the larger and of the other. Nothing overflows but b, and that
    to infinity. below: s - max_s, t - max_t; a token impossible in both has d = 0.
    """
    d = tl.where((below_s == -INF) & (below_t == -INF), 0.0, d)
    size, teacher_larger = tl.abs(d), d > 0.0
    near, far = bregman_near(size) - size, tl.exp(-size)
    u = tl.where(size < NEAR, near, far - 1.0)
    e = tl.where(size < NEAR, 1.0 + near, far)
    own = tl.where(teacher_larger, share_t, share_s)
    other = tl.where(teacher_larger, share_s, share_t)
    return teacher_larger, size, e, u, own, other, other * u, own * (-u / e)


@triton.jit
def mixture_terms(below_s, below_t, d, inv_sum_s, inv_sum_t, share_s, share_t):
    """Terms of KL(T || M) and KL(S || M), M = share_t T + share_s S, with below = s - max_s, t - max_t.

    What is small is made by series: for a share near 0 the loss lies many digits below the probabilities.
    """
    teacher_larger, size, e, u, own, other, a, b = _mixed(below_s, below_t, d, share_s, share_t)
    inv_sum = tl.where(teacher_larger, inv_sum_t, inv_sum_s)
    p = tl.exp(tl.where(teacher_larger, below_t, below_s)) * inv_sum
    log_m = tl.log(own + other * e)  # log (m / larger)
    larger = p * tl.where(a > -0.4, log1p_gap_near(a), a - log_m)
    far = tl.where(e == 0.0, 0.0, e * (-size - log_m)) - own * u
    smaller = p * tl.where(b < 0.7, e * log1p_gap_near(b), far)
    return tl.where(teacher_larger, larger, smaller), tl.where(teacher_larger, smaller, larger)


@triton.jit
def grad_of_s(
    s, t, max_s, inv_sum_s, max_t, inv_sum_t, log_sums, kl, share_s, share_t, KIND: tl.constexpr
):  # fmt: skip
    """d loss / d s of a possible token."""
    p_s = tl.exp(s - max_s) * inv_sum_s
    d = log_ratio(s, t, max_s, max_t, log_sums)
    if KIND == FORWARD:
        p_t = tl.exp(t - max_t) * inv_sum_t
        # p_t expm1(-d): close to each other, p_s - p_t is no more than their last bits
        return tl.where(tl.abs(d) < NEAR, p_t * (bregman_near(d) - d), p_s - p_t)
    elif KIND == REVERSE:
        return tl.where(p_s == 0.0, 0.0, p_s * (-d - kl))
    else:
        teacher_larger, size, e, _, own, other, a, b = _mixed(s - max_s, t - max_t, d, share_s, share_t)
        log_m = tl.log(own + other * e)
        larger = tl.where(a > -0.4, log1p_gap_near(a) - a, -log_m)  # log (larger / m)
        smaller = tl.where(b < 0.7, log1p_gap_near(b) - b, -size - log_m)
        ls_minus_lm = tl.where(teacher_larger, smaller, larger)
        return tl.where(p_s == 0.0, 0.0, share_s * p_s * (ls_minus_lm - kl))
