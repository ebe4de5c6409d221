// What one pair of logits adds to a row's loss and gradient, in fp32 registers: forward KL, reverse KL and
// generalised JSD, shared by the kernels on rows of logits and the kernels on tiles of linear_kl_loss.
//
//   s, t: transformed logits (scale, softcap, temperature)     d = lt - ls = (t - s) + (lse_s - lse_t)
//
// Every loss term is p_X (log p_X - log p_Y) + p_Y - p_X >= 0, whose extra parts sum to 0 over the
// vocabulary: nothing cancels in the sum. Near d = 0, where student and teacher agree, a term is p (d +
// exp(-d) - 1) by its series; the sum is then insensitive to first order to an error in lse_s - lse_t.
// Exponentials are ex2.approx of x log2(e): relative error 2 ulp + 1e-7 |x|, random from token to token; exp
// of a difference from the row's maximum, so x <= 0.
#pragma once

#include <cfloat>
#include <cmath>

#include "common/cuda_platform.cuh"

namespace minitron::cuda {

enum class KlKind { kForward, kReverse, kJsd };

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kNear = 0.5f;  // |d| below which the series holds to 1e-7

__device__ __forceinline__ float exp_approx(float x) { return exp2_approx(x * kLog2E); }
__device__ __forceinline__ bool impossible(float logit) { return logit == -INFINITY; }

// cap * tanh(scale * z / cap) / tau, or scale * z / tau. -inf, an impossible token, stays -inf.
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
        x[i] = impossible(y) ? y : tanhf(y) * cap_over_tau;
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] *= factor;
    }
  }

  // d s / d z at the transformed logit s
  __device__ __forceinline__ float slope(float s) const {
    if (scale_over_cap == 0.0f) return factor;
    const float ratio = s / cap_over_tau;
    return factor * ((1.0f - ratio) * (1.0f + ratio));
  }
};

// Running maximum and sum of exp(x - maximum). Parts of a row, seen in any order, merge by the same rule.
struct OnlineSum {
  float max, sum;

  // subtracted in place of a maximum of -inf, so that exp(-inf - it) is 0 and not NaN
  static __device__ __forceinline__ float base(float max) { return fmaxf(max, -FLT_MAX); }
  static __device__ __forceinline__ OnlineSum empty() { return {-INFINITY, 0.0f}; }

  template <int N>
  __device__ __forceinline__ void add(const float (&x)[N]) {
    float top = x[0];
#pragma unroll
    for (int i = 1; i < N; ++i) top = fmaxf(top, x[i]);  // passes over NaN, which the sum then keeps
    if (top > max) {
      sum *= exp_approx(max - top);
      max = top;
    }
    const float zero = base(max);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += exp_approx(x[i] - zero);
  }

  // x by itself; exps: exp(x - maximum)
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

  // The sum against another, no smaller maximum.
  __device__ __forceinline__ float mass(float top) const { return sum * exp_approx(max - base(top)); }

  __device__ __forceinline__ OnlineSum merged(const OnlineSum& other) const {
    const float top = fmaxf(max, other.max);
    return {top, mass(top) + other.mass(top)};
  }
};

// What the loss and the gradient need to know of a whole row; as stored in stats [N, 6].
struct RowStats {
  float max_s, inv_sum_s, max_t, inv_sum_t;
  float gap;  // lse_s - lse_t
  float kl;   // KL(S || T) for reverse KL, KL(S || M) for JSD

  static constexpr int kFields = 6;

  // A row impossible throughout has sum 0 and becomes NaN everywhere, as a softmax of it is.
  static __device__ __forceinline__ RowStats of(const OnlineSum& s, const OnlineSum& t) {
    return {s.max, 1.0f / s.sum, t.max, 1.0f / t.sum, (s.max - t.max) + logf(s.sum / t.sum), 0.0f};
  }
  __device__ __forceinline__ float prob_s(float s) const { return exp_approx(s - max_s) * inv_sum_s; }
  __device__ __forceinline__ float prob_t(float t) const { return exp_approx(t - max_t) * inv_sum_t; }
  __device__ __forceinline__ float log_ratio(float s, float t) const { return (t - s) + gap; }
};

// d + exp(-d) - 1 for |d| < kNear
__device__ __forceinline__ float bregman_near(float d) {
  float y = -1.0f / 40320.0f * d + 1.0f / 5040.0f;
  y = y * -d + 1.0f / 720.0f;
  y = y * -d + 1.0f / 120.0f;
  y = y * -d + 1.0f / 24.0f;
  y = y * -d + 1.0f / 6.0f;
  y = y * -d + 0.5f;
  return y * d * d;
}

// a - log1p(a) >= 0 for -0.4 < a < 0.7, from log1p(a) = 2 atanh(a / (2 + a))
__device__ __forceinline__ float log1p_gap_near(float a) {
  const float y = __fdividef(a, 2.0f + a), y2 = y * y;
  float z = 1.0f / 13.0f * y2 + 1.0f / 11.0f;
  z = z * y2 + 1.0f / 9.0f;
  z = z * y2 + 1.0f / 7.0f;
  z = z * y2 + 0.2f;
  z = z * y2 + 1.0f / 3.0f;
  return y * (a - 2.0f * y2 * z);
}

// p_x d + p_y - p_x >= 0, a term of KL(X || Y), with d = log p_x - log p_y. p = 0 wins over an infinite d; a
// NaN survives. p_y is used far from d = 0 alone.
__device__ __forceinline__ float kl_term(float p_x, float p_y, float d) {
  if (fabsf(d) < kNear) return p_x * bregman_near(d);
  return (p_x == 0.0f ? 0.0f : p_x * d) + (p_y - p_x);
}

// JSD's two halves, summed over the vocabulary.
struct MixtureSums {
  float teacher;  // KL(T || M)
  float student;  // KL(S || M)

  static constexpr int kFields = 2;

  static __device__ __forceinline__ MixtureSums empty() { return {0.0f, 0.0f}; }
  __device__ __forceinline__ MixtureSums merged(const MixtureSums& other) const {
    return {teacher + other.teacher, student + other.student};
  }
  __device__ __forceinline__ float loss(float beta) const { return beta * teacher + (1.0f - beta) * student; }
};

template <KlKind kKind>
struct PairTerms;

template <>
struct PairTerms<KlKind::kForward> {
  // d loss / d s = p_s - p_t, for a possible token
  static __device__ __forceinline__ float grad(float s, float t, const RowStats& row, float) {
    const float d = row.log_ratio(s, t), p_t = row.prob_t(t);
    if (fabsf(d) < kNear) return p_t * (bregman_near(d) - d);  // p_t expm1(-d)
    return row.prob_s(s) - p_t;
  }
};

template <>
struct PairTerms<KlKind::kReverse> {
  // p_s (ls - lt - kl)
  static __device__ __forceinline__ float grad(float s, float t, const RowStats& row, float) {
    const float p_s = row.prob_s(s);
    return p_s == 0.0f ? 0.0f : p_s * (-row.log_ratio(s, t) - row.kl);
  }
};

// M = beta T + (1 - beta) S, loss = beta KL(T || M) + (1 - beta) KL(S || M), 0 < beta < 1.
template <>
struct PairTerms<KlKind::kJsd> {
  static __device__ __forceinline__ float log_ratio(float s, float t, const RowStats& row) {
    return impossible(s) && impossible(t) ? 0.0f : row.log_ratio(s, t);
  }

  // Far from d = 0 all is told by the larger of p_s and p_t and by e = smaller / larger, which cannot
  // overflow: m = larger (1 + a), a = weight of the smaller * (e - 1).
  static __device__ __forceinline__ MixtureSums loss(float s, float t, const RowStats& row, float beta) {
    const float d = log_ratio(s, t, row);
    if (fabsf(d) < kNear) {
      const float p_t = row.prob_t(t), u = bregman_near(d) - d;           // p_s / p_t - 1
      const float one_plus_u = 1.0f + u, v = __fdividef(-u, one_plus_u);  // p_t / p_s - 1
      return {p_t * log1p_gap_near((1.0f - beta) * u), p_t * one_plus_u * log1p_gap_near(beta * v)};
    }
    const bool teacher_larger = d > 0.0f;
    const float p = teacher_larger ? row.prob_t(t) : row.prob_s(s);
    const float e = exp_approx(-fabsf(d));
    const float a = (teacher_larger ? 1.0f - beta : beta) * (e - 1.0f), g = log1pf(a);
    const float larger = p * (a - g);
    const float smaller = p * ((e == 0.0f ? 0.0f : e * (-fabsf(d) - g)) + (1.0f + a - e));
    return {teacher_larger ? larger : smaller, teacher_larger ? smaller : larger};
  }
  // (1 - beta) p_s (ls - lm - kl)
  static __device__ __forceinline__ float grad(float s, float t, const RowStats& row, float beta) {
    const float d = log_ratio(s, t, row), p_s = row.prob_s(s);
    float ls_minus_lm;
    if (fabsf(d) < kNear) {
      const float w = bregman_near(-d) + d, b = beta * w;  // w = expm1(d)
      ls_minus_lm = log1p_gap_near(b) - b;
    } else {
      const bool teacher_larger = d > 0.0f;
      const float g = log1pf((teacher_larger ? 1.0f - beta : beta) * (exp_approx(-fabsf(d)) - 1.0f));
      ls_minus_lm = (teacher_larger ? -d : 0.0f) - g;
    }
    return p_s == 0.0f ? 0.0f : (1.0f - beta) * p_s * (ls_minus_lm - row.kl);
  }
};

}  // namespace minitron::cuda
