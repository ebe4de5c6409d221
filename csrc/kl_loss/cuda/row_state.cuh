// What is known of a row after some of its tokens, and how parts of a row merge: one look at each logit is
// then enough for a loss whose terms are all >= 0.
//
// By the chain rule the KL of two parts a and b is p_a KL_a + p_b KL_b plus the KL of their masses, a term of
// the usual form for each: d = log (mass of X / mass of Y). Runs of a thread, threads, tiles of the
// vocabulary and splits merge by the same rule. Masses are known to 1e-7, which leaves a loss L an error of
// about 1e-7 sqrt(L), less than that of logits out of an fp32 GEMM.
#pragma once

#include "kl_loss/cuda/divergence.cuh"

namespace minitron::cuda {

template <KlKind kKind>
struct RowState {
  OnlineSum student, teacher;
  float kl;  // KL(X || Y) given that the token is one of these; X, Y = T, S, for reverse KL S, T; JSD: 0

  static constexpr int kFields = 5;  // as stored: max_s, sum_s, max_t, sum_t, kl

  static __device__ __forceinline__ RowState empty() {
    return {OnlineSum::empty(), OnlineSum::empty(), 0.0f};
  }

  template <int N>
  __device__ __forceinline__ void add(const float (&s)[N], const float (&t)[N]) {
    if constexpr (kKind == KlKind::kJsd) {
      student.add(s);
      teacher.add(t);
    } else {
      *this = merged(of(s, t));
    }
  }

  __device__ __forceinline__ RowState merged(const RowState& other) const {
    RowState all = {student.merged(other.student), teacher.merged(other.teacher), 0.0f};
    if constexpr (kKind != KlKind::kJsd) {
      all.kl = all.settled(all.part_kl(*this) + all.part_kl(other));
    }
    return all;
  }

  __device__ __forceinline__ RowStats stats() const {
    RowStats stats = RowStats::of(student, teacher);
    if constexpr (kKind == KlKind::kReverse) stats.kl = loss();
    return stats;
  }
  // Forward and reverse KL. NaN for a row impossible throughout.
  __device__ __forceinline__ float loss() const {
    return student.sum == 0.0f || teacher.sum == 0.0f ? NAN : kl;
  }

 private:
  __device__ __forceinline__ const OnlineSum& x() const {
    return kKind == KlKind::kReverse ? student : teacher;
  }
  __device__ __forceinline__ const OnlineSum& y() const {
    return kKind == KlKind::kReverse ? teacher : student;
  }

  // log (x / y) out of log (t / s)
  static __device__ __forceinline__ float of_x(float log_ratio) {
    return kKind == KlKind::kReverse ? -log_ratio : log_ratio;
  }

  // One run by itself. The sums are the exponentials' own, so that the terms' extra parts still sum to 0.
  template <int N>
  static __device__ __forceinline__ RowState of(const float (&s)[N], const float (&t)[N]) {
    float exp_s[N], exp_t[N];
    RowState run = {OnlineSum::of(s, exp_s), OnlineSum::of(t, exp_t), 0.0f};
    const float (&exp_x)[N] = kKind == KlKind::kReverse ? exp_s : exp_t;
    const float (&exp_y)[N] = kKind == KlKind::kReverse ? exp_t : exp_s;
    const RowStats stats = RowStats::of(run.student, run.teacher);
    const float scale_x = 1.0f / run.x().sum, scale_y = 1.0f / run.y().sum;
    float kl = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      kl += kl_term(exp_x[i] * scale_x, exp_y[i] * scale_y, of_x(stats.log_ratio(s[i], t[i])));
    }
    run.kl = run.settled(kl);
    return run;
  }

  // KL is 0 where X has no mass, and infinite where Y alone has none; a NaN in either survives.
  __device__ __forceinline__ float settled(float kl) const {
    if (x().sum == 0.0f) return 0.0f;
    return y().sum == 0.0f ? x().sum * INFINITY : kl;
  }

  // What a part adds to the KL of this whole.
  __device__ __forceinline__ float part_kl(const RowState& part) const {
    const float p = part.x().mass(x().max) / x().sum, q = part.y().mass(y().max) / y().sum;
    // log (p / q), also where a mass is too small for a float
    const Zeros zeros = Zeros::of(student.max, teacher.max);
    const float maxima =
        zeros.difference(part.student.max, part.teacher.max) - zeros.difference(student.max, teacher.max);
    const float d = of_x(maxima) + logf((part.x().sum * y().sum) / (part.y().sum * x().sum));
    return kl_term(p, q, d) + (p == 0.0f ? 0.0f : p * part.kl);
  }
};

}  // namespace minitron::cuda
