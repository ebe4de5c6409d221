// Epilogues of linear_kl_loss on a tile of the vocabulary, whose logits come out of an fp32 GEMM. The
// epilogues on whole rows are in row_kernels.cuh and cluster_kernels.cuh.
//
//   tile_stats    grid (N), one block a row: merges a tile into the state (5, N) of its rows.
//   tile_mixture  grid (N), one block a row: adds a tile's terms of JSD to the sums (2, N), from final stats.
//   finish_*      one thread a row: merges states (splits, 5, N) or sums (splits, 2, N), in order.
//
// Each logit is read once; a state is read and written once per tile.
#pragma once

#include "kl_loss/cuda/row_kernels.cuh"

namespace minitron::cuda {

constexpr int kFinishThreads = 128;

// A struct of floats (RowState or MixtureSums), each field in its own row of a matrix.
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

template <Divergence kDivergence>
__global__ void __launch_bounds__(kStateThreads, kStateBlocksPerSM)
    kl_tile_stats_kernel(KlRows<float, float> rows, DeviceOptions options,
                         float* __restrict__ state,           // (5, N)
                         int64_t state_stride, bool first) {  // first: there is no state yet
  using State = RowState<kDivergence>;
  MINITRON_SHARED(State, partial, kMaxWarps);
  const int64_t row = blockIdx.x;
  if (!rows.is_valid(row)) options.vocab_size = 0;
  State begun = State::empty();
  if (threadIdx.x == 0 && !first) begun = load_fields<State>(state + row, state_stride);
  const PairRow<float, float> pairs(rows, row, options);
  const State merged = row_state(pairs, begun, partial);
  if (threadIdx.x == 0) store_fields(state + row, state_stride, merged);
}

__global__ void __launch_bounds__(kStateThreads, kStateBlocksPerSM)
    kl_tile_mixture_kernel(KlRows<float, float> rows, DeviceOptions options,
                           const float* __restrict__ stats,                              // (N, kNumStats)
                           float* __restrict__ sums, int64_t sums_stride, bool first) {  // (2, N)
  MINITRON_SHARED(MixtureSums, partial, kMaxWarps);
  const int64_t row = blockIdx.x;
  if (!rows.is_valid(row)) options.vocab_size = 0;
  MixtureSums begun = MixtureSums::empty();
  if (threadIdx.x == 0 && !first) begun = load_fields<MixtureSums>(sums + row, sums_stride);
  const PairRow<float, float> pairs(rows, row, options);
  const RowStats stat = load_stats(stats + row * kNumStats);
  const MixtureSums merged = row_mixture(pairs, stat, begun, partial);
  if (threadIdx.x == 0) store_fields(sums + row, sums_stride, merged);
}

// The rows that a finishing kernel works on.
struct FinishRows {
  const bool* mask;  // (N) or null: false where the token is not valid
  int64_t mask_stride, rows;
  int splits;

  __device__ __forceinline__ bool is_valid(int64_t row) const {
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

template <Divergence kDivergence>
__global__ void __launch_bounds__(kFinishThreads)
    kl_finish_stats_kernel(FinishRows rows, const float* __restrict__ states,
                           float* __restrict__ loss,     // (N)
                           float* __restrict__ stats) {  // (N, kNumStats); JSD's kl comes later
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (row >= rows.rows) return;
  const bool valid = rows.is_valid(row);
  const auto state = rows.merged<RowState<kDivergence>>(states, row);
  store_scalar(loss + row, valid ? state.loss() : 0.0f);
  store_stats(stats + row * kNumStats, valid ? state.stats() : RowStats{});
}

__global__ void __launch_bounds__(kFinishThreads)
    kl_finish_mixture_kernel(FinishRows rows, const float* __restrict__ sums, Shares shares,
                             float* __restrict__ loss,     // (N)
                             float* __restrict__ stats) {  // (N, kNumStats), of which kl is written
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (row >= rows.rows) return;
  const bool valid = rows.is_valid(row);
  const auto merged = rows.merged<MixtureSums>(sums, row);
  store_scalar(loss + row, valid ? merged.loss(shares) : 0.0f);
  store_scalar(stats + row * kNumStats + kKL, valid ? merged.student : 0.0f);
}

}  // namespace minitron::cuda
