#include "common/cpu/gemm.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <exception>
#include <vector>

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

#if defined(__x86_64__)
#include <cpuid.h>
#endif

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

// Computes one small product with a known result: an unsupported CPU throws, and a microkernel that means
// something else by its arguments gives other numbers.
template <typename Op>
bool works(Gemm<Op, float> gemm, Op one, Op two) {
  constexpr int64_t M = 3, K = 4;
  std::vector<Op> a(M * K, one), b(K * kPanel, two);
  std::vector<float> c(M * kPanel, 1.0f);
  try {
    gemm(M, kPanel, K, K, kPanel, kPanel, true, a.data(), b.data(), c.data());
  } catch (const std::exception&) {
    return false;
  }
  for (float x : c) {
    if (x != 9.0f) return false;
  }
  return true;
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
    if (bf16_fn && works<bf16>(&call_bf16, bf16{0x3f80}, bf16{0x4000})) e.bf16_engine = &call_bf16;
    if (f32_fn && works<float>(&call_f32, 1.0f, 2.0f)) e.f32_engine = &call_f32;
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

struct Cpu {
  bool amd = false, avx512_bf16 = false, amx_bf16 = false;
};

const Cpu& cpu() {
  static const Cpu found = [] {
    Cpu c;
#if defined(__x86_64__)
    unsigned a, b, cx, d;
    if (__get_cpuid(0, &a, &b, &cx, &d)) c.amd = b == signature_AMD_ebx;
    if (__get_cpuid_count(7, 0, &a, &b, &cx, &d)) c.amx_bf16 = d >> 22 & 1;
    if (__get_cpuid_count(7, 1, &a, &b, &cx, &d)) c.avx512_bf16 = a >> 5 & 1;
#endif
    return c;
  }();
  return found;
}

}  // namespace

Gemm<bf16, float> brgemm_bf16() { return engines().bf16_engine; }
Gemm<float, float> brgemm_f32() { return engines().f32_engine; }

bool counting_flops() { return flop_count() >= 0; }
void add_flops(int64_t flops) { flop_count() += flops; }

void brgemm_release() {
  if (&at::native::cpublas::brgemm_release) at::native::cpublas::brgemm_release(true);
}

// A rule and not a measurement, so that a machine gives the same bits every time. AMX, and AVX512_BF16 on AMD
// (from Zen 4 on), multiply bf16 at least twice as fast as fp32. Without AMX, Intel's VDPBF16PS is half as
// fast as its fp32 FMA (measured on Emerald Rapids: 87 against 165 GFLOP/s per core), and bf16 widens to fp32
// without rounding.
const char* bf16_operand_type() {
  if (!engines().bf16_engine) return "f32";
  return cpu().amx_bf16 || (cpu().amd && cpu().avx512_bf16) ? "bf16" : "f32";
}

std::string gemm_engine_report() {
  const Engines& e = engines();
  const std::string f32 = e.f32_engine ? "brgemm f32" : "portable f32";
  std::string report = "fp32, fp16: " + f32 + "; bf16: ";
  if (std::string(bf16_operand_type()) == "bf16") {
    report += "brgemm bf16";
  } else {
    report += f32 + " on operands widened to fp32";
    if (e.bf16_engine) report += " (this CPU multiplies fp32 faster than bf16)";
  }
  report += "; float64: portable";
  if (!e.exported) report += ". libtorch does not export brgemm";
  return report;
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
