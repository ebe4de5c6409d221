#include "common/cpu/gemm.h"

#include <torch/csrc/stable/library.h>

#include "common/cpu/gemm_trial.h"

// libtorch's microkernels (torch >= 2.6). They are not part of its stable ABI, so the references are weak:
// with a libtorch that lacks them they are null pointers, and the portable GEMM is used.
namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {
__attribute__((weak)) void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c,
                                  bool add_C, const c10::BFloat16* A, const c10::BFloat16* B, float* C,
                                  bool is_vnni);
__attribute__((weak)) void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c,
                                  bool add_C, const float* A, const float* B, float* C, bool is_vnni);
__attribute__((weak)) void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

namespace minitron {
namespace {

using Bf16Fn = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const c10::BFloat16*,
                        const c10::BFloat16*, float*, bool);
using F32Fn = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const float*, const float*,
                       float*, bool);

void call_bf16(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add,
               const bf16* a, const bf16* b, float* c) {
  at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, add, reinterpret_cast<const c10::BFloat16*>(a),
                              reinterpret_cast<const c10::BFloat16*>(b), c, true);
}

void call_f32(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add,
              const float* a, const float* b, float* c) {
  at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, add, a, b, c, false);
}

struct Engines {
  Gemm<bf16, float> bf16_engine = nullptr;
  Gemm<float, float> f32_engine = nullptr;
  bool exported = false;
};

const Engines& engines() {
  static const Engines found = [] {
    Engines e;
    const Bf16Fn bf16_fn = &at::native::cpublas::brgemm;
    const F32Fn f32_fn = &at::native::cpublas::brgemm;
    e.exported = bf16_fn != nullptr && f32_fn != nullptr;
    if (bf16_fn && multiplies_panels<bf16>(&call_bf16)) e.bf16_engine = &call_bf16;
    if (f32_fn && multiplies_panels<float>(&call_f32)) e.f32_engine = &call_f32;
    brgemm_release();
    return e;
  }();
  return found;
}

std::atomic<int64_t>& flop_count() {
  static std::atomic<int64_t> count{-1};  // negative: off
  return count;
}

int64_t count_gemm_flops(bool on) { return flop_count().exchange(on ? 0 : -1); }

}  // namespace

Gemm<bf16, float> brgemm_bf16() { return engines().bf16_engine; }
Gemm<float, float> brgemm_f32() { return engines().f32_engine; }
bool exports_brgemm() { return engines().exported; }

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
