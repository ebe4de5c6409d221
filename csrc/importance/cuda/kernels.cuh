// The primitives of importance.
//
//   rows    a group of up to 32 lanes per row: its norm, or with y 1 - cosine. Reads each row once. Also the
//           norms of heads, which are then summed like channels.
//   pieces  grid (pieces of the tokens x blocks of channels): a thread holds the sums of one 16-byte run of
//           channels over a piece's tokens, sequence by sequence. Reads x once. The pieces are so short that
//           one sequence fills the device, and that a sum in fp32 has at most 8 + kMostTokens / 8 roundings.
//   finish  grid (sequences x blocks of values): adds up a sequence's pieces in double, in an order that
//           depends only on the shape.
//
// Piece i of packed tokens may reach into several sequences. What it has of sequence b goes to the slot i +
// b, which is no other piece's, so that the grid depends only on shapes and nobody waits for cu_seqlens.
#pragma once

#include <cstdint>

#include "common/cuda/reduce.cuh"
#include "common/cuda/vec.cuh"
#include "importance/cosine.h"
#include "importance/moments.h"

namespace minitron::cuda {

constexpr int kRowThreads = 256, kPieceThreads = 128, kFinishThreads = 256;
constexpr int kPieceBlocksPerSM = 3;  // 48 KiB of loads in flight; at most 168 registers a thread
constexpr int kMostTokens = 512;      // of a piece
constexpr int kGroup = 8;             // tokens whose loads a thread has in flight
constexpr int kSlotLanes = kFinishThreads / kWarpSize;

// How the tokens are cut into pieces.
struct Pieces {
  int64_t sequences;          // B
  int64_t length;             // of a sequence; of all of them with cu_seqlens
  int64_t per_sequence;       // pieces, without cu_seqlens
  int64_t slots;              // rows of the partial sums
  const int64_t* cu_seqlens;  // (B + 1) or null
  int tokens;                 // of a piece, at most kMostTokens
};

template <typename T>
struct Tokens {
  const T* x;                  // (B, S, C), or (S, C) with B = 1; stride 1 in the channels
  const bool* mask;            // (B, S) or null: false where a token is not valid, and not read
  int64_t stride_b, stride_t;  // elements
  int channels;
  bool aligned;  // every token starts at a multiple of 16 bytes, and its channels are whole runs
};

// Mean and sum of squared distances from it, of two sets of tokens together (Chan et al. 1979).
template <typename F>
__device__ __forceinline__ void merge_centred(F& mean, F& m2, F n, F new_mean, F new_m2, F new_n) {
  const F share = new_n / (n + new_n), delta = new_mean - mean;
  mean += delta * share;
  m2 += new_m2 + delta * delta * (n * share);
}

// The sums of one thread's channels, a run of 16 bytes.
template <int64_t kMoments, typename T>
struct RunSums {
  static constexpr int kRun = 16 / sizeof(T), kPerWord = 4 / sizeof(T);
  float magnitude[kRun] = {}, square[kRun] = {}, mean[kRun] = {}, m2[kRun] = {};
  int count = 0;

  // Adds runs of a group of tokens, as they are in memory. Of these n are valid, where `in` is true; the
  // others are zeros. Unpacked word by word, since the whole group as floats would take all registers.
  __device__ __forceinline__ void add(const uint4 (&runs)[kGroup], const bool (&in)[kGroup], int n) {
    if (n == 0) return;
    const float inverse = 1.0f / static_cast<float>(n);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      float v[kGroup][kPerWord];
#pragma unroll
      for (int r = 0; r < kGroup; ++r) {
        const uint32_t words[4] = {runs[r].x, runs[r].y, runs[r].z, runs[r].w};
        unpack_word(words[word], v[r], static_cast<const T*>(nullptr));
      }
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) add_channel(word * kPerWord + i, v, i, in, n, inverse);
    }
    count += n;
  }

 private:
  __device__ __forceinline__ void add_channel(int j, const float (&v)[kGroup][kPerWord], int i,
                                              const bool (&in)[kGroup], int n, float inverse) {
    float abs_sum = 0.0f, square_sum = 0.0f, sum = 0.0f;
#pragma unroll
    for (int r = 0; r < kGroup; ++r) {
      if constexpr (kMoments & kAbs) abs_sum += fabsf(v[r][i]);
      if constexpr (kMoments & kSquare) square_sum = fmaf(v[r][i], v[r][i], square_sum);
      if constexpr (kMoments & kCentred) sum += v[r][i];
    }
    if constexpr (kMoments & kAbs) magnitude[j] += abs_sum;
    if constexpr (kMoments & kSquare) square[j] += square_sum;
    if constexpr (kMoments & kCentred) {
      const float group_mean = sum * inverse;
      float group_m2 = 0.0f;
#pragma unroll
      for (int r = 0; r < kGroup; ++r) {
        const float d = in[r] ? v[r][i] - group_mean : 0.0f;
        group_m2 = fmaf(d, d, group_m2);
      }
      merge_centred(mean[j], m2[j], static_cast<float>(count), group_mean, group_m2, static_cast<float>(n));
    }
  }
};

// The sequence that a packed token is in: the first that ends after it.
__device__ __forceinline__ int64_t sequence_of(const int64_t* cu_seqlens, int64_t sequences, int64_t token) {
  int64_t low = 0, high = sequences;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (load_scalar<true>(cu_seqlens + middle + 1) <= token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Which channels of a token a thread holds: a run of neighbours where 16 bytes can be read at once; else
// neighbouring threads read neighbouring elements.
template <typename T>
struct Lane {
  static constexpr int kRun = 16 / sizeof(T);
  int first, step, channels;
  bool aligned;

  __device__ __forceinline__ Lane(int block, int channels, bool aligned)
      : first(block * static_cast<int>(blockDim.x) * kRun +
              static_cast<int>(threadIdx.x) * (aligned ? kRun : 1)),
        step(aligned ? 1 : static_cast<int>(blockDim.x)),
        channels(channels),
        aligned(aligned) {}

  __device__ __forceinline__ uint4 load(const T* token, bool wanted) const {
    uint4 run = {0, 0, 0, 0};
    if (aligned) {
      if (wanted && first < channels) run = load16<true>(token + first);
      return run;
    }
    T elements[kRun] = {};
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const int c = first + j * step;
      if (wanted && c < channels) elements[j] = load_scalar<true>(token + c);
    }
    memcpy(&run, elements, 16);
    return run;
  }

  __device__ __forceinline__ void store(float* token, const float (&v)[kRun]) const {
    if (aligned) {
      if (first < channels) store_run(token + first, true, v);
    } else {
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if (first + j * step < channels) store_scalar(token + first + j * step, v[j]);
      }
    }
  }
};

template <int64_t kMoments, typename T>
__global__ void __launch_bounds__(kPieceThreads, kPieceBlocksPerSM)
    importance_pieces_kernel(Tokens<T> tokens, Pieces pieces, int channel_blocks,
                             float* __restrict__ partial,       // (num_sums, slots, C)
                             int* __restrict__ piece_counts) {  // (slots)
  constexpr int kRun = 16 / sizeof(T);
  MINITRON_SHARED(bool, valid, kMostTokens);
  const int64_t piece = blockIdx.x / channel_blocks;
  const int block = blockIdx.x % channel_blocks;
  const bool packed = pieces.cu_seqlens != nullptr;
  int64_t b = packed ? 0 : piece / pieces.per_sequence;
  const int64_t first = (packed ? piece : piece - b * pieces.per_sequence) * pieces.tokens;
  const int64_t last = first + pieces.tokens < pieces.length ? first + pieces.tokens : pieces.length;
  const T* x = tokens.x + b * tokens.stride_b;
  if (tokens.mask != nullptr) {
    const bool* mask = tokens.mask + b * pieces.length + first;
    for (int t = threadIdx.x; t < last - first; t += blockDim.x) valid[t] = load_scalar<true>(mask + t);
    __syncthreads();
  }
  const Lane<T> lane(block, tokens.channels, tokens.aligned);

  if (packed) b = sequence_of(pieces.cu_seqlens, pieces.sequences, first);
  // b < B: nobody has checked that the borders reach the last token; if not, nothing outside may be read
  for (int64_t begin = first; begin < last && b < pieces.sequences; ++b) {
    int64_t end = last;
    if (packed) {
      const int64_t border = load_scalar<true>(pieces.cu_seqlens + b + 1);
      if (border < end) end = border;
    }
    RunSums<kMoments, T> sums;
    for (int64_t group = begin; group < end; group += kGroup) {
      uint4 runs[kGroup];
      bool in[kGroup];
      int n = 0;
#pragma unroll
      for (int r = 0; r < kGroup; ++r) {
        const int64_t t = group + r;
        in[r] = t < end && (tokens.mask == nullptr || valid[t - first]);
        n += in[r];
        runs[r] = lane.load(x + t * tokens.stride_t, in[r]);
      }
      sums.add(runs, in, n);
    }
    if (end > begin) begin = end;

    const int64_t slot = packed ? piece + b : piece;
    if (block == 0 && threadIdx.x == 0) store_scalar(piece_counts + slot, sums.count);
    float* out = partial + slot * tokens.channels;
    const auto store = [&](const float (&sum)[kRun]) {
      lane.store(out, sum);
      out += pieces.slots * tokens.channels;
    };
    if constexpr (kMoments & kAbs) store(sums.magnitude);
    if constexpr (kMoments & kSquare) store(sums.square);
    if constexpr (kMoments & kCentred) store(sums.mean), store(sums.m2);
  }
}

// One value's totals over pieces.
struct Totals {
  double magnitude = 0, square = 0, mean = 0, m2 = 0;
  int64_t count = 0;

  __device__ __forceinline__ void add(const Totals& other) {
    magnitude += other.magnitude;
    square += other.square;
    if (other.count == 0) return;
    merge_centred(mean, m2, static_cast<double>(count), other.mean, other.m2,
                  static_cast<double>(other.count));
    count += other.count;
  }
};

__global__ void __launch_bounds__(kFinishThreads)
    importance_finish_kernel(const float* __restrict__ partial,     // (num_sums, slots, M)
                             const int* __restrict__ piece_counts,  // (slots)
                             Pieces pieces, int64_t moments, int64_t values, int value_blocks,
                             float* __restrict__ sums,        // (num_sums, B, M)
                             int64_t* __restrict__ counts) {  // (B)
  MINITRON_SHARED(Totals, shared, kFinishThreads);
  const int64_t b = blockIdx.x / value_blocks;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t m = static_cast<int64_t>(blockIdx.x % value_blocks) * kWarpSize + lane;
  int64_t first = b * pieces.per_sequence, end = first + pieces.per_sequence;
  if (pieces.cu_seqlens != nullptr) {
    const int64_t begin_token = load_scalar<true>(pieces.cu_seqlens + b);
    const int64_t end_token = load_scalar<true>(pieces.cu_seqlens + b + 1);
    first = begin_token < 0 ? b : begin_token / pieces.tokens + b;
    end = end_token > begin_token ? (end_token - 1) / pieces.tokens + b + 1 : first;
    if (end > pieces.slots) end = pieces.slots;
  }
  const int64_t sum_size = pieces.slots * values;
  Totals total;
#pragma unroll 4
  for (int64_t slot = first + warp; slot < end; slot += kSlotLanes) {
    Totals part;
    part.count = load_scalar<true>(piece_counts + slot);
    const float* p = partial + slot * values + m;
    const auto next_sum = [&] {
      const float v = m < values ? load_scalar<true>(p) : 0.0f;
      p += sum_size;
      return static_cast<double>(v);
    };
    if (moments & kAbs) part.magnitude = next_sum();
    if (moments & kSquare) part.square = next_sum();
    if (moments & kCentred) part.mean = next_sum(), part.m2 = next_sum();
    total.add(part);
  }
  shared[threadIdx.x] = total;
  __syncthreads();
  if (warp > 0) return;
  for (int w = 1; w < kSlotLanes; ++w) total.add(shared[w * kWarpSize + lane]);
  if (m == 0) store_scalar(counts + b, total.count);
  if (m >= values) return;
  float* out = sums + b * values + m;
  const auto store = [&](double v) {
    store_scalar(out, static_cast<float>(v));
    out += pieces.sequences * values;
  };
  if (moments & kAbs) store(total.magnitude);
  if (moments & kSquare) store(total.square);
  // what was kept is the mean, but what adds up over ranks is the sum
  if (moments & kCentred) store(total.mean * static_cast<double>(total.count)), store(total.m2);
}

template <typename T>
struct Rows {
  const T* x;  // (B, S, heads, D), stride 1 in D, stride D in heads
  const T* y;  // (N, D), stride 1 in D
  const bool*
      mask;  // (B, S) or null: false where a token is not valid, and its rows are neither read nor written
  int64_t stride_b, stride_t, stride_y;  // elements
  unsigned rows, tokens, heads;          // N = B S heads; S
  int width;                             // D
};

struct Products {
  float xx, xy, yy, xd, dd;  // d = y - x
};

template <bool kPair>
__device__ __forceinline__ void add_products(Products& sums, float x, float y) {
  sums.xx = fmaf(x, x, sums.xx);
  if constexpr (kPair) {
    const float d = y - x;
    sums.xy = fmaf(x, y, sums.xy);
    sums.yy = fmaf(y, y, sums.yy);
    sums.xd = fmaf(x, d, sums.xd);
    sums.dd = fmaf(d, d, sums.dd);
  }
}

__device__ __forceinline__ Products together(const Products& p, const Products& q) {
  return {p.xx + q.xx, p.xy + q.xy, p.yy + q.yy, p.xd + q.xd, p.dd + q.dd};
}

template <bool kPair, typename T>
__global__ void __launch_bounds__(kRowThreads)
    importance_rows_kernel(Rows<T> rows, int lanes, float* __restrict__ out) {  // (N)
  constexpr int kRun = 16 / sizeof(T);
  // no thread returns early: the threads of a warp reduce together
  const unsigned row = blockIdx.x * (kRowThreads / lanes) + threadIdx.x / lanes;
  const int lane = threadIdx.x % lanes;
  const unsigned token = row / rows.heads, b = token / rows.tokens;
  const bool active = row < rows.rows && (rows.mask == nullptr || load_scalar<true>(rows.mask + token));
  Products sums[kRun] = {};
  if (active) {
    const T* x = rows.x + b * rows.stride_b + (token - b * rows.tokens) * rows.stride_t +
                 static_cast<int64_t>(row - token * rows.heads) * rows.width;
    const T* y = kPair ? rows.y + row * rows.stride_y : nullptr;
    const RowSplit<kRun, T> split(x, rows.width);
    const bool y_aligned = kPair && aligned16(y + split.head);
#pragma unroll 2
    for (int run = lane; run < split.runs; run += lanes) {
      float v[kRun], w[kRun];
      load_run(x + split.run_start(run), true, v);
      if constexpr (kPair) load_run(y + split.run_start(run), y_aligned, w);
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        add_products<kPair>(sums[j], v[j], kPair ? w[j] : 0.0f);
      }
    }
    for (int i = lane; i < split.rest; i += lanes) {
      const int column = split.rest_index(i);
      const float v = to_float(load_scalar<true>(x + column));
      add_products<kPair>(sums[0], v, kPair ? to_float(load_scalar<true>(y + column)) : 0.0f);
    }
  }
  Products sum = {};
#pragma unroll
  for (int j = 0; j < kRun; ++j) sum = together(sum, sums[j]);
  sum = warp_reduce(sum, together, lanes);
  if (!active || lane > 0) return;
  float result = sqrtf(sum.xx);
  if constexpr (kPair) {
    const double norms = sqrt(static_cast<double>(sum.xx)) * sqrt(static_cast<double>(sum.yy));
    result = static_cast<float>(cosine_distance({sum.xx, sum.xy, sum.yy, sum.xd, sum.dd}, norms));
  }
  store_scalar(out + row, result);
}

}  // namespace minitron::cuda
