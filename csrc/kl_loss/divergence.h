// What one pair of logits adds to a row's loss and gradient: the formulas of forward KL, reverse KL and generalised
// JSD on vectors, shared by the kernel on rows of logits and the kernel on panels of linear_kl_loss.
//   s, t: transformed logits (scale, softcap, temperature); ls = s - lse_s and lt = t - lse_t, log-probabilities.
#pragma once

#include "common/vec_math.h"
#include "kl_loss/kl_loss_cpu.h"

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

// A row's normalisers, one row per lane or one row in all lanes. rz = 1 / sum exp(x - max); delta = lse_s - lse_t.
template <typename A>
struct RowStats {
  Vec<A> max_s, rz_s, max_t, rz_t, delta, kl;
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

template <typename A, Divergence kind>
inline Terms<A> divergence_terms(Vec<A> s, Vec<A> t, const RowStats<A>& row, A beta) {
  const Vec<A> p_s = exp_nonpositive<A>(s - row.max_s) * row.rz_s;
  const Vec<A> p_t = exp_nonpositive<A>(t - row.max_t) * row.rz_t;
  const Vec<A> ratio = (s - t) - row.delta;  // ls - lt
  // Each loss term below is >= 0: p (log p - log q) + q - p, whose extra parts sum to 0. Nothing cancels in the sum.
  if constexpr (kind == Divergence::kForward) {
    const Vec<A> grad = p_s - p_t;
    return {weigh<A>(p_t, -ratio) + (p_s - p_t), Vec<A>{}, grad};
  } else if constexpr (kind == Divergence::kReverse) {
    return {weigh<A>(p_s, ratio) + (p_t - p_s), Vec<A>{}, weigh<A>(p_s, ratio - row.kl)};
  } else {
    // lm = log(beta p_t + (1 - beta) p_s) taken from the larger of the two, so that no exponential overflows
    const auto student_larger = ratio >= A(0);
    const Vec<A> distance = student_larger ? -ratio : ratio;
    const Vec<A> weight = student_larger ? splat(beta) : splat(A(1) - beta);
    const Vec<A> g = log1p_nonpositive<A>(weight * expm1_nonpositive<A>(distance));
    const Vec<A> s_over_m = student_larger ? -g : ratio - g;   // ls - lm
    const Vec<A> t_over_m = student_larger ? -ratio - g : -g;  // lt - lm
    const Vec<A> kl = weigh<A>(p_s, s_over_m);
    return {weigh<A>(p_t, t_over_m) * beta + kl * (A(1) - beta), kl,
            weigh<A>(p_s, s_over_m - row.kl) * (A(1) - beta)};
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
