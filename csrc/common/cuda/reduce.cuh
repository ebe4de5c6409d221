// Deterministic reductions over a warp and over a block of whole warps, for any struct of 32-bit fields.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/cuda/platform.cuh"

namespace minitron::cuda {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 32;
constexpr unsigned kFullMask = 0xffffffffu;

template <typename V, typename Shuffle>
__device__ __forceinline__ V shuffle_words(const V& v, Shuffle shuffle) {
  static_assert(sizeof(V) % 4 == 0);
  uint32_t words[sizeof(V) / 4];
  memcpy(words, &v, sizeof(V));
#pragma unroll
  for (uint32_t& word : words) word = shuffle(word);
  V out;
  memcpy(&out, words, sizeof(V));
  return out;
}

// Merges the values of all lanes, or of each group of `lanes` neighbours (a power of two), in a fixed order.
// Only the first lane's result is to be used; the others may round differently. All lanes of the warp must
// take part.
template <typename V, typename Merge>
__device__ __forceinline__ V warp_reduce(V v, Merge merge, int lanes = kWarpSize) {
#pragma unroll
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    v = merge(v, shuffle_words(v, [=](uint32_t w) { return __shfl_xor_sync(kFullMask, w, offset); }));
  }
  return v;
}

// Gives the same result to every thread. partial: shared memory for kMaxWarps values, which no other call
// uses; that saves a second barrier. identity: merge(v, identity) == v.
template <typename V, typename Merge>
__device__ __forceinline__ V block_reduce(V v, V identity, V* partial, Merge merge) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  v = warp_reduce(v, merge);
  if (lane == 0) partial[warp] = v;
  __syncthreads();
  const int warps = blockDim.x / kWarpSize;
  v = warp_reduce(lane < warps ? partial[lane] : identity, merge);
  return shuffle_words(v, [](uint32_t w) { return __shfl_sync(kFullMask, w, 0); });
}

// Shared memory of one cluster_reduce(). Each call has its own, so that nothing is overwritten which another
// block may still read.
template <typename V>
struct ClusterPartials {
  V warps[kMaxWarps];
  V block;  // what the other blocks read
  V cluster;
};

// Merges the values of all threads of a cluster of kBlocks blocks, a power of two, in a fixed order, and
// gives the same result to every thread. The kernel must end with cluster_sync(). identity: merge(v,
// identity) == v.
template <int kBlocks, typename V, typename Merge>
__device__ __forceinline__ V cluster_reduce(V v, V identity, ClusterPartials<V>* shared, Merge merge) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  v = warp_reduce(v, merge);
  if (lane == 0) shared->warps[warp] = v;
  __syncthreads();
  if (warp == 0) {
    const int warps = blockDim.x / kWarpSize;
    v = warp_reduce(lane < warps ? shared->warps[lane] : identity, merge);
    if (lane == 0) shared->block = v;
  }
  cluster_sync();
  if (warp == 0) {
    v = warp_reduce(lane < kBlocks ? load_of_rank(&shared->block, lane) : identity, merge, kBlocks);
    if (lane == 0) shared->cluster = v;
  }
  __syncthreads();
  return shared->cluster;
}

}  // namespace minitron::cuda
