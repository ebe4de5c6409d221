#include "common/cpu/gemm.h"

#include <torch/csrc/stable/library.h>

#include "common/cpu/gemm_trial.h"

// libtorch's microkernel (torch >= 2.6). It is not part of its stable ABI, so the references are weak: with a
// libtorch that lacks it they are null pointers, and bf16 is widened to fp32.
namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {
__attribute__((weak)) void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c,
                                  bool add_C, const c10::BFloat16* A, const c10::BFloat16* B, float* C,
                                  bool is_vnni);
__attribute__((weak)) void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

namespace minitron {
namespace {

void call_brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                 const bf16* a, const bf16* b, float* c, const Ahead&) {
  at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, add, reinterpret_cast<const c10::BFloat16*>(a),
                              reinterpret_cast<const c10::BFloat16*>(b), c, true);
}

std::atomic<int64_t>& flop_count() {
  static std::atomic<int64_t> count{-1};  // negative: off
  return count;
}

int64_t count_gemm_flops(bool on) { return flop_count().exchange(on ? 0 : -1); }

}  // namespace

Gemm<bf16, float> brgemm_bf16() {
  static const Gemm<bf16, float> found = [] {
    const bool usable = exports_brgemm() && multiplies_panels<bf16>(&call_brgemm);
    brgemm_release();
    return usable ? &call_brgemm : nullptr;
  }();
  return found;
}
bool exports_brgemm() { return &at::native::cpublas::brgemm != nullptr; }

bool counting_flops() { return flop_count() >= 0; }
void add_flops(int64_t flops) { flop_count() += flops; }

void brgemm_release() {
  if (&at::native::cpublas::brgemm_release) at::native::cpublas::brgemm_release(true);
}

}  // namespace minitron

STABLE_TORCH_LIBRARY_FRAGMENT(minitron_kernels, m) {
  // For tests: starts or stops counting the GEMMs' flops. Returns the count so far, -1 if it was not
  // counting.
  m.def("count_gemm_flops(bool on) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(minitron_kernels, CompositeExplicitAutograd, m) {
  m.impl("count_gemm_flops", TORCH_BOX(&minitron::count_gemm_flops));
}
