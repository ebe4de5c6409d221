// Row divergences of two matrices of logits, and their gradient to the student's.
//
//   forward   grid (N), one block a row. Reads each logit once. For JSD twice, as M is known only after the
//             sums; then backwards, to meet first what the caches still hold. Writes O(1).
//   backward  grid (N, parts of a row). Reads each logit once, writes each gradient once, padding included.
//             Also dz of linear_kl_loss, in the dtype of its GEMMs.
//
// Nothing depends on the order in which threads run: results are bitwise equal from run to run.
#pragma once

#include <cstdint>

#include "common/cuda/reduce.cuh"
#include "kl_loss/cuda/row_pairs.cuh"
#include "kl_loss/cuda/row_state.cuh"

namespace minitron::cuda {

constexpr int kStateThreads = 256;    // most in a block that makes states
constexpr int kStateBlocksPerSM = 2;  // at most 128 registers a thread: 16 logits a side stay in them
constexpr int kPairsAtOnce = 16;      // a thread merges so many tokens at a time
constexpr int kGradThreads = 512;
constexpr int kGradBlocksPerSM = 3;  // at most 40 registers a thread

// The state of a whole row, in every thread; begun, in thread 0, with that of earlier tokens. partial: shared
// memory for kMaxWarps states.
template <KlKind kKind, typename S, typename T>
__device__ __forceinline__ RowState<kKind> row_state(const PairRow<S, T>& pairs, RowState<kKind> begun,
                                                     RowState<kKind>* partial) {
  pairs.template for_each_several<kPairsAtOnce / kRunOf<S, T>>(
      threadIdx.x, blockDim.x, [&](const auto& s, const auto& t) { begun.add(s, t); });
  return block_reduce(begun, RowState<kKind>::empty(), partial,
                      [](const auto& a, const auto& b) { return a.merged(b); });
}

// Likewise the sums of JSD's terms.
template <typename S, typename T>
__device__ __forceinline__ MixtureSums row_mixture(const PairRow<S, T>& pairs, const RowStats& stats,
                                                   MixtureSums begun, MixtureSums* partial) {
  pairs.template for_each<true>(threadIdx.x, blockDim.x, [&](int, const auto& s, const auto& t) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(s) / sizeof(float)); ++i) {
      begun = begun.merged(PairTerms<KlKind::kJsd>::loss(s[i], t[i], stats, pairs.options.shares));
    }
  });
  return block_reduce(begun, MixtureSums::empty(), partial,
                      [](const auto& a, const auto& b) { return a.merged(b); });
}

__device__ __forceinline__ RowStats load_stats(const float* in) {
  return {load_scalar<true>(in),     load_scalar<true>(in + 1), load_scalar<true>(in + 2),
          load_scalar<true>(in + 3), load_scalar<true>(in + 4), load_scalar<true>(in + 5)};
}
__device__ __forceinline__ void store_stats(float* out, const RowStats& stats) {
  const float fields[] = {stats.max_s,     stats.inv_sum_s, stats.max_t,
                          stats.inv_sum_t, stats.log_sums,  stats.kl};
  for (int i = 0; i < RowStats::kFields; ++i) store_scalar(out + i, fields[i]);
}

template <KlKind kKind, typename S, typename T>
__global__ void __launch_bounds__(kStateThreads, kStateBlocksPerSM)
    kl_forward_kernel(KlRows<S, T> rows, KlOptions options, float* __restrict__ loss,  // (N)
                      float* __restrict__ stats) {  // (N, RowStats::kFields)
  MINITRON_SHARED(RowState<kKind>, partial_states, kMaxWarps);
  const int64_t row = blockIdx.x;
  float* out = stats + row * RowStats::kFields;
  if (!rows.counts(row)) {
    if (threadIdx.x == 0) {
      store_scalar(loss + row, 0.0f);
      store_stats(out, RowStats{});
    }
    return;
  }
  const PairRow<S, T> pairs(rows, row, options);
  const RowState<kKind> state = row_state(pairs, RowState<kKind>::empty(), partial_states);
  RowStats stat = state.stats();
  float value = state.loss();
  if constexpr (kKind == KlKind::kJsd) {
    MINITRON_SHARED(MixtureSums, partial_sums, kMaxWarps);
    const MixtureSums sums = row_mixture(pairs, stat, MixtureSums::empty(), partial_sums);
    stat.kl = sums.student;
    value = sums.loss(options.shares);
  }
  if (threadIdx.x == 0) {
    store_scalar(loss + row, value);
    store_stats(out, stat);
  }
}

template <KlKind kKind, typename S, typename T, typename G>
__global__ void __launch_bounds__(kGradThreads, kGradBlocksPerSM)
    kl_backward_kernel(KlRows<S, T> rows, KlOptions options, const float* __restrict__ grad_loss,  // (N)
                       int64_t grad_loss_stride, const float* __restrict__ stats,  // (N, RowStats::kFields)
                       G* __restrict__ grad_student, int64_t grad_stride, int columns) {  // (N, columns)
  const int64_t row = blockIdx.x;
  const int begin = blockIdx.y * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.x;
  G* grad = grad_student + row * grad_stride;
  if (!rows.counts(row)) return fill_zero(grad, columns, begin, step);

  const RowStats stat = load_stats(stats + row * RowStats::kFields);
  const float weight = load_scalar<true>(grad_loss + row * grad_loss_stride);
  PairRow<S, T, kRunOf<S, T, G>>(rows, row, options)
      .template for_each<false>(begin, step, [&](int column, const auto& s, const auto& t) {
        constexpr int kCount = sizeof(s) / sizeof(float);
        float g[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          g[i] = PairTerms<kKind>::grad(s[i], t[i], stat, options.shares) *
                 (weight * options.student.slope(s[i]));
          if (impossible(s[i])) g[i] = 0.0f;
        }
        if constexpr (kCount == 1) {
          store_scalar(grad + column, from_float<G>(g[0]));
        } else {
          store_run(grad + column, aligned16(grad + column), g);
        }
      });
  fill_zero(grad + options.vocab_size, columns - options.vocab_size, begin, step);
}

}  // namespace minitron::cuda
