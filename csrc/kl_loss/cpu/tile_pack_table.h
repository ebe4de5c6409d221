// The table of tile_pack.h's functions, for the files that are compiled per instruction set.
#pragma once

#include "common/cpu/tile_pack.h"
#include "kl_loss/cpu/kernels.h"

namespace minitron::MINITRON_SIMD {

// Operands are never rounded on the way in: what is packed as bf16 is bf16.
inline const bf16* bf16_source(const void* src, DType dtype) {
  if (dtype != DType::kBFloat16) throw_unreadable(dtype, DType::kBFloat16);
  return static_cast<const bf16*>(src);
}

inline PackKernels<float, bf16> tile_pack_kernels() {
  PackKernels<float, bf16> k{};
  k.transposed = [](const void* src, DType dtype, int64_t ld, const int64_t* index, int64_t rows,
                    int64_t cols,
                    bf16* dst) { tile_transposed(bf16_source(src, dtype), ld, index, rows, cols, dst); };
  k.rows = [](const void* src, DType dtype, int64_t ld, const int64_t* index, int64_t rows,
              int64_t padded_rows, int64_t cols,
              bf16* dst) { tile_rows(bf16_source(src, dtype), ld, index, rows, padded_rows, cols, dst); };
  k.convert = [](const void* src, DType dtype, int64_t ld, int64_t rows, int64_t cols, int64_t padded_cols,
                 bf16* dst) { tile_convert(bf16_source(src, dtype), ld, rows, cols, padded_cols, dst); };
  k.cast_panel = &tile_cast_panel;
  k.transpose_panel = &tile_transpose_panel;
  k.narrow = &narrow_rows<float>;
  return k;
}

}  // namespace minitron::MINITRON_SIMD
