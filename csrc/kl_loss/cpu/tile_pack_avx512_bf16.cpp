// Packing in tiles by AVX512_BF16, whose conversions take denormals for zeros. Compiled where the compiler
// knows it.
#include "kl_loss/cpu/tile_kernels.h"
#include "kl_loss/cpu/tile_pack_table.h"

namespace minitron::avx512_bf16 {

const PackKernels<float, bf16>& tile_pack() {
  static const PackKernels<float, bf16> table = tile_pack_kernels();
  return table;
}

}  // namespace minitron::avx512_bf16
