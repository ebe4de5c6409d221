// grad *= factor in place: the product in fp32, rounded once. The factor is read on the device, so that
// nobody waits for it, and where it is 1, as it is for a loss that is not scaled, no element is touched.
//
//   grid (at most kScaleBlocks)   block (kScaleThreads)   reads and writes grad once: bound by memory
#pragma once

#include <cstdint>

#include "common/cuda/vec.cuh"

namespace minitron::cuda {

constexpr int kScaleThreads = 256;
constexpr int kScaleAtOnce = 4;  // loads of a thread that are under way together
// Two waves on a device of 128 SMs. More of them would only take time to start where the factor is 1.
constexpr int64_t kScaleBlocks = 2048;
template <typename T>
constexpr int kScaleVec = 16 / sizeof(T);
// Elements that a block takes in one turn.
template <typename T>
constexpr int64_t kScaleTurn = int64_t{kScaleThreads} * kScaleAtOnce * kScaleVec<T>;

template <typename T>
__device__ __forceinline__ uint4 scaled_words(uint4 words, float factor, const T* p) {
  constexpr int kVec = kScaleVec<T>, kPerWord = kVec / 4;
  uint32_t* const parts[] = {&words.x, &words.y, &words.z, &words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float x[kPerWord];
    unpack_word(*parts[i], x, p);
#pragma unroll
    for (int j = 0; j < kPerWord; ++j) x[j] *= factor;
    *parts[i] = pack_word(x, p);
  }
  return words;
}

template <typename T>
__global__ void __launch_bounds__(kScaleThreads)
    scale_grad_kernel(T* __restrict__ grad, int64_t n, const float* __restrict__ factor_ptr) {
  constexpr int kVec = kScaleVec<T>;
  const float factor = load_scalar<true>(factor_ptr);
  if (factor == 1.0f) return;

  // the elements before the first multiple of 16 bytes and after the last are one block's, one by one
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(grad) % 16);
  const int64_t before = past == 0 ? 0 : (16 - past) / static_cast<int>(sizeof(T));
  const int64_t head = before < n ? before : n;
  const int64_t vectors = (n - head) / kVec, rest = n - vectors * kVec;
  if (blockIdx.x == 0 && threadIdx.x < rest) {
    T* const p = grad + (threadIdx.x < head ? threadIdx.x : threadIdx.x + vectors * kVec);
    store_scalar(p, from_float<T>(to_float(load_scalar<false>(p)) * factor));
  }

  T* const aligned = grad + head;
  constexpr int64_t kTurn = int64_t{kScaleThreads} * kScaleAtOnce;
#pragma unroll 1  // unrolled, the fp32 kernel takes half as many registers again
  for (int64_t turn = blockIdx.x * kTurn; turn < vectors; turn += gridDim.x * kTurn) {
    const int64_t first = turn + threadIdx.x;
    if (turn + kTurn <= vectors) {
      uint4 words[kScaleAtOnce];
#pragma unroll
      for (int i = 0; i < kScaleAtOnce; ++i) {
        words[i] = load16<false>(aligned + (first + i * kScaleThreads) * kVec);
      }
#pragma unroll
      for (int i = 0; i < kScaleAtOnce; ++i) {
        store16(aligned + (first + i * kScaleThreads) * kVec, scaled_words(words[i], factor, aligned));
      }
    } else {
#pragma unroll 1
      for (int64_t at = first; at < vectors; at += kScaleThreads) {
        T* const p = aligned + at * kVec;
        store16(p, scaled_words(load16<false>(p), factor, p));
      }
    }
  }
}

}  // namespace minitron::cuda
