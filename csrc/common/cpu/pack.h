// Repacking of GEMM operands. A GEMM here is C[M, N] (+)= A[M, K] B[K, N]. A has plain rows; B has panels of
// kPanel columns, [K, kPanel] each and padded with zeros. Panels of 16-bit operands interleave pairs of rows
// ([K/2, kPanel, 2], "VNNI"), with K rounded up to even. `Op` is the operands' type; `index`, if not null,
// lists the source rows.
#pragma once

#include <utility>

#include "common/cpu/gemm.h"
#include "common/cpu/vec.h"

namespace minitron::MINITRON_SIMD {

template <int kStep, int kSide, typename V, int... j>
inline V interleave(V a, V b, std::integer_sequence<int, j...>) {
  constexpr int n = sizeof...(j);
  if constexpr (kSide == 0) return __builtin_shufflevector(a, b, ((j & kStep) ? n + j - kStep : j)...);
  return __builtin_shufflevector(a, b, ((j & kStep) ? n + j : j + kStep)...);
}

// Transposes kLanes x kLanes elements in registers, in log2(kLanes) rounds of block swaps.
template <typename A, int kStep = kLanes<A> / 2>
inline void transpose_square(Vec<A>* v) {
  if constexpr (kStep > 0) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes<A>>{};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i) {
      if (i & kStep) continue;
      const Vec<A> a = v[i], b = v[i + kStep];
      v[i] = interleave<kStep, 0>(a, b, lanes);
      v[i + kStep] = interleave<kStep, 1>(a, b, lanes);
    }
    transpose_square<A, kStep / 2>(v);
  }
}

template <typename T>
inline const T* source_row(const T* src, int64_t ld, const int64_t* index, int64_t row) {
  return src + (index ? index[row] : row) * ld;
}

// Rows of a head are far apart, and only a few cache lines of each are read: hardware prefetchers do not
// predict them.
constexpr int64_t kPrefetchRows = 8;
template <typename T>
inline void prefetch_row(const T* src, int64_t ld, const int64_t* index, int64_t row, int64_t rows,
                         int64_t cols) {
  if (row >= rows) return;
  const char* p = reinterpret_cast<const char*>(source_row(src, ld, index, row));
  for (int64_t byte = 0; byte < cols * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(p + byte);
}

// B[K = cols, N = rows]: the transpose of rows of src. dst: ceil(rows / kPanel) panels of [cols, kPanel].
template <typename A, typename T>
void pack_transposed(const T* src, int64_t ld, const int64_t* index, int64_t rows, int64_t cols, A* dst) {
  constexpr int L = kLanes<A>;
  for (int64_t n0 = 0; n0 < round_up(rows, kPanel); n0 += L) {
    A* panel = dst + n0 / kPanel * cols * kPanel + n0 % kPanel;
    for (int64_t k0 = 0; k0 < cols; k0 += L) {
      const int64_t width = cols - k0 < L ? cols - k0 : L;
      Vec<A> block[L];
      for (int i = 0; i < L; ++i) {
        if (n0 + i >= rows) {
          block[i] = Vec<A>{};
          continue;
        }
        const T* p = source_row(src, ld, index, n0 + i) + k0;
        block[i] = width == L ? load<A>(p) : load_partial<A>(p, width, A(0));
      }
      transpose_square<A>(block);
      for (int64_t k = 0; k < width; ++k) store(panel + (k0 + k) * kPanel, block[k]);
    }
  }
}

// The same for bf16 operands: a pair of neighbouring columns is one 32-bit element.
inline void pack_transposed(const bf16* src, int64_t ld, const int64_t* index, int64_t rows, int64_t cols,
                            bf16* dst) {
  constexpr int L = kLanes<float>;
  const int64_t pairs = ceil_div(cols, 2);
  for (int64_t n0 = 0; n0 < round_up(rows, kPanel); n0 += L) {
    bf16* panel = dst + n0 / kPanel * pairs * 2 * kPanel + n0 % kPanel * 2;
    for (int64_t k0 = 0; k0 < pairs; k0 += L) {
      const int64_t width = pairs - k0 < L ? pairs - k0 : L;
      const int64_t elements = cols - 2 * k0 < 2 * L ? cols - 2 * k0 : 2 * L;
      Vec<float> block[L] = {};
      for (int i = 0; i < L && n0 + i < rows; ++i) {
        std::memcpy(&block[i], source_row(src, ld, index, n0 + i) + 2 * k0, elements * sizeof(bf16));
      }
      transpose_square<float>(block);
      for (int64_t k = 0; k < width; ++k) {
        std::memcpy(panel + (k0 + k) * 2 * kPanel, &block[k], sizeof(block[k]));
      }
    }
  }
}

// B[K = rows, N = cols]: columns [0, cols) of rows of src. dst: ceil(cols / kPanel) panels of
// [padded_rows, kPanel]; those beyond `rows` are zero.
template <typename A, typename T>
void pack_rows(const T* src, int64_t ld, const int64_t* index, int64_t rows, int64_t padded_rows,
               int64_t cols, A* dst) {
  constexpr int L = kLanes<A>;
  for (int64_t k = 0; k < padded_rows; ++k) {
    const T* p = k < rows ? source_row(src, ld, index, k) : nullptr;
    prefetch_row(src, ld, index, k + kPrefetchRows, rows, cols);
    for (int64_t c = 0; c < round_up(cols, kPanel); c += L) {
      A* out = dst + c / kPanel * padded_rows * kPanel + k * kPanel + c % kPanel;
      if (!p || c >= cols) {
        store(out, Vec<A>{});
      } else {
        store(out, cols - c >= L ? load<A>(p + c) : load_partial<A>(p + c, cols - c, A(0)));
      }
    }
  }
}

// Interleaves the elements of two vectors: a0 b0 a1 b1 ...
template <typename V, int... j>
inline void zip(V a, V b, V* low, V* high, std::integer_sequence<int, j...>) {
  constexpr int n = sizeof...(j);
  *low = __builtin_shufflevector(a, b, (j / 2 + (j & 1) * n)...);
  *high = __builtin_shufflevector(a, b, (n / 2 + j / 2 + (j & 1) * n)...);
}

inline void pack_rows(const bf16* src, int64_t ld, const int64_t* index, int64_t rows, int64_t padded_rows,
                      int64_t cols, bf16* dst) {
  typedef uint16_t V __attribute__((vector_size(MINITRON_VECTOR_BYTES)));
  constexpr int L = MINITRON_VECTOR_BYTES / 2;  // divides kPanel
  constexpr auto lanes = std::make_integer_sequence<int, L>{};
  auto fetch = [&](int64_t k, int64_t c) {
    V v{};
    if (k < rows && c < cols) {
      std::memcpy(&v, source_row(src, ld, index, k) + c, (cols - c < L ? cols - c : L) * sizeof(bf16));
    }
    return v;
  };
  for (int64_t k = 0; k < padded_rows; k += 2) {
    prefetch_row(src, ld, index, k + kPrefetchRows, rows, cols);
    prefetch_row(src, ld, index, k + kPrefetchRows + 1, rows, cols);
    for (int64_t c = 0; c < round_up(cols, kPanel); c += L) {
      bf16* out = dst + c / kPanel * padded_rows * kPanel + k * kPanel + c % kPanel * 2;
      V low, high;
      zip(fetch(k, c), fetch(k + 1, c), &low, &high, lanes);
      std::memcpy(out, &low, sizeof(V));
      std::memcpy(out + L, &high, sizeof(V));
    }
  }
}

// Rows of src as an A operand, [rows, padded_cols], zero beyond `cols`.
template <typename A, typename T>
void convert_rows(const T* src, int64_t ld, int64_t rows, int64_t cols, int64_t padded_cols, A* dst) {
  constexpr int L = kLanes<A>;
  for (int64_t r = 0; r < rows; ++r, src += ld, dst += padded_cols) {
    int64_t c = 0;
    for (; c + L <= cols; c += L) store(dst + c, load<A>(src + c));
    if (c < cols) store_partial(dst + c, load_partial<A>(src + c, cols - c, A(0)), cols - c);
    for (c = cols; c < padded_cols; ++c) dst[c] = A(0);
  }
}

inline void convert_rows(const bf16* src, int64_t ld, int64_t rows, int64_t cols, int64_t padded_cols,
                         bf16* dst) {
  for (int64_t r = 0; r < rows; ++r, src += ld, dst += padded_cols) {
    std::memcpy(dst, src, cols * sizeof(bf16));
    for (int64_t c = cols; c < padded_cols; ++c) dst[c] = bf16{0};
  }
}

// [entries, kPanel] -> the same as Op, with leading dimension ld.
template <typename A, typename Op>
void cast_panel(const A* panel, PanelSize size, Op* dst, int64_t ld) {
  for (int64_t r = 0; r < size.entries; ++r) {
    for (int c = 0; c < size.lanes; c += kLanes<A>) store(dst + r * ld + c, load<A>(panel + r * kPanel + c));
  }
}

// [entries, kPanel] -> its transpose [kPanel, padded_rows] as Op, zero beyond `entries`, with leading
// dimension ld >= padded_rows.
template <typename A, typename Op>
void transpose_panel(const A* panel, PanelSize size, int64_t padded_rows, Op* dst, int64_t ld) {
  constexpr int L = kLanes<A>;
  for (int64_t r = size.entries; r < padded_rows; ++r) {
    for (int c = 0; c < size.lanes; ++c) dst[c * ld + r] = Op{};
  }
  for (int64_t r0 = 0; r0 < size.entries; r0 += L) {
    const int64_t height = size.entries - r0 < L ? size.entries - r0 : L;
    for (int c0 = 0; c0 < size.lanes; c0 += L) {
      Vec<A> block[L] = {};
      for (int64_t i = 0; i < height; ++i) block[i] = load<A>(panel + (r0 + i) * kPanel + c0);
      transpose_square<A>(block);
      for (int i = 0; i < L; ++i) {
        Op* out = dst + (c0 + i) * ld + r0;
        if (height == L) {
          store(out, block[i]);
        } else {
          store_partial(out, block[i], height);
        }
      }
    }
  }
}

// [rows, cols] of type A, rounded to a tensor's dtype.
template <typename A>
void narrow_rows(const A* src, int64_t lds, int64_t rows, int64_t cols, void* dst, DType dtype, int64_t ldd) {
  constexpr int L = kLanes<A>;
  dispatch_readable<A>(dtype, [&](auto element) {
    for (int64_t r = 0; r < rows; ++r) {
      auto* out = static_cast<decltype(element)*>(dst) + r * ldd;
      const A* in = src + r * lds;
      int64_t c = 0;
      for (; c + L <= cols; c += L) store(out + c, load<A>(in + c));
      if (c < cols) store_partial(out + c, load_partial<A>(in + c, cols - c, A(0)), cols - c);
    }
  });
}

}  // namespace minitron::MINITRON_SIMD
