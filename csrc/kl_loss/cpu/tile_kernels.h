// Packing for the engines whose operands lie in tiles (common/cpu/tiles.h), and the portable twins of their
// GEMMs.
#pragma once

#include "kl_loss/cpu/kernels.h"

namespace minitron {

struct TileKernels {
  PackKernels<float, bf16> pack;
  Gemm<bf16, float> like_amx, like_avx512_bf16;  // for tests: the code around the instructions, on any CPU
};
MINITRON_TABLE_PER_LEVEL(TileKernels, tile_kernels)

// The packing by AVX512_BF16, which the kernels for AMX and AVX512_BF16 use.
namespace avx512_bf16 {
const PackKernels<float, bf16>& tile_pack();
}  // namespace avx512_bf16

}  // namespace minitron
