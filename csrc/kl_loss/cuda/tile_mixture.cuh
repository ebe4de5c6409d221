// Epilogues of linear_kl_loss on a tile of the vocabulary: the terms of JSD, once the row's stats are known.
//
//   tile_mixture    grid (N), one block a row: adds a tile's terms to the sums (2, N).
//   finish_mixture  one thread a row: merges sums (splits, 2, N), in order.
#pragma once

#include "kl_loss/cuda/tile_kernels.cuh"

namespace minitron::cuda {

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

__global__ void __launch_bounds__(kFinishThreads)
    kl_finish_mixture_kernel(FinishRows rows, const float* __restrict__ sums, Shares shares,
                             float* __restrict__ loss,     // (N)
                             float* __restrict__ stats) {  // (N, kNumStats), of which kl is written
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (row >= rows.rows) return;
  const bool valid = rows.is_valid(row);
  MixtureSums merged = MixtureSums::empty();
  for (int split = 0; split < rows.splits; ++split) {
    merged = merged.merged(rows.part<MixtureSums>(sums, split, row));
  }
  store_scalar(loss + row, valid ? merged.loss(shares) : 0.0f);
  store_scalar(stats + row * kNumStats + kKL, valid ? merged.student : 0.0f);
}

}  // namespace minitron::cuda
