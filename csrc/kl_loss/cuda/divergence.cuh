// What one pair of logits adds to a row's loss and gradient, in fp32 registers: forward KL, reverse KL and
// generalised JSD, shared by the kernels on rows of logits and the kernels on tiles of linear_kl_loss.
//
//   s, t: transformed logits (scale, softcap, temperature)
//   d = log p_t - log p_s, the log-ratio of a token: teacher over student, as on the CPU and in Triton
//
// Every loss term is p_x (log p_x - log p_y) + p_y - p_x >= 0. Its extra part p_y - p_x sums to 0 over the
// vocabulary, so nothing cancels in the sum. Near d = 0, where student and teacher agree, the term is
// computed as p_x expm1_minus_x(-d) by a series; an error in lse_s - lse_t then changes the sum only to
// second order. Exponentials are ex2.approx of x log2(e), with a relative error of 2 ulp + 1e-7 |x|, random
// from token to token. x is a difference from the row's maximum, so x <= 0.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "common/cuda/platform.cuh"
#include "kl_loss/loss_options.h"

namespace minitron::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kNear = 0.5f;    // |d| below which the series holds to 1e-7
constexpr float kApart = 16.0f;  // maxima further apart than this are taken off before logits are subtracted

__device__ __forceinline__ float exp_approx(float x) { return exp2_approx(x * kLog2E); }
__device__ __forceinline__ bool masked_out(float logit) { return logit == -INFINITY; }

// cap * tanh(scale * z / cap) / tau, or scale * z / tau. -inf, a masked-out token, stays -inf.
struct LogitTransform {
  float factor;          // scale / tau
  float scale_over_cap;  // 0: no cap
  float cap_over_tau;

  LogitTransform() = default;
  LogitTransform(double scale, double softcap, double inv_tau)
      : factor(static_cast<float>(scale * inv_tau)),
        scale_over_cap(softcap == 0.0 ? 0.0f : static_cast<float>(scale / softcap)),
        cap_over_tau(static_cast<float>(softcap * inv_tau)) {}

  template <int N>
  __device__ __forceinline__ void apply(float (&x)[N]) const {
    if (scale_over_cap != 0.0f) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float y = x[i] * scale_over_cap;
        x[i] = masked_out(y) ? y : tanhf(y) * cap_over_tau;
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] *= factor;
    }
  }

  // The derivative of apply(), d s / d z: scale and temperature, and the softcap's own factor 1 - tanh^2,
  // which needs no z but only the transformed logit s.
  __device__ __forceinline__ float softcap_grad(float s) const {
    if (scale_over_cap == 0.0f) return factor;
    const float ratio = s / cap_over_tau;
    return factor * ((1.0f - ratio) * (1.0f + ratio));
  }
};

// Running maximum and sum of exp(x - maximum). Parts of a row merge by the same rule, in any order.
struct OnlineSum {
  float max, sum;

  // What to subtract for a maximum: a finite number, so that exp(-inf - it) is 0 and not NaN.
  static __device__ __forceinline__ float base(float max) { return fmaxf(max, -FLT_MAX); }
  static __device__ __forceinline__ OnlineSum empty() { return {-INFINITY, 0.0f}; }

  template <int N>
  __device__ __forceinline__ void add(const float (&x)[N]) {
    float top = x[0];
#pragma unroll
    for (int i = 1; i < N; ++i) top = fmaxf(top, x[i]);  // skips a NaN, which the sum then keeps
    if (top > max) {
      sum *= exp_approx(max - top);
      max = top;
    }
    const float zero = base(max);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += exp_approx(x[i] - zero);
  }

  // Of x alone; also gives exps = exp(x - maximum).
  template <int N>
  static __device__ __forceinline__ OnlineSum of(const float (&x)[N], float (&exps)[N]) {
    OnlineSum out = {x[0], 0.0f};
#pragma unroll
    for (int i = 1; i < N; ++i) out.max = fmaxf(out.max, x[i]);
    const float zero = base(out.max);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      exps[i] = exp_approx(x[i] - zero);
      out.sum += exps[i];
    }
    return out;
  }

  // The sum of exp(x - top) for a larger maximum, top.
  __device__ __forceinline__ float mass(float top) const { return sum * exp_approx(max - base(top)); }

  __device__ __forceinline__ OnlineSum merged(const OnlineSum& other) const {
    const float top = fmaxf(max, other.max);
    return {top, mass(top) + other.mass(top)};
  }
};

// What is taken off a row's logits before student and teacher are subtracted. Nothing where the two maxima
// are close: the difference of two similar numbers is exact, and a small log-ratio keeps all its digits. Each
// side's own maximum where they are far apart, as where one model's logits have -1e4 added to them: t - s
// would be rounded to the digits of 1e4. If a side's tokens are all masked out there is no log-ratio.
struct Zeros {
  float s, t;

  static __device__ __forceinline__ Zeros of(float max_s, float max_t) {
    const bool apart = fabsf(max_s - max_t) > kApart;
    return {apart ? max_s : 0.0f, apart ? max_t : 0.0f};
  }
  // t - s, up to a constant of the row
  __device__ __forceinline__ float difference(float s_logit, float t_logit) const {
    return (t_logit - t) - (s_logit - s);
  }
};

// What the loss and the gradient need to know of a whole row: the columns of stats [N, kNumStats].
struct RowStats {
  float max_s, inv_sum_s, max_t, inv_sum_t;
  float lse_diff;  // log(sum_s / sum_t), which is lse_s - lse_t less max_s - max_t
  float kl;        // KL(S || T) for reverse KL, KL(S || M) for JSD, else 0

  // A row whose tokens are all masked out has sum 0 and becomes NaN everywhere, as its softmax does.
  static __device__ __forceinline__ RowStats of(const OnlineSum& s, const OnlineSum& t) {
    return {s.max, 1.0f / s.sum, t.max, 1.0f / t.sum, logf(s.sum / t.sum), 0.0f};
  }
  __device__ __forceinline__ float prob_s(float s) const { return exp_approx(s - max_s) * inv_sum_s; }
  __device__ __forceinline__ float prob_t(float t) const { return exp_approx(t - max_t) * inv_sum_t; }
  // d = log p_t - log p_s
  __device__ __forceinline__ float log_ratio(float s, float t) const {
    const Zeros zeros = Zeros::of(max_s, max_t);  // constant along the row, as is what is added
    return zeros.difference(s, t) + (lse_diff - zeros.difference(max_s, max_t));
  }
};

// e^x - 1 - x for |x| < kNear, by its series. With x = log q - log p it is a term of KL(P || Q) over p:
// p (log p - log q) + q - p = p (e^x - 1 - x).
__device__ __forceinline__ float expm1_minus_x(float x) {
  float y = 1.0f / 40320.0f * x + 1.0f / 5040.0f;
  y = y * x + 1.0f / 720.0f;
  y = y * x + 1.0f / 120.0f;
  y = y * x + 1.0f / 24.0f;
  y = y * x + 1.0f / 6.0f;
  y = y * x + 0.5f;
  return y * x * x;
}

// x - log1p(x) >= 0 for -0.4 < x < 0.7, from log1p(x) = 2 atanh(x / (2 + x)).
__device__ __forceinline__ float x_minus_log1p(float x) {
  const float y = __fdividef(x, 2.0f + x), y2 = y * y;
  float z = 1.0f / 13.0f * y2 + 1.0f / 11.0f;
  z = z * y2 + 1.0f / 9.0f;
  z = z * y2 + 1.0f / 7.0f;
  z = z * y2 + 0.2f;
  z = z * y2 + 1.0f / 3.0f;
  return y * (x - 2.0f * y2 * z);
}

// A token's term of KL(X || Y), p_x log_ratio + p_y - p_x >= 0, with log_ratio = log p_x - log p_y. It is 0
// for p_x = 0, even if the log-ratio is infinite; a NaN survives. p_y is only used far from log_ratio = 0.
__device__ __forceinline__ float kl_term(float p_x, float p_y, float log_ratio) {
  if (fabsf(log_ratio) < kNear) return p_x * expm1_minus_x(-log_ratio);
  return (p_x == 0.0f ? 0.0f : p_x * log_ratio) + (p_y - p_x);
}

// The two models' shares of JSD's mixture M, beta and 1 - beta. Both are kept: for beta near 1, 1 - beta out
// of an fp32 beta would be 0.
struct Shares {
  float teacher, student;

  Shares() = default;
  explicit Shares(double beta)
      : teacher(std::max(static_cast<float>(beta), FLT_MIN)), student(static_cast<float>(1.0 - beta)) {}
};

// The two terms of JSD, summed over the vocabulary.
struct MixtureSums {
  float teacher;  // KL(T || M)
  float student;  // KL(S || M)

  static constexpr int kFields = 2;

  static __device__ __forceinline__ MixtureSums empty() { return {0.0f, 0.0f}; }
  __device__ __forceinline__ MixtureSums merged(const MixtureSums& other) const {
    return {teacher + other.teacher, student + other.student};
  }
  __device__ __forceinline__ float loss(const Shares& shares) const {
    return shares.teacher * teacher + shares.student * student;
  }
};

template <Divergence kDivergence>
struct PairTerms;

template <>
struct PairTerms<Divergence::kForwardKL> {
  // p_s - p_t, for a token that is not masked out
  static __device__ __forceinline__ float grad(float s, float t, const RowStats& row, const Shares&) {
    const float d = row.log_ratio(s, t), p_t = row.prob_t(t);
    if (fabsf(d) < kNear) return p_t * (expm1_minus_x(-d) - d);  // p_t (e^-d - 1)
    return row.prob_s(s) - p_t;
  }

  struct Both {
    float loss, grad;
  };
  // The token's term of the loss too, which has the same parts.
  static __device__ __forceinline__ Both loss_and_grad(float s, float t, const RowStats& row) {
    const float d = row.log_ratio(s, t), p_t = row.prob_t(t);
    if (fabsf(d) < kNear) {
      const float beyond_linear = expm1_minus_x(-d);
      return {p_t * beyond_linear, p_t * (beyond_linear - d)};
    }
    const float p_s = row.prob_s(s);
    return {kl_term(p_t, p_s, d), p_s - p_t};
  }
};

template <>
struct PairTerms<Divergence::kReverseKL> {
  // p_s (log p_s - log p_t - kl)
  static __device__ __forceinline__ float grad(float s, float t, const RowStats& row, const Shares&) {
    const float p_s = row.prob_s(s);
    return p_s == 0.0f ? 0.0f : p_s * (-row.log_ratio(s, t) - row.kl);
  }
};

// The loss is teacher's share KL(T || M) + student's share KL(S || M).
template <>
struct PairTerms<Divergence::kJSD> {
  static __device__ __forceinline__ MixtureSums loss(float s, float t, const RowStats& row,
                                                     const Shares& shares) {
    const Mixed pair(s, t, row, shares);
    const float p = pair.teacher_larger ? row.prob_t(t) : row.prob_s(s);
    const float larger = p * pair.larger_term(), smaller = p * pair.smaller_term();
    return {pair.teacher_larger ? larger : smaller, pair.teacher_larger ? smaller : larger};
  }
  // student's share p_s (log p_s - log m - kl)
  static __device__ __forceinline__ float grad(float s, float t, const RowStats& row, const Shares& shares) {
    const float p_s = row.prob_s(s);
    const Mixed pair(s, t, row, shares);
    const float log_s_over_m = pair.teacher_larger ? pair.log_smaller_over_m() : pair.log_larger_over_m();
    return p_s == 0.0f ? 0.0f : shares.student * p_s * (log_s_over_m - row.kl);
  }

 private:
  // A token as seen from the larger of p_s and p_t; own and other are the shares of the larger model and of
  // the other in M:
  //   smaller = larger e = larger (1 + u)    m = larger (1 + a), a = other u    m = smaller (1 + b)
  // Only b can overflow, to infinity, which is right. Small differences are made by series: for a share near
  // 0 the loss is many digits smaller than the probabilities.
  struct Mixed {
    bool teacher_larger;
    float size, e, u, own, other, a, b;

    __device__ __forceinline__ Mixed(float s, float t, const RowStats& row, const Shares& shares) {
      const float d = masked_out(s) && masked_out(t) ? 0.0f : row.log_ratio(s, t);
      teacher_larger = d > 0.0f;
      own = teacher_larger ? shares.teacher : shares.student;
      other = teacher_larger ? shares.student : shares.teacher;
      size = fabsf(d);
      if (size < kNear) {
        u = expm1_minus_x(-size) - size;
        e = 1.0f + u;
      } else {
        e = exp_approx(-size);
        u = e - 1.0f;
      }
      a = other * u;
      b = own * __fdividef(-u, e);  // e = 0: infinite
    }
    __device__ __forceinline__ bool near_larger() const { return a > -0.4f; }
    __device__ __forceinline__ bool near_smaller() const { return b < 0.7f; }
    __device__ __forceinline__ float log_m_over_larger() const { return logf(own + other * e); }

    // The token's terms of KL(larger || M) and KL(smaller || M), divided by the larger probability.
    __device__ __forceinline__ float larger_term() const {
      return near_larger() ? x_minus_log1p(a) : a - log_m_over_larger();
    }
    __device__ __forceinline__ float smaller_term() const {
      if (near_smaller()) return e * x_minus_log1p(b);
      return (e == 0.0f ? 0.0f : e * (-size - log_m_over_larger())) - own * u;
    }
    __device__ __forceinline__ float log_larger_over_m() const {
      return near_larger() ? x_minus_log1p(a) - a : -log_m_over_larger();
    }
    __device__ __forceinline__ float log_smaller_over_m() const {
      return near_smaller() ? x_minus_log1p(b) - b : -size - log_m_over_larger();
    }
  };
};

}  // namespace minitron::cuda
