// The product of tile_gemm.h, of the same operands, by instructions on vectors of pairs: VDPBF16PS
// (gemm_avx512_bf16.cpp) or, for tests on any machine, PortableDots.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/cpu/tiles.h"

// Functions that return vectors of 64 bytes are all inlined: no ABI is concerned.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"

namespace minitron::MINITRON_SIMD {

constexpr int kDotRows = 4, kDotVectors = kPanel / kTileRows;
// k of a panel that is multiplied at a time: 16 KiB of it stay in an L1 cache of 32 KiB.
constexpr int64_t kDotDepth = 128;

// kDotRows rows of a strip of A by a panel of B: 16 accumulators, more than the cycles that an instruction
// takes. Of C `rows` rows and N columns are read and written; with kWhole those are all.
template <bool kWhole, typename Dots>
[[gnu::always_inline]] inline void dot_block(int64_t rows, int64_t N, int64_t steps, bool add, const bf16* a,
                                             const bf16* b, float* c, int64_t ldc) {
  typename Dots::Sums sums[kDotRows][kDotVectors];
  const auto columns = [&](int row, int vector) { return row < rows ? N - vector * kTileRows : 0; };
#pragma GCC unroll 4
  for (int i = 0; i < kDotRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kDotVectors; ++j) {
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
      typename Dots::Pairs column[kDotVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kDotVectors; ++j) column[j] = Dots::pairs(b + j * kTileElements + p * kTileRows);
#pragma GCC unroll 4
      for (int i = 0; i < kDotRows; ++i) {
        const typename Dots::Pairs pair = Dots::broadcast(a + i * kTileDepth + p);
#pragma GCC unroll 4
        for (int j = 0; j < kDotVectors; ++j) sums[i][j] = Dots::multiply(sums[i][j], pair, column[j]);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kDotRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kDotVectors; ++j) {
      float* to = c + i * ldc + j * kTileRows;
      if constexpr (kWhole) {
        Dots::store(to, sums[i][j]);
      } else {
        Dots::store_partial(to, sums[i][j], columns(i, j));
      }
    }
  }
}

template <typename Dots>
[[gnu::noinline]] void dot_edge(int64_t rows, int64_t N, int64_t steps, bool add, const bf16* a,
                                const bf16* b, float* c, int64_t ldc) {
  dot_block<false, Dots>(rows, N, steps, add, a, b, c, ldc);
}

template <typename Dots>
inline void dot_gemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldc, bool add, const bf16* a,
                     const bf16* b, float* c) {
  for (int64_t k = 0; k < K; k += kDotDepth) {
    const int64_t steps = ceil_div(std::min(kDotDepth, K - k), kTileDepth);
    for (int64_t m = 0; m < M; m += kDotRows) {
      const int64_t rows = std::min<int64_t>(kDotRows, M - m);
      const bf16* strip = a + tile_a(m, k, lda);
      if (rows == kDotRows && N == kPanel) {
        dot_block<true, Dots>(rows, N, steps, add || k > 0, strip, b + tile_b(k, 0), c + m * ldc, ldc);
      } else {
        dot_edge<Dots>(rows, N, steps, add || k > 0, strip, b + tile_b(k, 0), c + m * ldc, ldc);
      }
    }
  }
}

// Vectors as arrays. multiply() adds up as VDPBF16PS is defined, odd k first; but it does not flush
// denormals.
struct PortableDots {
  typedef float Sums __attribute__((vector_size(64)));
  typedef uint32_t Pairs __attribute__((vector_size(64)));

  static Sums zero() { return Sums{}; }
  static Sums load(const float* p) { return load_partial(p, kTileRows); }
  static Sums load_partial(const float* p, int64_t n) {
    Sums v{};
    if (n > 0) std::memcpy(&v, p, std::min<int64_t>(n, kTileRows) * sizeof(float));
    return v;
  }
  static void store(float* p, Sums v) { store_partial(p, v, kTileRows); }
  static void store_partial(float* p, Sums v, int64_t n) {
    if (n > 0) std::memcpy(p, &v, std::min<int64_t>(n, kTileRows) * sizeof(float));
  }
  static Pairs pairs(const bf16* p) {
    Pairs v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static Pairs broadcast(const bf16* p) {
    uint32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    return pair - Pairs{};
  }
  static Sums multiply(Sums sum, Pairs a, Pairs b) {
    const Pairs odd_a = a & 0xffff0000u, odd_b = b & 0xffff0000u, even_a = a << 16, even_b = b << 16;
    return (sum + Sums(odd_a) * Sums(odd_b)) + Sums(even_a) * Sums(even_b);
  }
};

}  // namespace minitron::MINITRON_SIMD

#pragma GCC diagnostic pop
