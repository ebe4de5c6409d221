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

#include "common/cuda/platform.cuh"

namespace minitron::cuda {

constexpr int kGatherThreads = 128;
constexpr int kGatherBlocksPerSM = 5;  // at least: the compiler would take more registers for the elements
constexpr int kGatherRowsPerBlock = 16;
constexpr int kMaxBatchDims = 6;

template <typename T>
constexpr int kGatherVec = 16 / sizeof(T);
// Rows whose loads are under way at the same time: of runs that are stored whole; and of others, where each
// element waits in a register of its own.
constexpr int kGatherRunsAtOnce = 4;
template <typename T>
constexpr int kGatherRowsAtOnce = sizeof(T) < 4   ? 1
                                  : sizeof(T) < 8 ? 2
                                                  : 4;

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

// 16 bytes in four registers <-> the elements in them. By shifts, so that nothing but registers is used, and
// words that go to memory together go there in one store.
template <typename T>
__device__ __forceinline__ uint4 gather_pack(const T (&value)[kGatherVec<T>]) {
  if constexpr (sizeof(T) == 16) {
    return value[0];
  } else if constexpr (sizeof(T) == 8) {
    return {static_cast<uint32_t>(value[0]), static_cast<uint32_t>(value[0] >> 32),
            static_cast<uint32_t>(value[1]), static_cast<uint32_t>(value[1] >> 32)};
  } else {
    constexpr int kPerWord = 4 / sizeof(T);
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < kGatherVec<T>; ++i) {
      words[i / kPerWord] |= static_cast<uint32_t>(value[i]) << 8 * sizeof(T) * (i % kPerWord);
    }
    return {words[0], words[1], words[2], words[3]};
  }
}

template <typename T>
__device__ __forceinline__ void gather_unpack(const uint4& words, T (&value)[kGatherVec<T>]) {
  if constexpr (sizeof(T) == 16) {
    value[0] = words;
  } else if constexpr (sizeof(T) == 8) {
    value[0] = words.x | static_cast<T>(words.y) << 32;
    value[1] = words.z | static_cast<T>(words.w) << 32;
  } else {
    constexpr int kPerWord = 4 / sizeof(T);
    const uint32_t parts[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < kGatherVec<T>; ++i) {
      value[i] = static_cast<T>(parts[i / kPerWord] >> 8 * sizeof(T) * (i % kPerWord));
    }
  }
}

// kRows rows of 16 aligned bytes: first all the loads, so that they overlap.
template <int kRows, typename T>
__device__ __forceinline__ void gather_runs(const GatherShape& shape, const T* source, int64_t row,
                                            uint4 (&words)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t kept = shape.rows == nullptr ? row + r : load_scalar<true>(shape.rows + row + r);
    words[r] = load16<true>(source + kept * shape.source.row_stride);
  }
}

template <typename T>
__global__ void __launch_bounds__(kGatherThreads, kGatherBlocksPerSM)
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
  int64_t row = run * kGatherRowsPerBlock;
  const int64_t end =
      row + kGatherRowsPerBlock < shape.row_count ? row + kGatherRowsPerBlock : shape.row_count;
  if (is_run) {
    source += offset[0];
    constexpr int kRuns = kGatherRunsAtOnce;
#pragma unroll 1
    for (; whole && row + kRuns <= end; row += kRuns) {
      uint4 words[kRuns];
      gather_runs(shape, source, row, words);
#pragma unroll
      for (int r = 0; r < kRuns; ++r) store16(out + (row + r) * shape.out.row_stride, words[r]);
    }
#pragma unroll 1
    for (; row < end; ++row) {
      uint4 words[1];
      gather_runs(shape, source, row, words);
      T* to = out + row * shape.out.row_stride;
      if (whole) {
        store16(to, words[0]);
        continue;
      }
      T value[kVec];
      gather_unpack<T>(words[0], value);
#pragma unroll
      for (int i = 0; i < kVec; ++i, to += shape.out.col_stride) store_scalar(to, value[i]);
    }
    return;
  }
#pragma unroll 1
  for (; row < end; row += kRows) {
    T value[kRows][kVec];
    const int rows = end - row < kRows ? static_cast<int>(end - row) : kRows;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {  // loads of several rows before the first store: they overlap
      if (r >= rows) continue;
      const int64_t kept = shape.rows == nullptr ? row + r : load_scalar<true>(shape.rows + row + r);
      const T* from = source + kept * shape.source.row_stride;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (i < count) value[r][i] = load_scalar<true>(from + offset[i]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) continue;
      T* to = out + (row + r) * shape.out.row_stride;
      if (whole) {
        store16(to, gather_pack<T>(value[r]));
      } else {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          if (i < count) store_scalar(to, value[r][i]);
          to += shape.out.col_stride;
        }
      }
    }
  }
}

}  // namespace minitron::cuda
