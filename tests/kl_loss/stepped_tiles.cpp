// The compiled kernels of the engines in tiles, stepped (tests/tools/stepped), and their portable twins.
#include <cstdlib>

#include "common/cpu/bf16_engines.h"
#include "common/cpu/dot_gemm.h"
#include "common/cpu/tile_gemm.h"
#include "kl_loss/cpu/tile_kernels.h"
#include "kl_loss/cpu/tile_pack_table.h"
#include "stepped.h"

namespace minitron {

void throw_unreadable(DType, DType) { std::abort(); }

namespace {

enum Pack { kTransposed, kRows, kConvert, kCastPanel, kTransposePanel, kNarrow };

struct GemmCall {
  bool amx;
  int64_t M, N, K, lda, ldc;
  bool add;
  const bf16 *a, *b;
  float* c;
};

struct PackCall {
  const PackKernels<float, bf16>* kernels;
  int kind;
  const void* src;
  int64_t ld;
  const int64_t* index;
  int64_t rows, cols, padded;
  bf16* dst;
};

void multiply(void* argument) {
  const GemmCall& x = *static_cast<GemmCall*>(argument);
  // what is fetched ahead lies anywhere, here beyond the operands: a prefetch reads nothing
  const Ahead ahead{MemoryRows::of(x.a, 200, 3), MemoryRows::of(x.b, 5000)};
  if (!x.amx) return avx512_bf16::gemm(x.M, x.N, x.K, x.lda, kPanel, x.ldc, x.add, x.a, x.b, x.c, ahead);
  amx::begin_task();
  amx::gemm(x.M, x.N, x.K, x.lda, kPanel, x.ldc, x.add, x.a, x.b, x.c, ahead);
  amx::end_task();
}

void pack(void* argument) {
  const PackCall& x = *static_cast<PackCall*>(argument);
  constexpr DType kSource = DType::kBFloat16;
  const auto* panel = static_cast<const float*>(x.src);
  switch (x.kind) {
    case kTransposed:
      return x.kernels->transposed(x.src, kSource, x.ld, x.index, x.rows, x.cols, x.dst);
    case kRows:
      return x.kernels->rows(x.src, kSource, x.ld, x.index, x.rows, x.padded, x.cols, x.dst);
    case kConvert:
      return x.kernels->convert(x.src, kSource, x.ld, x.rows, x.cols, x.padded, x.dst);
    case kCastPanel:
      return x.kernels->cast_panel(panel, {x.rows, kPanel}, x.dst, x.ld);
    case kTransposePanel:
      return x.kernels->transpose_panel(panel, {x.rows, kPanel}, x.padded, x.dst, x.ld);
    default:
      return x.kernels->narrow(panel, x.ld, x.rows, x.cols, x.dst, DType::kBFloat16, x.padded);
  }
}

}  // namespace
}  // namespace minitron

using minitron::bf16;

extern "C" {

// Sizes of a, b, c and dst in elements, of src in bytes. "" or why it was stopped.
[[gnu::visibility("default")]] const char* stepped_gemm(int amx, int64_t M, int64_t N, int64_t K, int64_t lda,
                                                        int64_t ldc, int add, const bf16* a, int64_t a_size,
                                                        const bf16* b, int64_t b_size, float* c,
                                                        int64_t c_size) {
  minitron::GemmCall call{amx != 0, M, N, K, lda, ldc, add != 0, a, b, c};
  return stepped::run(
      &minitron::multiply, &call,
      {{a, size_t(a_size) * 2, false}, {b, size_t(b_size) * 2, false}, {c, size_t(c_size) * 4, true}});
}

[[gnu::visibility("default")]] void twin_gemm(int amx, int64_t M, int64_t N, int64_t K, int64_t lda,
                                              int64_t ldc, int add, const bf16* a, const bf16* b, float* c) {
  using namespace minitron::MINITRON_SIMD;
  if (!amx) return dot_gemm<PortableDots>(M, N, K, lda, ldc, add, a, b, c, {});
  PortableTiles tiles;
  tile_gemm(tiles, M, N, K, lda, ldc, add, a, b, c, {});
}

[[gnu::visibility("default")]] const char* stepped_pack(int kind, const void* src, int64_t src_bytes,
                                                        int64_t ld, const int64_t* index, int64_t rows,
                                                        int64_t cols, int64_t padded, bf16* dst,
                                                        int64_t dst_size) {
  minitron::PackCall call{&minitron::avx512_bf16::tile_pack(), kind, src, ld, index, rows, cols, padded, dst};
  return stepped::run(&minitron::pack, &call,
                      {{src, size_t(src_bytes), false}, {dst, size_t(dst_size) * 2, true}});
}

[[gnu::visibility("default")]] void twin_pack(int kind, const void* src, int64_t ld, const int64_t* index,
                                              int64_t rows, int64_t cols, int64_t padded, bf16* dst) {
  static const auto kernels = minitron::MINITRON_SIMD::tile_pack_kernels();
  minitron::PackCall call{&kernels, kind, src, ld, index, rows, cols, padded, dst};
  minitron::pack(&call);
}

[[gnu::visibility("default")]] int64_t executed(const char* name) { return stepped::executed(name); }
}
