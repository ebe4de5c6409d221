// bf16 operands in tiles: pieces of 1 KiB that AMX loads as they lie, and that AVX512_BF16 reads row by row.
//   A tile   16 rows x 32 k: 32 neighbouring k of one row after the other
//   B tile   16 pairs of k x 16 columns: of each column (k, k + 1), so that a row is one vector of pairs
// An A operand is strips of 16 rows, and a strip its tiles one after the other along k. A B operand is panels
// of kPanel columns, and a panel for each 32 k its tiles one after the other along the columns. Rows, columns
// and k beyond the matrix are zeros: they are multiplied, and zero times what nobody wrote may be NaN.
#pragma once

#include "common/cpu/gemm.h"

namespace minitron {

constexpr int kTileRows = 16;                          // of A, and of C; columns of B
constexpr int kTileDepth = 32;                         // k of one instruction
constexpr int kTileElements = kTileRows * kTileDepth;  // 1 KiB

// Where an element of A is. ld: k of a strip, a multiple of kTileDepth.
constexpr int64_t tile_a(int64_t row, int64_t k, int64_t ld) {
  return row / kTileRows * kTileRows * ld + k / kTileDepth * kTileElements + row % kTileRows * kTileDepth +
         k % kTileDepth;
}
// Where an element of a panel of B is.
constexpr int64_t tile_b(int64_t k, int64_t column) {
  return k / kTileDepth * kTileDepth * kPanel + column / kTileRows * kTileElements +
         k % kTileDepth / 2 * kTileDepth + column % kTileRows * 2 + k % 2;
}

}  // namespace minitron
