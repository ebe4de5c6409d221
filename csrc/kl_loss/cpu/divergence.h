// What one pair of logits adds to a row's loss and gradient: the formulas of forward KL, reverse KL and
// generalised JSD on vectors, shared by the kernel on rows of logits and the kernel on panels of
// linear_kl_loss.
//   s, t: transformed logits (scale, softcap, temperature)
//   d = log p_t - log p_s, the log-ratio of a token: teacher over student, as on CUDA and in Triton
#pragma once

#include "common/cpu/vec_math.h"
#include "kl_loss/cpu/kernels.h"

namespace minitron::MINITRON_SIMD {

// cap * tanh(scale * z / cap) / tau. -inf, a masked-out token, stays -inf.
template <typename A>
inline Vec<A> transform_logit(Vec<A> z, A scale, A softcap, A inv_tau) {
  Vec<A> y = z * scale;
  if (softcap != A(0)) {
    const Vec<A> capped = tanh_of<A>(y / softcap) * softcap;
    y = y == -std::numeric_limits<A>::infinity() ? y : capped;
  }
  return y * inv_tau;
}

// The derivative of transform_logit(), d s / d z: scale and temperature, and the softcap's own factor
// 1 - tanh^2, which needs no z but only the transformed logit s.
template <typename A>
inline Vec<A> softcap_grad(Vec<A> s, A scale, A softcap, A inv_tau) {
  if (softcap == A(0)) return splat(scale * inv_tau);
  const Vec<A> ratio = s / (inv_tau * softcap);
  return (A(1) - ratio * ratio) * (scale * inv_tau);
}

// A row's normalisers, one row per lane or one row in all lanes. inv_sum = 1 / sum exp(x - max); lse_diff is
// lse_s - lse_t less the shift, as in kernels.h.
template <typename A>
struct RowStats {
  Vec<A> max_s, inv_sum_s, max_t, inv_sum_t, lse_diff, kl;
  // Only the larger logits are shifted: the smaller ones have digits that the shift would push out.
  Mask<A> student_larger = (max_s < A(0) ? -max_s : max_s) > (max_t < A(0) ? -max_t : max_t);
  Vec<A> shift_s = student_larger ? shift_between<A>(max_s, max_t) : Vec<A>{};
  Vec<A> shift_t = student_larger ? Vec<A>{} : -shift_between<A>(max_s, max_t);
};

template <typename A>
struct Terms {
  Vec<A> loss;  // to be summed over the vocabulary
  Vec<A> kl;    // JSD only: to be summed to KL(S || M), which the gradient needs
  Vec<A> grad;  // d loss / d s
  Vec<A> p_s;   // the student's probability
};

// p * factor, and p where that is 0, even if the factor is infinite; a NaN in p survives.
template <typename A>
inline Vec<A> weigh(Vec<A> p, Vec<A> factor) {
  return p > A(0) ? p * factor : p;
}

// e^x - 1 - x for |x| < kSmallRatio, to a few ulps: x^2 (1/2! + x/3! + x^2/4! + ...). With x = log q - log p
// it is a term of KL(P || Q) over p: p (log p - log q) + q - p = p (e^x - 1 - x).
constexpr double kSmallRatio = 0.5;
template <typename A>
inline Vec<A> expm1_minus_x(Vec<A> x) {
  constexpr int kTerms = sizeof(A) == 4 ? 8 : 14;
  A factorial = 1;
  for (int k = 2; k <= kTerms + 1; ++k) factorial *= k;
  Vec<A> series = splat(A(1) / factorial);
#pragma GCC unroll 16
  for (int k = kTerms + 1; k > 2; --k) {
    factorial /= k;
    series = series * x + A(1) / factorial;
  }
  return x * x * series;
}

// x - log(1 + x) >= 0 for -0.4 < x < 0.7, to a few ulps: log(1 + x) = 2 atanh(y), y = x / (2 + x), by its
// series.
template <typename A>
inline Vec<A> x_minus_log1p(Vec<A> x) {
  constexpr int kTerms = sizeof(A) == 4 ? 6 : 14;
  const Vec<A> y = x / (x + A(2)), y2 = y * y;
  Vec<A> series = splat(A(1) / (2 * kTerms + 1));
#pragma GCC unroll 16
  for (int i = kTerms - 1; i > 0; --i) series = series * y2 + A(1) / (2 * i + 1);
  return y * (x - A(2) * y2 * series);
}

// A token's term of KL(P || Q), p (log p - log q) + q - p, with log_ratio = log p - log q and excess =
// expm1_minus_x(-log_ratio). All terms are >= 0 and the extra q - p sums to 0, so nothing cancels in the sum.
// Close to each other, p and q are not subtracted at all: the last bits of their normalisers would be as
// large as the term.
template <typename A>
inline Vec<A> kl_term(Vec<A> p, Vec<A> q, Vec<A> log_ratio, Vec<A> excess, Mask<A> small) {
  return small ? p * excess : weigh<A>(p, log_ratio) + (q - p);
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

template <typename A, Divergence kDivergence>
inline Terms<A> divergence_terms(Vec<A> s, Vec<A> t, const RowStats<A>& row, const Shares<A>& shares) {
  const Vec<A> p_s = exp_nonpositive<A>(s - row.max_s) * row.inv_sum_s;
  const Vec<A> p_t = exp_nonpositive<A>(t - row.max_t) * row.inv_sum_t;
  const Vec<A> d = ((t - row.shift_t) - (s - row.shift_s)) + row.lse_diff;
  const Vec<A> minus_d = A(0) - d;  // +0 of +0, so that equal models have gradients of +0
  if constexpr (kDivergence == Divergence::kForwardKL) {
    const Mask<A> small = (d < A(kSmallRatio)) & (d > A(-kSmallRatio));
    const Vec<A> excess = expm1_minus_x<A>(minus_d);
    const Vec<A> grad = small ? p_t * (minus_d + excess) : p_s - p_t;
    return {kl_term<A>(p_t, p_s, d, excess, small), Vec<A>{}, grad, p_s};
  } else if constexpr (kDivergence == Divergence::kReverseKL) {
    const Mask<A> small = (d < A(kSmallRatio)) & (d > A(-kSmallRatio));
    const Vec<A> excess = expm1_minus_x<A>(d);
    return {kl_term<A>(p_s, p_t, minus_d, excess, small), Vec<A>{}, weigh<A>(p_s, minus_d - row.kl), p_s};
  } else {
    static_assert(kDivergence == Divergence::kJSD);
    // A token by the larger of its probabilities, p, with `own` and `other`, the shares in M of that model
    // and of the other one:
    //   smaller = p e = p (1 + u)    m = p (1 + a), a = other u    m = smaller (1 + b), b = own (-u / e)
    // Nothing overflows but b, to infinity. A model's term is its probability times log (probability / m),
    // plus m less the probability, as in kl_term(): no term is negative, and none is the small difference of
    // two.
    const Mask<A> student_larger = d <= A(0);
    const Vec<A> p = student_larger ? p_s : p_t, distance = student_larger ? d : minus_d;
    const Vec<A> own = student_larger ? splat(shares.student) : splat(shares.teacher);
    const Vec<A> other = student_larger ? splat(shares.teacher) : splat(shares.student);
    const Vec<A> u = expm1_nonpositive<A>(distance), e = exp_nonpositive<A>(distance);
    const Vec<A> a = other * u, b = own * (-u / e);
    const Vec<A> log_m = log1p_of<A>(a, own + other * e);  // log (m / p)
    const Vec<A> excess = x_minus_log1p<A>(b);
    const Mask<A> near = b < A(0.7);
    const Vec<A> larger = weigh<A>(p, a > A(-0.4) ? x_minus_log1p<A>(a) : a - log_m);
    const Vec<A> smaller = weigh<A>(p, near ? e * excess : weigh<A>(e, distance - log_m) - own * u);
    const Vec<A> smaller_over_m = near ? excess - b : distance - log_m;
    const Vec<A> of_teacher = student_larger ? smaller : larger;
    const Vec<A> of_student = student_larger ? larger : smaller;
    // kl without the extra part: what an error of lse_diff adds to all log-ratios of a row is then in kl too,
    // and the gradient, which is their difference, is without it.
    const Vec<A> s_over_m = student_larger ? -log_m : smaller_over_m, kl = weigh<A>(p_s, s_over_m);
    return {of_teacher * shares.teacher + of_student * shares.student, kl,
            weigh<A>(p_s, s_over_m - row.kl) * shares.student, p_s};
  }
}

// The gradient to the raw logit from that to s; a masked-out token gets none.
template <typename A>
inline Vec<A> grad_of_logit(Vec<A> s, Vec<A> grad, A scale, A softcap, A inv_tau) {
  const Vec<A> g = grad * softcap_grad<A>(s, scale, softcap, inv_tau);
  return s == -std::numeric_limits<A>::infinity() ? Vec<A>{} : g;
}

// What is made of the student at temperature 1, where y = s tau, beside the divergence: nothing; or
// something, with the exponentials of the divergence where tau is 1, and with exponentials of its own.
enum class AtUnitTemperature { kNothing, kShared, kOwn };

// Calls f with one of them as a compile-time constant: what is not asked for costs nothing.
template <typename F>
decltype(auto) with_unit_temperature(bool asked, const LossOptions& options, F&& f) {
  using T = AtUnitTemperature;
  if (!asked) return f(std::integral_constant<T, T::kNothing>{});
  if (options.inv_tau == 1) return f(std::integral_constant<T, T::kShared>{});
  return f(std::integral_constant<T, T::kOwn>{});
}

// d (weight loss + ce_weight cross-entropy) / d s, where ce_weight has the factor tau and y's share of the
// target is `target`. A weight of 0 leaves the divergence out, even if its gradient is not finite.
template <typename A, AtUnitTemperature kY>
inline Vec<A> mixed_grad(Vec<A> s, const Terms<A>& terms, Vec<A> weight, Vec<A> max_s, Vec<A> inv_sum_y,
                         Vec<A> ce_weight, Vec<A> target, A tau) {
  Vec<A> p_y = terms.p_s;
  if constexpr (kY == AtUnitTemperature::kOwn) p_y = exp_nonpositive<A>((s - max_s) * tau) * inv_sum_y;
  const Vec<A> of_loss = weight == A(0) ? Vec<A>{} : terms.grad * weight;
  return of_loss + (p_y - target) * ce_weight;
}

}  // namespace minitron::MINITRON_SIMD
