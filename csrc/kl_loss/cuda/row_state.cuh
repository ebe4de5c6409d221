// What is known of a row after some entries of the vocabulary, and how parts of a row merge. One look at each
// logit is then enough for a loss whose terms are all >= 0.
//
// By the chain rule the KL of two parts a and b is p_a KL_a + p_b KL_b, plus the KL of the parts' own
// probabilities (their masses), with a term of the usual form for each part. Runs of a thread, threads, tiles
// of the vocabulary and splits merge by the same rule. Masses are known to 1e-7. So a loss L has an error of
// about 1e-7 sqrt(L), less than that of logits out of an fp32 GEMM.
#pragma once

#include "kl_loss/cuda/divergence.cuh"

namespace minitron::cuda {

template <Divergence kDivergence>
struct RowState {
  OnlineSum student, teacher;
  // KL(X || Y) given that the token is one of these: X, Y = T, S, and for reverse KL S, T. 0 for JSD.
  float kl;

  static constexpr int kFields = 5;  // as stored: max_s, sum_s, max_t, sum_t, kl

  static __device__ __forceinline__ RowState empty() {
    return {OnlineSum::empty(), OnlineSum::empty(), 0.0f};
  }

  template <int N>
  __device__ __forceinline__ void add(const float (&s)[N], const float (&t)[N]) {
    if constexpr (needs_second_look(kDivergence)) {
      student.add(s);
      teacher.add(t);
    } else {
      float exp_s[N];
      *this = merged(of(s, t, exp_s));
    }
  }

  // Of one run alone; also gives exp_s = exp(s - maximum). Its probabilities are divided by sums of the same
  // exponentials, so that the extra parts of the terms sum to 0.
  template <int N>
  static __device__ __forceinline__ RowState of(const float (&s)[N], const float (&t)[N], float (&exp_s)[N]) {
    float exp_t[N];
    RowState run = {OnlineSum::of(s, exp_s), OnlineSum::of(t, exp_t), 0.0f};
    if constexpr (!needs_second_look(kDivergence)) {
      const float (&exp_x)[N] = is_of_student(kDivergence) ? exp_s : exp_t;
      const float (&exp_y)[N] = is_of_student(kDivergence) ? exp_t : exp_s;
      const RowStats stats = RowStats::of(run.student, run.teacher);
      const float scale_x = 1.0f / run.x().sum, scale_y = 1.0f / run.y().sum;
      float kl = 0.0f;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        kl += kl_term(exp_x[i] * scale_x, exp_y[i] * scale_y, x_over_y(stats.log_ratio(s[i], t[i])));
      }
      run.kl = run.settled(kl);
    }
    return run;
  }

  __device__ __forceinline__ RowState merged(const RowState& other) const {
    RowState all = {student.merged(other.student), teacher.merged(other.teacher), 0.0f};
    if constexpr (!needs_second_look(kDivergence)) {
      all.kl = all.settled(all.part_kl(*this) + all.part_kl(other));
    }
    return all;
  }

  __device__ __forceinline__ RowStats stats() const {
    RowStats stats = RowStats::of(student, teacher);
    if constexpr (grad_needs_kl(kDivergence) && !needs_second_look(kDivergence)) stats.kl = loss();
    return stats;
  }
  // Of forward and reverse KL. NaN for a row whose tokens are all masked out.
  __device__ __forceinline__ float loss() const {
    return student.sum == 0.0f || teacher.sum == 0.0f ? NAN : kl;
  }

 private:
  __device__ __forceinline__ const OnlineSum& x() const {
    return is_of_student(kDivergence) ? student : teacher;
  }
  __device__ __forceinline__ const OnlineSum& y() const {
    return is_of_student(kDivergence) ? teacher : student;
  }

  // log p_x - log p_y from d = log p_t - log p_s
  static __device__ __forceinline__ float x_over_y(float d) { return is_of_student(kDivergence) ? -d : d; }

  // KL is 0 where X has no mass, and infinite where only Y has none; a NaN in either survives.
  __device__ __forceinline__ float settled(float kl) const {
    if (x().sum == 0.0f) return 0.0f;
    return y().sum == 0.0f ? x().sum * INFINITY : kl;
  }

  // What a part adds to the KL of the whole, which is this state.
  __device__ __forceinline__ float part_kl(const RowState& part) const {
    const float p = part.x().mass(x().max) / x().sum, q = part.y().mass(y().max) / y().sum;
    // log(p / q) out of maxima and sums: a mass may be too small for a float
    const Zeros zeros = Zeros::of(student.max, teacher.max);
    const float maxima =
        zeros.difference(part.student.max, part.teacher.max) - zeros.difference(student.max, teacher.max);
    const float log_ratio = x_over_y(maxima) + logf((part.x().sum * y().sum) / (part.y().sum * x().sum));
    return kl_term(p, q, log_ratio) + (p == 0.0f ? 0.0f : p * part.kl);
  }
};

}  // namespace minitron::cuda
