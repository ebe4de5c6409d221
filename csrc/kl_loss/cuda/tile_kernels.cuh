// Epilogues of linear_kl_loss on a tile of the vocabulary, out of an fp32 GEMM; what takes whole rows is in
// row_kernels.cuh.
//
//   tile_stats    grid (N), one block a row: merges a tile into the state (5, N) of its rows.
//   tile_mixture  grid (N), one block a row: adds a tile's terms of JSD to the sums (2, N), from final stats.
//   finish_*      one thread a row: states (splits, 5, N) or sums (splits, 2, N), merged in order.
//
// Each logit is read once; a state is read and written once a tile.
#pragma once

#include "kl_loss/cuda/row_kernels.cuh"

namespace minitron::cuda {

constexpr int kFinishThreads = 128;

// A struct of floats, each in its own row of a matrix: RowState, MixtureSums.
template <typename V>
__device__ __forceinline__ V load_fields(const float* column, int64_t stride) {
  static_assert(sizeof(V) == V::kFields * sizeof(float));
  float fields[V::kFields];
#pragma unroll
  for (int i = 0; i < V::kFields; ++i) fields[i] = load_scalar<false>(column + i * stride);
  V out;
  memcpy(&out, fields, sizeof(V));
  return out;
}
template <typename V>
__device__ __forceinline__ void store_fields(float* column, int64_t stride, const V& v) {
  static_assert(sizeof(V) == V::kFields * sizeof(float));
  float fields[V::kFields];
  memcpy(fields, &v, sizeof(V));
#pragma unroll
  for (int i = 0; i < V::kFields; ++i) store_scalar(column + i * stride, fields[i]);
}

template <KlKind kKind>
__global__ void __launch_bounds__(kStateThreads, kStateBlocksPerSM)
    kl_tile_stats_kernel(KlRows<float, float> rows, KlOptions options, float* __restrict__ state,  // (5, N)
                         int64_t state_stride, bool first) {  // first: state is written, not merged into
  using State = RowState<kKind>;
  MINITRON_SHARED(State, partial, kMaxWarps);
  const int64_t row = blockIdx.x;
  if (!rows.counts(row)) options.vocab_size = 0;
  State begun = State::empty();
  if (threadIdx.x == 0 && !first) begun = load_fields<State>(state + row, state_stride);
  const PairRow<float, float> pairs(rows, row, options);
  const State merged = row_state(pairs, begun, partial);
  if (threadIdx.x == 0) store_fields(state + row, state_stride, merged);
}

__global__ void __launch_bounds__(kStateThreads, kStateBlocksPerSM)
    kl_tile_mixture_kernel(KlRows<float, float> rows, KlOptions options,
                           const float* __restrict__ stats,  // (N, RowStats::kFields)
                           float* __restrict__ sums, int64_t sums_stride, bool first) {  // (2, N)
  MINITRON_SHARED(MixtureSums, partial, kMaxWarps);
  const int64_t row = blockIdx.x;
  if (!rows.counts(row)) options.vocab_size = 0;
  MixtureSums begun = MixtureSums::empty();
  if (threadIdx.x == 0 && !first) begun = load_fields<MixtureSums>(sums + row, sums_stride);
  const PairRow<float, float> pairs(rows, row, options);
  const RowStats stat = load_stats(stats + row * RowStats::kFields);
  const MixtureSums merged = row_mixture(pairs, stat, begun, partial);
  if (threadIdx.x == 0) store_fields(sums + row, sums_stride, merged);
}

// The rows that a finishing kernel is about.
struct FinishRows {
  const bool* mask;  // (N) or null
  int64_t mask_stride, rows;
  int splits;

  __device__ __forceinline__ bool counts(int64_t row) const {
    return mask == nullptr || load_scalar<true>(mask + row * mask_stride);
  }
  // The row's parts (splits, V::kFields, rows), merged from the first to the last.
  template <typename V>
  __device__ __forceinline__ V merged(const float* parts, int64_t row) const {
    V all = V::empty();
    for (int split = 0; split < splits; ++split) {
      all = all.merged(load_fields<V>(parts + split * V::kFields * rows + row, rows));
    }
    return all;
  }
};

template <KlKind kKind>
__global__ void __launch_bounds__(kFinishThreads)
    kl_finish_stats_kernel(FinishRows rows, const float* __restrict__ states,
                           float* __restrict__ loss,     // (N)
                           float* __restrict__ stats) {  // (N, RowStats::kFields); JSD: the rest comes later
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (row >= rows.rows) return;
  const bool counts = rows.counts(row);
  const auto state = rows.merged<RowState<kKind>>(states, row);
  store_scalar(loss + row, counts ? state.loss() : 0.0f);
  store_stats(stats + row * RowStats::kFields, counts ? state.stats() : RowStats{});
}

__global__ void __launch_bounds__(kFinishThreads)
    kl_finish_mixture_kernel(FinishRows rows, const float* __restrict__ sums, Shares shares,
                             float* __restrict__ loss,     // (N)
                             float* __restrict__ stats) {  // (N, RowStats::kFields), of which kl is written
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (row >= rows.rows) return;
  const bool counts = rows.counts(row);
  const auto merged = rows.merged<MixtureSums>(sums, row);
  store_scalar(loss + row, counts ? merged.loss(shares) : 0.0f);
  store_scalar(stats + row * RowStats::kFields + RowStats::kFields - 1, counts ? merged.student : 0.0f);
}

}  // namespace minitron::cuda
