// Packs the operands of a GEMM in tiles (tiles.h): what pack.h does for plain ones, with the same arguments.
// K (padded_rows, padded_cols) is whole tiles, and so are the rows of an A operand: all of these are written.
#pragma once

#include <algorithm>

#include "common/cpu/pack.h"
#include "common/cpu/tiles.h"

namespace minitron::MINITRON_SIMD {

// The fp32 elements of two vectors as bf16: of each lane (low, high), as one number of 32 bits.
inline U32 narrow_pairs(Vec<float> low, Vec<float> high) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (U32)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both);
#else
  return bf16_bits(low) | bf16_bits(high) << 16;
#endif
}

// kTileDepth neighbouring fp32 elements as bf16.
inline void narrow_row(const float* from, bf16* to) {
#if defined(__AVX512BF16__)
  const __m512bh row = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
  std::memcpy(to, &row, sizeof(row));
#else
  for (int i = 0; i < kTileDepth; i += kLanes<float>) store(to + i, load<float>(from + i));
#endif
}

// B[K = cols, N = rows]: the transpose of rows of src.
inline void tile_transposed(const bf16* src, int64_t ld, const int64_t* index, int64_t rows, int64_t cols,
                            bf16* dst) {
  constexpr int L = kLanes<float>;
  const int64_t depth = round_up(cols, kTileDepth);
  for (int64_t n = 0; n < round_up(rows, kPanel); n += L) {
    bf16* panel = dst + n / kPanel * depth * kPanel;
    for (int64_t k = 0; k < depth; k += 2 * L) {
      Vec<float> block[L] = {};  // of pairs
      const int64_t elements = std::min<int64_t>(2 * L, cols - k);
      for (int i = 0; i < L && n + i < rows && elements > 0; ++i) {
        const bf16* p = source_row(src, ld, index, n + i) + k;
        if (elements == 2 * L) {
          std::memcpy(&block[i], p, sizeof(block[i]));
        } else {
          std::memcpy(&block[i], p, elements * sizeof(bf16));
        }
      }
      transpose_square<float>(block);
      for (int i = 0; i < L; ++i)
        std::memcpy(panel + tile_b(k + 2 * i, n % kPanel), &block[i], sizeof(block[i]));
    }
  }
}

// B[K = rows, N = cols]: columns [0, cols) of rows of src; those of [rows, padded_rows) are zero.
inline void tile_rows(const bf16* src, int64_t ld, const int64_t* index, int64_t rows, int64_t padded_rows,
                      int64_t cols, bf16* dst) {
  typedef uint16_t V __attribute__((vector_size(MINITRON_VECTOR_BYTES)));
  constexpr int L = MINITRON_VECTOR_BYTES / 2;
  constexpr auto lanes = std::make_integer_sequence<int, L>{};
  const int64_t depth = round_up(padded_rows, kTileDepth);
  const auto fetch = [&](int64_t k, int64_t c) {
    V v{};
    if (k >= rows || c >= cols) return v;
    const bf16* p = source_row(src, ld, index, k) + c;
    if (cols - c >= L) {
      std::memcpy(&v, p, sizeof(v));
    } else {
      std::memcpy(&v, p, (cols - c) * sizeof(bf16));
    }
    return v;
  };
  for (int64_t k = 0; k < depth; k += 2) {
    prefetch_row(src, ld, index, k + kPrefetchRows, rows, cols);
    prefetch_row(src, ld, index, k + kPrefetchRows + 1, rows, cols);
    for (int64_t c = 0; c < round_up(cols, kPanel); c += L) {
      bf16* panel = dst + c / kPanel * depth * kPanel;
      V low, high;
      zip(fetch(k, c), fetch(k + 1, c), &low, &high, lanes);
      std::memcpy(panel + tile_b(k, c % kPanel), &low, sizeof(V));
      std::memcpy(panel + tile_b(k, c % kPanel + L / 2), &high, sizeof(V));
    }
  }
}

// Rows of src as an A operand, whose strips have padded_cols.
inline void tile_convert(const bf16* src, int64_t ld, int64_t rows, int64_t cols, int64_t padded_cols,
                         bf16* dst) {
  for (int64_t r = 0; r < round_up(rows, kTileRows); ++r) {
    for (int64_t k = 0; k < padded_cols; k += kTileDepth) {
      const int64_t elements = r < rows ? std::min<int64_t>(kTileDepth, cols - k) : 0;
      bf16* out = dst + tile_a(r, k, padded_cols);
      if (elements == kTileDepth) {
        std::memcpy(out, src + r * ld + k, kTileDepth * sizeof(bf16));
      } else {
        std::memset(out, 0, kTileDepth * sizeof(bf16));
        if (elements > 0) std::memcpy(out, src + r * ld + k, elements * sizeof(bf16));
      }
    }
  }
}

// A panel [entries, kPanel] as columns of an A operand, of which kTileDepth are one piece.
inline void tile_cast_panel(const float* panel, PanelSize size, bf16* dst, int64_t ld) {
  for (int64_t r = 0; r < round_up(size.entries, kTileRows); ++r) {
    for (int c = 0; c < size.lanes; c += kTileDepth) {
      bf16* out = dst + tile_a(r, c, ld);
      if (r < size.entries) {
        narrow_row(panel + r * kPanel + c, out);
      } else {
        std::memset(out, 0, kTileDepth * sizeof(bf16));
      }
    }
  }
}

// A panel [entries, kPanel], transposed, as rows of an A operand; its k in [entries, padded_rows) are zero.
inline void tile_transpose_panel(const float* panel, PanelSize size, int64_t padded_rows, bf16* dst,
                                 int64_t ld) {
  constexpr int L = kLanes<float>;
  const auto row = [&](int64_t r, int c) {
    return r < size.entries ? load<float>(panel + r * kPanel + c) : Vec<float>{};
  };
  for (int64_t r = 0; r < padded_rows; r += 2 * L) {
    for (int c = 0; c < size.lanes; c += L) {
      Vec<float> block[L];  // of pairs
      for (int i = 0; i < L; ++i) {
        block[i] = bit_cast<Vec<float>>(narrow_pairs(row(r + 2 * i, c), row(r + 2 * i + 1, c)));
      }
      transpose_square<float>(block);
      for (int i = 0; i < L; ++i) std::memcpy(dst + tile_a(c + i, r, ld), &block[i], sizeof(block[i]));
    }
  }
}

}  // namespace minitron::MINITRON_SIMD
