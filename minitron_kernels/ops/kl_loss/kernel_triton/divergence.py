"""The formulas of the divergences on blocks of logits in registers, shared by every Triton kernel of kl_loss.

    s, t: transformed logits [rows, vocabulary], -inf beyond the vocabulary
    d = log p_t - log p_s: the log-ratio of a token, teacher over student, as in CUDA and on the CPU
    lse_diff = log (sum_s / sum_t): log-sum-exp of s less that of t, without the maxima
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

from minitron_kernels.ops.kl_loss.divergence import Divergence

FORWARD_KL: tl.constexpr = tl.constexpr(Divergence.FORWARD_KL.value)
REVERSE_KL: tl.constexpr = tl.constexpr(Divergence.REVERSE_KL.value)
JSD: tl.constexpr = tl.constexpr(Divergence.JSD.value)

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
    """cap * tanh(scale * z / cap) / tau, or scale * z / tau. -inf, a masked-out token, stays -inf."""
    if CAP:
        y = z * scale_over_cap
        return tl.where(y == -INF, y, tanh(y) * cap_over_tau)
    else:
        return z * factor


@triton.jit
def softcap_grad(s, factor, cap_over_tau, CAP: tl.constexpr):
    """The derivative of transform(), d s / d z, at the transformed logit s: the softcap's, and the scale."""
    if CAP:
        ratio = s / cap_over_tau
        return factor * ((1.0 - ratio) * (1.0 + ratio))
    else:
        return factor


@triton.jit
def expm1_minus_x(x):
    """e^x - 1 - x >= 0 for |x| < NEAR, by its series.

    With x = log q - log p it is a token's term of KL(P || Q) over p: p (log p - log q) + q - p.
    """
    y = 1.0 / 40320.0 * x + 1.0 / 5040.0
    y = y * x + 1.0 / 720.0
    y = y * x + 1.0 / 120.0
    y = y * x + 1.0 / 24.0
    y = y * x + 1.0 / 6.0
    y = y * x + 0.5
    return y * x * x


@triton.jit
def x_minus_log1p(x):
    """x - log1p(x) >= 0 for -0.4 < x < 0.7, from log1p(x) = 2 atanh(x / (2 + x))."""
    y = x / (2.0 + x)
    y2 = y * y
    z = 1.0 / 13.0 * y2 + 1.0 / 11.0
    z = z * y2 + 1.0 / 9.0
    z = z * y2 + 1.0 / 7.0
    z = z * y2 + 0.2
    z = z * y2 + 1.0 / 3.0
    return y * (x - 2.0 * y2 * z)


@triton.jit
def zeros_of(max_s, max_t):
    """What is taken off each side's logits before they are subtracted.

    Nothing where the two maxima are close: the difference of two similar numbers is exact, and a small
    log-ratio keeps all its digits. Each side's own maximum where they are far apart, as where one model's
    logits have -1e4 added to them: t - s would be rounded to the digits of 1e4. If a side's tokens are all
    masked out there is no log-ratio.
    """
    apart = tl.abs(max_s - max_t) > APART
    return tl.where(apart, max_s, 0.0), tl.where(apart, max_t, 0.0)


@triton.jit
def log_ratio(s, t, max_s, max_t, lse_diff):
    """d = log p_t - log p_s of tokens."""
    zero_s, zero_t = zeros_of(max_s, max_t)
    of_row = lse_diff - ((max_t - zero_t) - (max_s - zero_s))
    return ((t - zero_t) - (s - zero_s)) + of_row


@triton.jit
def kl_term(p_x, p_y, d):
    """p_x d + p_y - p_x, a term of KL(X || Y), with d = log p_x - log p_y; its extra parts sum to 0.

    p_x = 0 wins over an infinite or undefined d; a NaN in p_x or p_y survives.
    """
    far = tl.where(p_x == 0.0, 0.0, p_x * d) + (p_y - p_x)
    return tl.where(tl.abs(d) < NEAR, p_x * expm1_minus_x(-d), far)


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
def block_mass(x):
    """The maximum of one side's tokens of one block, their exponentials less it, and the sum of these."""
    top = tl.max(x, 1)  # skips a NaN, which the sum then keeps
    # subtract a finite maximum, so that exp(-inf - max) is 0 and not NaN
    e = tl.exp(x - tl.maximum(top, LOWEST)[:, None])
    return top, e, tl.sum(e, 1)


@triton.jit
def block_masses(s, t):
    """block_mass() of both sides. Both maxima come first: until then all that is loaded is on its way."""
    max_s, max_t = tl.max(s, 1), tl.max(t, 1)
    e_s = tl.exp(s - tl.maximum(max_s, LOWEST)[:, None])
    e_t = tl.exp(t - tl.maximum(max_t, LOWEST)[:, None])
    return max_s, e_s, tl.sum(e_s, 1), max_t, e_t, tl.sum(e_t, 1)


@triton.jit
def block_kl(
    s, e_s, max_s, sum_s, t, e_t, max_t, sum_t, DIVERGENCE: tl.constexpr, KEEP_EXP: tl.constexpr
):  # fmt: skip
    """The kl of the tokens of one block; JSD has none before the whole row is known: 0.

    KEEP_EXP: the exponentials stay in registers for the kl, beside the logits. Without it, where registers
    are short, they are computed twice, and log-ratios always from each side's own maximum.
    """
    if DIVERGENCE == FORWARD_KL:
        return _block_kl(t, e_t, max_t, sum_t, s, e_s, max_s, sum_s, KEEP_EXP)
    elif DIVERGENCE == REVERSE_KL:
        return _block_kl(s, e_s, max_s, sum_s, t, e_t, max_t, sum_t, KEEP_EXP)
    else:
        tl.static_assert(DIVERGENCE == JSD)
        return tl.zeros_like(max_s)


@triton.jit
def empty_state(ROWS: tl.constexpr):
    """The state of no tokens; merging with it changes nothing."""
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
    a_max_s, a_sum_s, a_max_t, a_sum_t, a_kl, b_max_s, b_sum_s, b_max_t, b_sum_t, b_kl,
    DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """The state of the tokens of both."""
    max_s, max_t = tl.maximum(a_max_s, b_max_s), tl.maximum(a_max_t, b_max_t)
    base_s, base_t = tl.maximum(max_s, LOWEST), tl.maximum(max_t, LOWEST)
    a_mass_s, b_mass_s = a_sum_s * tl.exp(a_max_s - base_s), b_sum_s * tl.exp(b_max_s - base_s)
    a_mass_t, b_mass_t = a_sum_t * tl.exp(a_max_t - base_t), b_sum_t * tl.exp(b_max_t - base_t)
    sum_s, sum_t = a_mass_s + b_mass_s, a_mass_t + b_mass_t
    if DIVERGENCE == FORWARD_KL:
        kl = _merged_kl(
            max_t, sum_t, a_max_t, a_sum_t, a_mass_t, b_max_t, b_sum_t, b_mass_t,
            max_s, sum_s, a_max_s, a_sum_s, a_mass_s, b_max_s, b_sum_s, b_mass_s, a_kl, b_kl,
        )  # fmt: skip
    elif DIVERGENCE == REVERSE_KL:
        kl = _merged_kl(
            max_s, sum_s, a_max_s, a_sum_s, a_mass_s, b_max_s, b_sum_s, b_mass_s,
            max_t, sum_t, a_max_t, a_sum_t, a_mass_t, b_max_t, b_sum_t, b_mass_t, a_kl, b_kl,
        )  # fmt: skip
    else:
        tl.static_assert(DIVERGENCE == JSD)
        kl = a_kl
    return max_s, sum_s, max_t, sum_t, kl


@triton.jit
def row_stats(max_s, sum_s, max_t, sum_t, kl, DIVERGENCE: tl.constexpr):
    """inv_sum_s, inv_sum_t, lse_diff = log (sum_s / sum_t), the loss, and the kl that the gradient needs.

    A row whose tokens are all masked out has sum 0 and becomes NaN, as its softmax does.
    """
    loss = tl.where((sum_s == 0.0) | (sum_t == 0.0), float("nan"), kl)
    return (
        1.0 / sum_s,
        1.0 / sum_t,
        tl.log(sum_s / sum_t),
        loss,
        loss if DIVERGENCE == REVERSE_KL else tl.zeros_like(loss),
    )


@triton.jit
def _mixed(below_s, below_t, d, share_s, share_t):
    """A token by the larger of p_s and p_t: whether it is the teacher's, size = |d|, and

        smaller = larger e = larger (1 + u)    m = larger (1 + a), a = other u    m = smaller (1 + b)

    with `own` and `other`, the shares in M of the larger and of the other. Nothing overflows but b, and that
    to infinity. below: s - max_s, t - max_t; a token that both mask out has d = 0.
    """
    d = tl.where((below_s == -INF) & (below_t == -INF), 0.0, d)
    size, teacher_larger = tl.abs(d), d > 0.0
    near, far = expm1_minus_x(-size) - size, tl.exp(-size)
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
    larger = p * tl.where(a > -0.4, x_minus_log1p(a), a - log_m)
    far = tl.where(e == 0.0, 0.0, e * (-size - log_m)) - own * u
    smaller = p * tl.where(b < 0.7, e * x_minus_log1p(b), far)
    return tl.where(teacher_larger, larger, smaller), tl.where(teacher_larger, smaller, larger)


@triton.jit
def grad_of_s(
    s, t, max_s, inv_sum_s, max_t, inv_sum_t, lse_diff, kl, share_s, share_t, DIVERGENCE: tl.constexpr
):  # fmt: skip
    """d loss / d s of a token that is not masked out."""
    p_s = tl.exp(s - max_s) * inv_sum_s
    d = log_ratio(s, t, max_s, max_t, lse_diff)
    if DIVERGENCE == FORWARD_KL:
        p_t = tl.exp(t - max_t) * inv_sum_t
        # p_t expm1(-d): close to each other, p_s - p_t is no more than their last bits
        return tl.where(tl.abs(d) < NEAR, p_t * (expm1_minus_x(-d) - d), p_s - p_t)
    elif DIVERGENCE == REVERSE_KL:
        return tl.where(p_s == 0.0, 0.0, p_s * (-d - kl))
    else:
        tl.static_assert(DIVERGENCE == JSD)
        teacher_larger, size, e, _, own, other, a, b = _mixed(s - max_s, t - max_t, d, share_s, share_t)
        log_m = tl.log(own + other * e)
        larger = tl.where(a > -0.4, x_minus_log1p(a) - a, -log_m)  # log (larger / m)
        smaller = tl.where(b < 0.7, x_minus_log1p(b) - b, -size - log_m)
        log_s_over_m = tl.where(teacher_larger, smaller, larger)
        return tl.where(p_s == 0.0, 0.0, share_s * p_s * (log_s_over_m - kl))
