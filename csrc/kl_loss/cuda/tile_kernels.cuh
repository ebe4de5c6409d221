// Epilogues of linear_kl_loss on a tile of the vocabulary, whose logits come out of an fp32 GEMM. The
// epilogues on whole rows are in row_kernels.cuh and cluster_kernels.cuh, JSD's terms in tile_mixture.cuh.
//
//   tile_stats    grid (N), one block a row: merges a tile into the state (5, N) of its rows.
//   finish_stats  one thread a row: merges states (splits, 5, N), in order.
//
// Each logit is read once; a state is read and written once per tile.
#pragma once

#include "kl_loss/cuda/row_kernels.cuh"

namespace minitron::cuda {

constexpr int kFinishThreads = 128;

template <Divergence kDivergence, typename... Metrics>  // MetricsState or nothing
__global__ void __launch_bounds__(kStateThreads, kStateBlocksPerSM)
    kl_tile_stats_kernel(KlRows<float, float> rows, DeviceOptions options,
                         float* __restrict__ state,         // (5, N)
                         int64_t state_stride, bool first,  // first: there is no state yet
                         Metrics... of_metrics) {
  using Row = RowState<kDivergence>;
  using State = StateOf<Row, Metrics...>;
  MINITRON_SHARED(State, partial, kMaxWarps);
  const int64_t row = blockIdx.x;
  if (!rows.is_valid(row)) options.vocab_size = 0;
  State begun = State::empty();
  if (threadIdx.x == 0 && !first) {
    begun = state_of(load_fields<Row>(state + row, state_stride), of_metrics.load(row)...);
  }
  const PairRow<float, float> pairs(rows, row, options);
  const State merged = row_state(pairs, begun, partial, of_metrics.tau()...);
  if (threadIdx.x == 0) {
    store_fields(state + row, state_stride, row_of<Row>(merged));
    (of_metrics.store(row, merged, first, pairs.student, options), ...);
  }
}

// The rows that a finishing kernel works on.
struct FinishRows {
  const bool* mask;  // (N) or null: false where the token is not valid
  int64_t mask_stride, rows;
  int splits;

  __device__ __forceinline__ bool is_valid(int64_t row) const {
    return mask == nullptr || load_scalar<true>(mask + row * mask_stride);
  }
  // What stands of the row in one of parts (splits, V::kFields, rows).
  template <typename V>
  __device__ __forceinline__ V part(const float* parts, int split, int64_t row) const {
    return load_fields<V>(parts + split * V::kFields * rows + row, rows);
  }
};

template <Divergence kDivergence, typename... Metrics>  // MetricsFinish or nothing
__global__ void __launch_bounds__(kFinishThreads)
    kl_finish_stats_kernel(FinishRows rows, const float* __restrict__ states,
                           float* __restrict__ loss,   // (N)
                           float* __restrict__ stats,  // (N, kNumStats); JSD's kl comes later
                           Metrics... of_metrics) {
  using Row = RowState<kDivergence>;
  using State = StateOf<Row, Metrics...>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (row >= rows.rows) return;
  const bool valid = rows.is_valid(row);
  State state = State::empty();
  for (int split = 0; split < rows.splits; ++split) {  // in order
    state =
        state.merged(state_of(rows.part<Row>(states, split, row), of_metrics.load(split, row, rows.rows)...),
                     of_metrics.tau()...);
  }
  store_scalar(loss + row, valid ? state.loss() : 0.0f);
  store_stats(stats + row * kNumStats, valid ? state.stats() : RowStats{});
  (of_metrics.store(row, valid, state, rows.splits, rows.rows), ...);
}

}  // namespace minitron::cuda
