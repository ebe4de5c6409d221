// The GEMM of operands in tiles (tiles.h): C[M, N] (+)= A[M, K] B[K, N], N <= kPanel. `Tiles` has eight
// registers of one tile each, and the operations on them: AmxTiles (gemm_amx.cpp) or, for tests on any
// machine, PortableTiles. lda is the k of a strip of A. K, M and N may have any value: operands are padded
// with zeros, and of C only M rows and N columns are read and written.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/cpu/ahead.h"
#include "common/cpu/tiles.h"

namespace minitron::MINITRON_SIMD {

constexpr int kTileBlock = 2 * kTileRows;  // rows and columns of C that are in registers

// kStrips strips of A by two neighbouring column tiles of B. Registers 0 to 3 are C, 4 and 5 A, 6 and 7 B: an
// operand that is loaded serves two products. With each step `ahead` rows of `next`, the block that comes
// after this one, are fetched, and `lines` of what comes after the GEMM.
template <int kStrips, typename Tiles>
[[gnu::always_inline]] inline void tile_block(Tiles& t, const bf16* a, int64_t lda, const bf16* b,
                                              int64_t steps, bool add, float* c, int64_t ldc,
                                              const float* next, int64_t ahead, Fetcher& fetcher,
                                              int64_t lines) {
  const int64_t row_bytes = ldc * int64_t(sizeof(float));
  float* const lower = c + kTileRows * ldc;
  if (add) {
    t.template load<0>(c, row_bytes);
    t.template load<1>(c + kTileRows, row_bytes);
    if constexpr (kStrips == 2) {
      t.template load<2>(lower, row_bytes);
      t.template load<3>(lower + kTileRows, row_bytes);
    }
  } else {
    t.template zero<0>();
    t.template zero<1>();
    if constexpr (kStrips == 2) {
      t.template zero<2>();
      t.template zero<3>();
    }
  }
  for (int64_t k = 0; k < steps; ++k, a += kTileElements, b += kTileDepth * kPanel) {
    t.template load_once<4>(a);
    t.template load<6>(b, 64);
    t.template multiply<0, 4, 6>();
    t.template load<7>(b + kTileElements, 64);
    t.template multiply<1, 4, 7>();
    if constexpr (kStrips == 2) {
      t.template load_once<5>(a + kTileRows * lda);
      t.template multiply<2, 5, 6>();
      t.template multiply<3, 5, 7>();
    }
    for (int64_t i = 0; i < ahead; ++i, next += ldc) {
      __builtin_prefetch(next, 1);
      __builtin_prefetch(next + kTileRows, 1);
    }
    for (int64_t i = 0; i < lines; ++i) fetcher.next();
  }
  t.template store<0>(c, row_bytes);
  t.template store<1>(c + kTileRows, row_bytes);
  if constexpr (kStrips == 2) {
    t.template store<2>(lower, row_bytes);
    t.template store<3>(lower + kTileRows, row_bytes);
  }
}

// A block of which only some rows and columns are C's.
template <typename Tiles>
[[gnu::noinline]] void tile_edge(Tiles& t, int64_t rows, int64_t cols, const bf16* a, int64_t lda,
                                 const bf16* b, int64_t steps, bool add, float* c, int64_t ldc,
                                 Fetcher& fetcher, int64_t lines) {
  alignas(64) float block[kTileBlock * kTileBlock] = {};
  for (int64_t r = 0; add && r < rows; ++r) {
    std::memcpy(block + r * kTileBlock, c + r * ldc, cols * sizeof(float));
  }
  if (rows > kTileRows) {
    tile_block<2>(t, a, lda, b, steps, add, block, kTileBlock, nullptr, 0, fetcher, lines);
  } else {
    tile_block<1>(t, a, lda, b, steps, add, block, kTileBlock, nullptr, 0, fetcher, lines);
  }
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(c + r * ldc, block + r * kTileBlock, cols * sizeof(float));
  }
}

// Two column tiles of B at a time, which stay in the L1 cache while all of A streams past. What is fetched
// ahead is of A, which comes from memory: all of B is in the L2 where it has the usual sizes.
template <typename Tiles>
[[gnu::always_inline]] inline void tile_gemm(Tiles& t, int64_t M, int64_t N, int64_t K, int64_t lda,
                                             int64_t ldc, bool add, const bf16* a, const bf16* b, float* c,
                                             const MemoryRows& next_a) {
  const int64_t steps = ceil_div(K, kTileDepth), c_rows = steps ? ceil_div(kTileBlock, steps) : 0;
  const int64_t all_steps = ceil_div(M, kTileBlock) * ceil_div(N, kTileBlock) * steps;
  const int64_t lines = all_steps ? ceil_div(next_a.lines(), all_steps) : 0;
  Fetcher fetcher({next_a, {}});
  for (int64_t n = 0; n < N; n += kTileBlock) {
    const bf16* columns = b + tile_b(0, n);
    const int64_t cols = std::min<int64_t>(kTileBlock, N - n);
    for (int64_t m = 0; m < M; m += kTileBlock) {
      const int64_t rows = std::min<int64_t>(kTileBlock, M - m);
      float* block = c + m * ldc + n;
      if (rows == kTileBlock && cols == kTileBlock) {
        const int64_t ahead = m + 2 * kTileBlock <= M ? c_rows : 0;
        tile_block<2>(t, a + m * lda, lda, columns, steps, add, block, ldc, block + kTileBlock * ldc, ahead,
                      fetcher, lines);
      } else {
        tile_edge(t, rows, cols, a + m * lda, lda, columns, steps, add, block, ldc, fetcher, lines);
      }
    }
  }
}

// The registers as arrays. multiply() adds up as TDPBF16PS is defined: even and odd k for themselves, both
// from zero; but it does not flush denormals.
struct PortableTiles {
  typedef float Row __attribute__((vector_size(64)));
  typedef uint32_t Pairs __attribute__((vector_size(64)));
  struct alignas(64) Register {
    char rows[kTileRows][64];
  };
  Register registers[8];

  template <int i>
  void load(const void* from, int64_t stride) {
    for (int r = 0; r < kTileRows; ++r) {
      std::memcpy(registers[i].rows[r], static_cast<const char*>(from) + r * stride, 64);
    }
  }
  template <int i>
  void load_once(const void* from) {
    load<i>(from, 64);
  }
  template <int i>
  void store(void* to, int64_t stride) const {
    for (int r = 0; r < kTileRows; ++r) {
      std::memcpy(static_cast<char*>(to) + r * stride, registers[i].rows[r], 64);
    }
  }
  template <int i>
  void zero() {
    registers[i] = {};
  }
  template <int to, int a, int b>
  void multiply() {
    for (int r = 0; r < kTileRows; ++r) {
      Row even{}, odd{}, sum;
      for (int p = 0; p < kTileRows; ++p) {
        uint32_t pair;
        Pairs column;
        std::memcpy(&pair, registers[a].rows[r] + 4 * p, sizeof(pair));
        std::memcpy(&column, registers[b].rows[p], sizeof(column));
        const uint32_t bits[2] = {pair << 16, pair & 0xffff0000u};
        float x[2];
        std::memcpy(x, bits, sizeof(x));
        const Pairs low = column << 16, high = column & 0xffff0000u;
        Row y[2];
        std::memcpy(&y[0], &low, sizeof(low));
        std::memcpy(&y[1], &high, sizeof(high));
        even += x[0] * y[0];
        odd += x[1] * y[1];
      }
      std::memcpy(&sum, registers[to].rows[r], sizeof(sum));
      sum += even + odd;
      std::memcpy(registers[to].rows[r], &sum, sizeof(sum));
    }
  }
};

}  // namespace minitron::MINITRON_SIMD
