// Compiled once per SIMD level: packing in tiles by the level's vectors, and the portable twins of the GEMMs
// on them.
#include "common/cpu/dot_gemm.h"
#include "common/cpu/tile_gemm.h"
#include "kl_loss/cpu/tile_kernels.h"
#include "kl_loss/cpu/tile_pack_table.h"

namespace minitron::MINITRON_SIMD {
namespace {

void like_amx(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t, int64_t ldc, bool add, const bf16* a,
              const bf16* b, float* c, const Ahead& ahead) {
  PortableTiles tiles;
  tile_gemm(tiles, M, N, K, lda, ldc, add, a, b, c, ahead.a);
}

void like_avx512_bf16(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t, int64_t ldc, bool add,
                      const bf16* a, const bf16* b, float* c, const Ahead& ahead) {
  dot_gemm<PortableDots>(M, N, K, lda, ldc, add, a, b, c, ahead);
}

}  // namespace

const TileKernels& tile_kernels() {
  static const TileKernels table{tile_pack_kernels(), &like_amx, &like_avx512_bf16};
  return table;
}

}  // namespace minitron::MINITRON_SIMD
