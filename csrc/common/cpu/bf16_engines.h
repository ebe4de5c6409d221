// What multiplies bf16 operands here: this library's own kernels for AMX and for AVX512_BF16 on operands in
// tiles (tiles.h), or libtorch's; or nothing, and bf16 is widened to fp32.
#pragma once

#include <string>

#include "common/cpu/gemm.h"

namespace minitron {

// Defined where the compiler knew the instructions (MINITRON_HAVE_AMX, MINITRON_HAVE_AVX512_BF16). They take
// denormals, of operands and of sums, for zeros. AMX multiplies between begin_task() and end_task() on a
// thread.
namespace amx {
void begin_task();
void end_task();
void gemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const bf16* a,
          const bf16* b, float* c, const Ahead& ahead);
}  // namespace amx
namespace avx512_bf16 {
void gemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const bf16* a,
          const bf16* b, float* c, const Ahead& ahead);
}  // namespace avx512_bf16

// Why the kernels cannot be used here; "" where they can. The first call asks the operating system for AMX,
// and multiplies once to see that the result is right.
const std::string& why_no_amx();
const std::string& why_no_avx512_bf16();

// The engine in which bf16 x bf16 -> fp32 runs fastest here, by its name in a plan: "amx", "avx512_bf16",
// "bf16" (libtorch's), or "f32" (bf16 widens exactly).
const char* bf16_engine();
// One line for people: which implementation serves which dtype, and why.
std::string gemm_engine_report();

}  // namespace minitron
