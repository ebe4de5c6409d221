// What one pair of logits adds to a row's loss and gradient, in fp32 registers: forward KL, reverse KL and
// generalised JSD, shared by the kernels on rows of logits and the kernels on tiles of linear_kl_loss.
//
//   s, t: transformed logits (scale, softcap, temperature)     d = lt - ls, the log-ratio of a token
//
// Every loss term is p_X (log p_X - log p_Y) + p_Y - p_X >= 0, whose extra parts sum to 0 over the
// vocabulary: nothing cancels in the sum. Near d = 0, where student and teacher agree, a term is p (d +
// exp(-d) - 1) by its series; the sum is then insensitive to first order to an error in lse_s - lse_t.
// Exponentials are ex2.approx of x log2(e): relative error 2 ulp + 1e-7 |x|, random from token to token; exp
// of a difference from the row's maximum, so x <= 0.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "common/cuda/platform.cuh"

namespace minitron::cuda {

enum class KlKind { kForward, kReverse, kJsd };

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kNear = 0.5f;    // |d| below which the series holds to 1e-7
constexpr float kApart = 16.0f;  // maxima further apart than this are taken off before logits are subtracted

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

// Where a row's logits are measured from before those of student and teacher are subtracted. From 0 where the
// maxima lie close: the difference of two like numbers is exact, and a small log-ratio keeps all its digits.
// From each side's own maximum where they lie far apart, as after -1e4 in a whole stretch of one model's
// logits: t - s would be rounded to the digits of 1e4. Where a side has no possible token there is no
// log-ratio.
struct Zeros {
  float s, t;

  static __device__ __forceinline__ Zeros of(float max_s, float max_t) {
    const bool apart = fabsf(max_s - max_t) > kApart;
    return {apart ? max_s : 0.0f, apart ? max_t : 0.0f};
  }
  // t - s, but for a constant of the row
  __device__ __forceinline__ float difference(float s_logit, float t_logit) const {
    return (t_logit - t) - (s_logit - s);
  }
};

// What the loss and the gradient need to know of a whole row; as stored in stats [N, 6].
struct RowStats {
  float max_s, inv_sum_s, max_t, inv_sum_t;
  float log_sums;  // log (sum_s / sum_t)
  float kl;        // KL(S || T) for reverse KL, KL(S || M) for JSD

  static constexpr int kFields = 6;

  // A row impossible throughout has sum 0 and becomes NaN everywhere, as a softmax of it is.
  static __device__ __forceinline__ RowStats of(const OnlineSum& s, const OnlineSum& t) {
    return {s.max, 1.0f / s.sum, t.max, 1.0f / t.sum, logf(s.sum / t.sum), 0.0f};
  }
  __device__ __forceinline__ float prob_s(float s) const { return exp_approx(s - max_s) * inv_sum_s; }
  __device__ __forceinline__ float prob_t(float t) const { return exp_approx(t - max_t) * inv_sum_t; }
  // lt - ls
  __device__ __forceinline__ float log_ratio(float s, float t) const {
    const Zeros zeros = Zeros::of(max_s, max_t);  // the row's, as is what is added: found once
    return zeros.difference(s, t) + (log_sums - zeros.difference(max_s, max_t));
  }
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

// M = teacher T + student S, the mixture of JSD. Both are kept: 1 - beta in fp32 would be 0 next to 1.
struct Shares {
  float teacher, student;

  Shares() = default;
  explicit Shares(double beta)
      : teacher(std::max(static_cast<float>(beta), FLT_MIN)), student(static_cast<float>(1.0 - beta)) {}
};

// JSD's two halves, summed over the vocabulary.
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

template <KlKind kKind>
struct PairTerms;

template <>
struct PairTerms<KlKind::kForward> {
  // d loss / d s = p_s - p_t, for a possible token
  static __device__ __forceinline__ float grad(float s, float t, const RowStats& row, const Shares&) {
    const float d = row.log_ratio(s, t), p_t = row.prob_t(t);
    if (fabsf(d) < kNear) return p_t * (bregman_near(d) - d);  // p_t expm1(-d)
    return row.prob_s(s) - p_t;
  }
};

template <>
struct PairTerms<KlKind::kReverse> {
  // p_s (ls - lt - kl)
  static __device__ __forceinline__ float grad(float s, float t, const RowStats& row, const Shares&) {
    const float p_s = row.prob_s(s);
    return p_s == 0.0f ? 0.0f : p_s * (-row.log_ratio(s, t) - row.kl);
  }
};

// loss = share_t KL(T || M) + share_s KL(S || M)
template <>
struct PairTerms<KlKind::kJsd> {
  static __device__ __forceinline__ MixtureSums loss(float s, float t, const RowStats& row,
                                                     const Shares& shares) {
    const Mixed pair(s, t, row, shares);
    const float p = pair.teacher_larger ? row.prob_t(t) : row.prob_s(s);
    const float larger = p * pair.larger_gap(), smaller = p * pair.smaller_gap();
    return {pair.teacher_larger ? larger : smaller, pair.teacher_larger ? smaller : larger};
  }
  // share_s p_s (ls - lm - kl)
  static __device__ __forceinline__ float grad(float s, float t, const RowStats& row, const Shares& shares) {
    const float p_s = row.prob_s(s);
    const Mixed pair(s, t, row, shares);
    const float ls_minus_lm = pair.teacher_larger ? pair.log_smaller_over_m() : pair.log_larger_over_m();
    return p_s == 0.0f ? 0.0f : shares.student * p_s * (ls_minus_lm - row.kl);
  }

 private:
  // A token by the larger of p_s and p_t, its log-ratio and the shares of the larger and of the other in M:
  //   smaller = larger e = larger (1 + u)    m = larger (1 + a), a = other u    m = smaller (1 + b)
  // Nothing overflows but b, and that to infinity. What is small is made by series: for a share near 0 the
  // loss lies many digits below the probabilities.
  struct Mixed {
    bool teacher_larger;
    float size, e, u, own, other, a, b;

    __device__ __forceinline__ Mixed(float s, float t, const RowStats& row, const Shares& shares) {
      const float d = impossible(s) && impossible(t) ? 0.0f : row.log_ratio(s, t);
      teacher_larger = d > 0.0f;
      own = teacher_larger ? shares.teacher : shares.student;
      other = teacher_larger ? shares.student : shares.teacher;
      size = fabsf(d);
      if (size < kNear) {
        u = bregman_near(size) - size;
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

    // Terms of KL(larger || M) and KL(smaller || M), over the larger probability.
    __device__ __forceinline__ float larger_gap() const {
      return near_larger() ? log1p_gap_near(a) : a - log_m_over_larger();
    }
    __device__ __forceinline__ float smaller_gap() const {
      if (near_smaller()) return e * log1p_gap_near(b);
      return (e == 0.0f ? 0.0f : e * (-size - log_m_over_larger())) - own * u;
    }
    __device__ __forceinline__ float log_larger_over_m() const {
      return near_larger() ? log1p_gap_near(a) - a : -log_m_over_larger();
    }
    __device__ __forceinline__ float log_smaller_over_m() const {
      return near_smaller() ? log1p_gap_near(b) - b : -size - log_m_over_larger();
    }
  };
};

}  // namespace minitron::cuda
