// What one pair of logits adds to a row's loss and gradient: the formulas of forward KL, reverse KL and
// generalised JSD on vectors, shared by the kernel on rows of logits and the kernel on panels of
// linear_kl_loss.
//   s, t: transformed logits (scale, softcap, temperature); ls = s - lse_s and lt = t - lse_t,
//   log-probabilities.
#pragma once

#include "common/cpu/vec_math.h"
#include "kl_loss/cpu/kernels.h"

namespace minitron::MINITRON_SIMD {

// cap * tanh(scale * z / cap) / tau. -inf, an impossible token, stays -inf.
template <typename A>
inline Vec<A> transform_logit(Vec<A> z, A scale, A softcap, A inv_tau) {
  Vec<A> y = z * scale;
  if (softcap != A(0)) {
    const Vec<A> capped = tanh_of<A>(y / softcap) * softcap;
    y = y == -std::numeric_limits<A>::infinity() ? y : capped;
  }
  return y * inv_tau;
}

// d s / d z at the transformed logit s.
template <typename A>
inline Vec<A> transform_slope(Vec<A> s, A scale, A softcap, A inv_tau) {
  if (softcap == A(0)) return splat(scale * inv_tau);
  const Vec<A> ratio = s / (inv_tau * softcap);
  return (A(1) - ratio * ratio) * (scale * inv_tau);
}

// A row's normalisers, one row per lane or one row in all lanes. rz = 1 / sum exp(x - max); shift and delta
// as in kernels.h.
template <typename A>
struct RowStats {
  Vec<A> max_s, rz_s, max_t, rz_t, delta, kl;
  // The shift is taken off the larger logits alone: the smaller ones have digits that it would push out.
  Mask<A> student_larger = (max_s < A(0) ? -max_s : max_s) > (max_t < A(0) ? -max_t : max_t);
  Vec<A> shift_s = student_larger ? shift_between<A>(max_s, max_t) : Vec<A>{};
  Vec<A> shift_t = student_larger ? Vec<A>{} : -shift_between<A>(max_s, max_t);
};

template <typename A>
struct Terms {
  Vec<A> loss;  // to be summed over the vocabulary
  Vec<A> kl;    // JSD only: summed, KL(S || M), which the gradient needs
  Vec<A> grad;  // d loss / d s
};

// p = 0 wins over an infinite factor, and a NaN in p survives.
template <typename A>
inline Vec<A> weigh(Vec<A> p, Vec<A> factor) {
  return p > A(0) ? p * factor : p;
}

// e^r - 1 - r for |r| < kSmallRatio, exact to a few ulps: r^2 (1/2! + r/3! + r^2/4! + ...).
constexpr double kSmallRatio = 0.5;
template <typename A>
inline Vec<A> exp_beyond_linear(Vec<A> r) {
  constexpr int kTerms = sizeof(A) == 4 ? 8 : 14;
  A factorial = 1;
  for (int k = 2; k <= kTerms + 1; ++k) factorial *= k;
  Vec<A> series = splat(A(1) / factorial);
#pragma GCC unroll 16
  for (int k = kTerms + 1; k > 2; --k) {
    factorial /= k;
    series = series * r + A(1) / factorial;
  }
  return r * r * series;
}

// KL(P || Q) of one token, p (log p - log q) + q - p, with ratio = log q - log p. Its terms are all >= 0 and
// the extra q - p sums to 0, so nothing cancels in the sum. Close to each other, p and q are not subtracted
// at all: their normalisers' last bits would be as large as the term.
template <typename A>
inline Vec<A> kl_term(Vec<A> p, Vec<A> q, Vec<A> ratio, Vec<A> beyond, Mask<A> small) {
  return small ? p * beyond : weigh<A>(p, -ratio) + (q - p);
}

// The two models' shares of JSD's mixture, beta and 1 - beta, each with its own digits: 1 - beta in fp32
// would have none left where beta is near 1. Neither rounds to 0, where a mixture would lose a model.
template <typename A>
struct Shares {
  explicit Shares(double beta) : teacher(share(beta)), student(share(1 - beta)) {}
  A teacher, student;

 private:
  static A share(double x) {
    const A least = std::numeric_limits<A>::min();
    return A(x) < least ? least : A(x);
  }
};

template <typename A, Divergence kind>
inline Terms<A> divergence_terms(Vec<A> s, Vec<A> t, const RowStats<A>& row, const Shares<A>& shares) {
  const Vec<A> p_s = exp_nonpositive<A>(s - row.max_s) * row.rz_s;
  const Vec<A> p_t = exp_nonpositive<A>(t - row.max_t) * row.rz_t;
  const Vec<A> ratio = ((s - row.shift_s) - (t - row.shift_t)) - row.delta;  // ls - lt
  if constexpr (kind == Divergence::kForward) {
    const Mask<A> small = (ratio < A(kSmallRatio)) & (ratio > A(-kSmallRatio));
    const Vec<A> beyond = exp_beyond_linear<A>(ratio);
    const Vec<A> grad = small ? p_t * (ratio + beyond) : p_s - p_t;
    return {kl_term<A>(p_t, p_s, ratio, beyond, small), Vec<A>{}, grad};
  } else if constexpr (kind == Divergence::kReverse) {
    const Mask<A> small = (ratio < A(kSmallRatio)) & (ratio > A(-kSmallRatio));
    const Vec<A> beyond = exp_beyond_linear<A>(-ratio);
    return {kl_term<A>(p_s, p_t, -ratio, beyond, small), Vec<A>{}, weigh<A>(p_s, ratio - row.kl)};
  } else {
    // lm = log(beta p_t + (1 - beta) p_s) taken from the larger of the two, so that no exponential overflows
    const auto student_larger = ratio >= A(0);
    const Vec<A> distance = student_larger ? -ratio : ratio;
    const Vec<A> far = student_larger ? splat(shares.teacher) : splat(shares.student);
    const Vec<A> near = student_larger ? splat(shares.student) : splat(shares.teacher);
    const Vec<A> g =
        log1p_nonpositive<A>(far * expm1_nonpositive<A>(distance), near + far * exp_nonpositive<A>(distance));
    const Vec<A> s_over_m = student_larger ? -g : ratio - g;   // ls - lm
    const Vec<A> t_over_m = student_larger ? -ratio - g : -g;  // lt - lm
    const Vec<A> kl = weigh<A>(p_s, s_over_m);
    return {weigh<A>(p_t, t_over_m) * shares.teacher + kl * shares.student, kl,
            weigh<A>(p_s, s_over_m - row.kl) * shares.student};
  }
}

// The gradient to the raw logit; an impossible token gets none.
template <typename A>
inline Vec<A> grad_of_logit(Vec<A> s, Vec<A> grad, Vec<A> row_weight, A scale, A softcap, A inv_tau) {
  const Vec<A> g = grad * row_weight * transform_slope<A>(s, scale, softcap, inv_tau);
  return s == -std::numeric_limits<A>::infinity() ? Vec<A>{} : g;
}

// Calls f with the divergence as a compile-time constant.
template <typename F>
inline void with_divergence(Divergence kind, F&& f) {
  switch (kind) {
    case Divergence::kForward:
      return f(std::integral_constant<Divergence, Divergence::kForward>{});
    case Divergence::kReverse:
      return f(std::integral_constant<Divergence, Divergence::kReverse>{});
    default:
      return f(std::integral_constant<Divergence, Divergence::kJsd>{});
  }
}

}  // namespace minitron::MINITRON_SIMD
