// Kept rows and columns of matrices, both axes in one launch; of a dtype only the element size matters.
//
//   grid (matrices x runs of kGatherRowsPerBlock rows, ceil(K_c / (kGatherThreads x kVec)))   block
//   (kGatherThreads)
//
// A thread makes kVec = kGatherVec = 16 / element size neighbouring columns of every row of its block: it
// looks their indices up once, sees whether they are a run, and then moves each row with one 16-byte load and
// store, or gathers element by element and stores 16 bytes. Sorted indices make a warp's loads fall into few
// lines, which the L1 cache holds until all of their elements are taken. Bound by memory: reads the lines
// that hold what is kept, writes each result once.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/cuda/platform.cuh"

namespace minitron::cuda {

constexpr int kGatherThreads = 128;
constexpr int kGatherRowsPerBlock = 16;
constexpr int kMaxBatchDims = 6;

template <typename T>
constexpr int kGatherVec = 16 / sizeof(T);
// Rows whose loads are under way at the same time: each element waits in a register of its own.
template <typename T>
constexpr int kGatherRowsAtOnce = sizeof(T) >= 4 ? 4 : sizeof(T);

// Strides in elements.
struct GatherSide {
  int64_t row_stride, col_stride;
  int64_t batch_strides[kMaxBatchDims];
  bool aligned;  // columns lie side by side and every row begins at a multiple of 16 bytes
};

struct GatherShape {
  const int64_t* rows;  // (row_count) or null
  const int64_t* cols;  // (col_count) or null
  int64_t row_count, col_count, row_runs;
  int64_t batch_sizes[kMaxBatchDims];  // of the batch dimensions, the last one first
  GatherSide source, out;
};

// The first element of a matrix, counted over the batch dimensions.
template <typename T>
__device__ __forceinline__ T* gather_matrix(T* data, int64_t matrix, const GatherShape& shape,
                                            const GatherSide& side) {
#pragma unroll
  for (int d = 0; d < kMaxBatchDims; ++d) {
    data += matrix % shape.batch_sizes[d] * side.batch_strides[d];
    matrix /= shape.batch_sizes[d];
  }
  return data;
}

template <typename T>
__global__ void __launch_bounds__(kGatherThreads)
    gather_kernel(GatherShape shape, const T* __restrict__ source, T* __restrict__ out) {
  constexpr int kVec = kGatherVec<T>, kRows = kGatherRowsAtOnce<T>;
  const int64_t col = (int64_t{blockIdx.y} * kGatherThreads + threadIdx.x) * kVec;
  if (col >= shape.col_count) return;
  const int count = shape.col_count - col < kVec ? static_cast<int>(shape.col_count - col) : kVec;
  int64_t offset[kVec];
  bool is_run = count == kVec && shape.source.aligned;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const int64_t at = i < count ? col + i : col;
    offset[i] = shape.cols == nullptr ? at : load_scalar<true>(shape.cols + at);
    is_run = is_run && offset[i] == offset[0] + i;
  }
  is_run = is_run && offset[0] % kVec == 0;
#pragma unroll
  for (int i = 0; i < kVec; ++i) offset[i] *= shape.source.col_stride;
  const bool whole = count == kVec && shape.out.aligned;

  const int64_t matrix = blockIdx.x / shape.row_runs, run = blockIdx.x % shape.row_runs;
  source = gather_matrix(source, matrix, shape, shape.source);
  out = gather_matrix(out, matrix, shape, shape.out) + col * shape.out.col_stride;
  const int64_t end =
      (run + 1) * kGatherRowsPerBlock < shape.row_count ? (run + 1) * kGatherRowsPerBlock : shape.row_count;
  for (int64_t begin = run * kGatherRowsPerBlock; begin < end; begin += kRows) {
    alignas(16) T value[kRows][kVec];
    const int rows = end - begin < kRows ? static_cast<int>(end - begin) : kRows;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {  // loads of several rows before the first store: they overlap
      if (r >= rows) continue;
      const int64_t row = shape.rows == nullptr ? begin + r : load_scalar<true>(shape.rows + begin + r);
      const T* from = source + row * shape.source.row_stride;
      if (is_run) {
        const uint4 words = load16<true>(from + offset[0]);
        memcpy(value[r], &words, 16);
      } else {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          if (i < count) value[r][i] = load_scalar<true>(from + offset[i]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) continue;
      T* to = out + (begin + r) * shape.out.row_stride;
      if (whole) {
        uint4 words;
        memcpy(&words, value[r], 16);
        store16(to, words);
      } else {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          if (i < count) store_scalar(to + i * shape.out.col_stride, value[r][i]);
        }
      }
    }
  }
}

}  // namespace minitron::cuda
