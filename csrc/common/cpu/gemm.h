// The matrix multiplications of the CPU kernels: one signature, several implementations.
#pragma once

#include <atomic>
#include <cstdint>

#include "common/cpu/ahead.h"
#include "common/types.h"

namespace minitron {

// Columns of a packed B panel (see pack.h). 64 keeps four AVX-512 accumulators per row of A.
constexpr int kPanel = 64;
// Tokens of a last panel are computed in multiples of so many: whole vectors of every SIMD level.
constexpr int64_t kLaneStep = 16;
// What is computed of a panel [entries, kPanel]: rows, and the first columns of each, a multiple of
// kLaneStep.
struct PanelSize {
  int64_t entries, lanes;
};
// Most products that are summed in one accumulator. A longer K is split: one long chain has twice the fp32
// error.
constexpr int64_t kMaxChain = 256;

// C[M, N] = A[M, K] B[K, N], or += with add. N <= kPanel, ldb = kPanel. Op is float, double or bf16 (B in
// pairs of rows). Kernels of this library fetch `ahead` into the L2 cache meanwhile.
template <typename Op, typename A>
using Gemm = void (*)(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                      const Op* a, const Op* b, A* c, const Ahead& ahead);

// torch's brgemm microkernel, or nullptr where libtorch does not export it or this CPU cannot run it.
Gemm<bf16, float> brgemm_bf16();
// Whether this libtorch has it at all.
bool exports_brgemm();
// Releases the tile registers (AMX) that brgemm_bf16 may have configured on this thread.
void brgemm_release();

// For tests. While flops are being counted, counted(gemm) adds each call's 2 M N K; else it is `gemm` itself.
bool counting_flops();
void add_flops(int64_t flops);
template <typename Op, typename A>
Gemm<Op, A> counted(Gemm<Op, A> gemm) {
  static std::atomic<Gemm<Op, A>> inner;
  if (!counting_flops()) return gemm;
  inner = gemm;
  return [](int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const Op* a,
            const Op* b, A* c, const Ahead& ahead) {
    add_flops(2 * M * N * K);
    inner.load()(M, N, K, lda, ldb, ldc, add, a, b, c, ahead);
  };
}

}  // namespace minitron
