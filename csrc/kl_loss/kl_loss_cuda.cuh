// Row divergences of two matrices of logits, and their gradient to the student's.
//
//   forward   grid (N), one block a row. Two passes over both rows: maxima and sums of exp, then the loss.
//   The second
//             runs backwards, so that it meets first what the caches still hold. Reads each logit twice,
//             writes O(1).
//   backward  grid (N, parts of a row). One pass: reads each logit once, writes each gradient once, padding
//   included.
//
// Nothing depends on the order in which threads run: results are bitwise equal from run to run.
#pragma once

#include <cstdint>

#include "common/cuda_reduce.cuh"
#include "common/cuda_vec.cuh"
#include "kl_loss/divergence_cuda.cuh"

namespace minitron::cuda {

constexpr int kMaxThreads = 512;
constexpr int kBlocksPerSM = 3;  // with kMaxThreads: at most 40 registers a thread

template <typename S, typename T>
struct KlRows {
  const S* student;                                     // (N, >= vocab_size), stride 1 in the vocabulary
  const T* teacher;                                     // likewise
  const bool* mask;                                     // (N) or null; false: the row's logits are not read
  int64_t student_stride, teacher_stride, mask_stride;  // elements from row to row

  __device__ __forceinline__ bool counts(int64_t row) const {
    return mask == nullptr || load_scalar<true>(mask + row * mask_stride);
  }
};

struct KlOptions {
  int vocab_size;  // columns from here on are padding
  float beta;
  LogitTransform student, teacher;
};

template <typename S, typename T>
constexpr int kPairRun = 16 / (sizeof(S) < sizeof(T) ? sizeof(S) : sizeof(T));

// Maximum and sum of exp of a row, this thread's share of it.
template <typename T>
__device__ __forceinline__ OnlineSum online_sum(const T* row, int n, const LogitTransform& transform) {
  constexpr int kRun = 16 / sizeof(T);
  const RowSplit<kRun, T> split(row, n);
  OnlineSum sum = OnlineSum::empty();
#pragma unroll 2
  for (int run = threadIdx.x; run < split.runs; run += blockDim.x) {
    float x[kRun];
    load_run(row + split.run_start(run), true, x);
    transform.apply(x);
    sum.add(x);
  }
  for (int i = threadIdx.x; i < split.rest; i += blockDim.x) {
    float x[1] = {to_float(load_scalar<true>(row + split.rest_index(i)))};
    transform.apply(x);
    sum.add(x);
  }
  return sum;
}

// Calls visit(column, s, t) with arrays of transformed logits, for the runs begin, begin + step, ... The
// student's runs are aligned; the teacher's are read one by one where they are not aligned alike.
template <bool kBackwards, typename S, typename T, typename Visit>
__device__ __forceinline__ void for_each_pair(const S* student, const T* teacher, const KlOptions& options,
                                              int begin, int step, Visit visit) {
  constexpr int kRun = kPairRun<S, T>;
  const RowSplit<kRun, S> split(student, options.vocab_size);
  const bool teacher_aligned = aligned16(teacher + split.head);
  for (int run = begin; run < split.runs; run += step) {
    const int column = split.run_start(kBackwards ? split.runs - 1 - run : run);
    float s[kRun], t[kRun];
    load_run(student + column, true, s);
    load_run(teacher + column, teacher_aligned, t);
    options.student.apply(s);
    options.teacher.apply(t);
    visit(column, s, t);
  }
  for (int i = begin; i < split.rest; i += step) {
    const int column = split.rest_index(i);
    float s[1] = {to_float(load_scalar<true>(student + column))};
    float t[1] = {to_float(load_scalar<true>(teacher + column))};
    options.student.apply(s);
    options.teacher.apply(t);
    visit(column, s, t);
  }
}

template <KlKind kKind, typename S, typename T>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSM)
    kl_forward_kernel(KlRows<S, T> rows, KlOptions options, float* __restrict__ loss,  // (N)
                      float* __restrict__ stats) {  // (N, RowStats::kFields)
  MINITRON_SHARED(RowSums, partial_sums, kMaxWarps);
  MINITRON_SHARED(LossSums, partial_loss, kMaxWarps);
  const int64_t row = blockIdx.x;
  float* out = stats + row * RowStats::kFields;
  if (!rows.counts(row)) {
    if (threadIdx.x == 0) {
      store_scalar(loss + row, 0.0f);
      for (int i = 0; i < RowStats::kFields; ++i) store_scalar(out + i, 0.0f);
    }
    return;
  }
  const S* student = rows.student + row * rows.student_stride;
  const T* teacher = rows.teacher + row * rows.teacher_stride;

  const RowSums own = {online_sum(student, options.vocab_size, options.student),
                       online_sum(teacher, options.vocab_size, options.teacher)};
  const RowSums sums = block_reduce(own, RowSums{OnlineSum::empty(), OnlineSum::empty()}, partial_sums,
                                    [](const RowSums& a, const RowSums& b) { return a.merged(b); });
  RowStats stat = RowStats::of(sums);

  LossSums terms = {0.0f, 0.0f};
  for_each_pair<true>(student, teacher, options, threadIdx.x, blockDim.x,
                      [&](int, const auto& s, const auto& t) {
#pragma unroll
                        for (int i = 0; i < static_cast<int>(sizeof(s) / sizeof(float)); ++i) {
                          terms = terms.merged(PairTerms<kKind>::loss(s[i], t[i], stat, options.beta));
                        }
                      });
  terms = block_reduce(terms, LossSums{0.0f, 0.0f}, partial_loss,
                       [](const LossSums& a, const LossSums& b) { return a.merged(b); });
  if (threadIdx.x == 0) {
    stat.kl = PairTerms<kKind>::kl(terms);
    store_scalar(loss + row, PairTerms<kKind>::total(terms, options.beta));
    const float fields[] = {stat.max_s, stat.inv_sum_s, stat.max_t, stat.inv_sum_t, stat.gap, stat.kl};
    for (int i = 0; i < RowStats::kFields; ++i) store_scalar(out + i, fields[i]);
  }
}

template <KlKind kKind, typename S, typename T>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSM)
    kl_backward_kernel(KlRows<S, T> rows, KlOptions options, const float* __restrict__ grad_loss,  // (N)
                       int64_t grad_loss_stride, const float* __restrict__ stats,  // (N, RowStats::kFields)
                       S* __restrict__ grad_student, int columns) {                // (N, columns), contiguous
  const int64_t row = blockIdx.x;
  const int begin = blockIdx.y * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.x;
  S* grad = grad_student + row * columns;
  if (!rows.counts(row)) return fill_zero(grad, columns, begin, step);

  const float* in = stats + row * RowStats::kFields;
  const RowStats stat = {load_scalar<true>(in),     load_scalar<true>(in + 1), load_scalar<true>(in + 2),
                         load_scalar<true>(in + 3), load_scalar<true>(in + 4), load_scalar<true>(in + 5)};
  const float weight = load_scalar<true>(grad_loss + row * grad_loss_stride);
  for_each_pair<false>(rows.student + row * rows.student_stride, rows.teacher + row * rows.teacher_stride,
                       options, begin, step, [&](int column, const auto& s, const auto& t) {
                         constexpr int kRun = sizeof(s) / sizeof(float);
                         float g[kRun];
#pragma unroll
                         for (int i = 0; i < kRun; ++i) {
                           g[i] = PairTerms<kKind>::grad(s[i], t[i], stat, options.beta) *
                                  (weight * options.student.slope(s[i]));
                           if (impossible(s[i])) g[i] = 0.0f;
                         }
                         if constexpr (kRun == 1) {
                           store_scalar(grad + column, from_float<S>(g[0]));
                         } else {
                           store_run(grad + column, aligned16(grad + column), g);
                         }
                       });
  fill_zero(grad + options.vocab_size, columns - options.vocab_size, begin, step);
}

}  // namespace minitron::cuda
