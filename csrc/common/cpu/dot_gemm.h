// The product of tile_gemm.h, of the same operands, by instructions on vectors of pairs: VDPBF16PS
// (gemm_avx512_bf16.cpp) or, for tests on any machine, PortableDots.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>

#include "common/cpu/ahead.h"
#include "common/cpu/tiles.h"

namespace minitron::MINITRON_SIMD {

constexpr int kDotRows = 4, kDotVectors = kPanel / kTileRows;
// k of a panel that is multiplied at a time: 16 KiB of it stay in an L1 cache of 32 KiB.
constexpr int64_t kDotDepth = 128;
// Between so many k a line is fetched of what comes after the GEMM.
constexpr int64_t kDotFetchEvery = 16;

// kDotRows rows of a strip of A by kVectors vectors of columns of a panel of B: with all four, 16
// accumulators, more than the cycles that an instruction takes. Of C `rows` rows and N columns are read and
// written; with kWhole those are all.
template <bool kWhole, int kVectors, typename Dots>
[[gnu::always_inline]] inline void dot_block(int64_t rows, int64_t N, int64_t steps, bool add, const bf16* a,
                                             const bf16* b, float* c, int64_t ldc, Fetcher& fetcher) {
  typename Dots::Sums sums[kDotRows][kVectors];
  const auto columns = [&](int row, int vector) { return row < rows ? N - vector * kTileRows : 0; };
#pragma GCC unroll 4
  for (int i = 0; i < kDotRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const float* from = c + i * ldc + j * kTileRows;
      if (!add) {
        sums[i][j] = Dots::zero();
      } else if constexpr (kWhole) {
        sums[i][j] = Dots::load(from);
      } else {
        sums[i][j] = Dots::load_partial(from, columns(i, j));
      }
    }
  }
  for (int64_t k = 0; k < steps; ++k, a += kTileElements, b += kTileDepth * kPanel) {
    for (int p = 0; p < kTileDepth; p += 2) {
      if (p % kDotFetchEvery == 0) fetcher.next();
      typename Dots::Pairs column[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) column[j] = Dots::pairs(b + j * kTileElements + p * kTileRows);
#pragma GCC unroll 4
      for (int i = 0; i < kDotRows; ++i) {
        const typename Dots::Pairs pair = Dots::broadcast(a + i * kTileDepth + p);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sums[i][j] = Dots::multiply(sums[i][j], pair, column[j]);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kDotRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + i * ldc + j * kTileRows;
      if constexpr (kWhole) {
        Dots::store(to, sums[i][j]);
      } else {
        Dots::store_partial(to, sums[i][j], columns(i, j));
      }
    }
  }
}

// At the edge of C: no more vectors of columns than have one of C's, where a panel may have few. What is left
// of the rows and columns is padding, of zeros.
template <typename Dots>
[[gnu::noinline]] void dot_edge(int64_t rows, int64_t N, int64_t steps, bool add, const bf16* a,
                                const bf16* b, float* c, int64_t ldc, Fetcher& fetcher) {
  static_assert(kDotVectors == 4);
  switch (ceil_div(N, kTileRows)) {
    case 1:
      return dot_block<false, 1, Dots>(rows, N, steps, add, a, b, c, ldc, fetcher);
    case 2:
      return dot_block<false, 2, Dots>(rows, N, steps, add, a, b, c, ldc, fetcher);
    case 3:
      return dot_block<false, 3, Dots>(rows, N, steps, add, a, b, c, ldc, fetcher);
    default:
      return dot_block<false, 4, Dots>(rows, N, steps, add, a, b, c, ldc, fetcher);
  }
}

template <typename Dots>
inline void dot_gemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldc, bool add, const bf16* a,
                     const bf16* b, float* c, const Ahead& ahead) {
  Fetcher fetcher(ahead);
  for (int64_t k = 0; k < K; k += kDotDepth) {
    const int64_t steps = ceil_div(std::min(kDotDepth, K - k), kTileDepth);
    for (int64_t m = 0; m < M; m += kDotRows) {
      const int64_t rows = std::min<int64_t>(kDotRows, M - m);
      const bf16* strip = a + tile_a(m, k, lda);
      if (rows == kDotRows && N == kPanel) {
        dot_block<true, kDotVectors, Dots>(rows, N, steps, add || k > 0, strip, b + tile_b(k, 0), c + m * ldc,
                                           ldc, fetcher);
      } else {
        dot_edge<Dots>(rows, N, steps, add || k > 0, strip, b + tile_b(k, 0), c + m * ldc, ldc, fetcher);
      }
    }
  }
}

// Vectors as arrays. multiply() adds up as VDPBF16PS is defined, odd k first; but it does not flush
// denormals.
struct PortableDots {
  struct Sums {
    float lanes[kTileRows];
  };
  struct Pairs {
    uint32_t lanes[kTileRows];
  };

  static Sums zero() { return {}; }
  static Sums load(const float* p) { return load_partial(p, kTileRows); }
  static Sums load_partial(const float* p, int64_t n) {
    Sums v{};
    if (n > 0) std::memcpy(v.lanes, p, std::min<int64_t>(n, kTileRows) * sizeof(float));
    return v;
  }
  static void store(float* p, const Sums& v) { store_partial(p, v, kTileRows); }
  static void store_partial(float* p, const Sums& v, int64_t n) {
    if (n > 0) std::memcpy(p, v.lanes, std::min<int64_t>(n, kTileRows) * sizeof(float));
  }
  static Pairs pairs(const bf16* p) {
    Pairs v;
    std::memcpy(v.lanes, p, sizeof(v.lanes));
    return v;
  }
  static Pairs broadcast(const bf16* p) {
    uint32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    Pairs v;
    for (uint32_t& lane : v.lanes) lane = pair;
    return v;
  }
  static Sums multiply(Sums sum, const Pairs& a, const Pairs& b) {
    for (int i = 0; i < kTileRows; ++i) {
      sum.lanes[i] += odd(a.lanes[i]) * odd(b.lanes[i]);
      sum.lanes[i] += even(a.lanes[i]) * even(b.lanes[i]);
    }
    return sum;
  }

 private:
  static float odd(uint32_t pair) { return std::bit_cast<float>(pair & 0xffff0000u); }
  static float even(uint32_t pair) { return std::bit_cast<float>(pair << 16); }
};

}  // namespace minitron::MINITRON_SIMD
