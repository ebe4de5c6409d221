// bf16 GEMM by AVX512_BF16, of operands in tiles. Compiled where the compiler knows the instructions, called
// where bf16_engines.cpp finds that the CPU has them.
#include <immintrin.h>

#include "common/cpu/bf16_engines.h"
#include "common/cpu/dot_gemm.h"

namespace minitron::avx512_bf16 {
namespace {

struct Avx512Dots {
  using Sums = __m512;
  using Pairs = __m512i;

  static __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
  static Sums zero() { return _mm512_setzero_ps(); }
  static Sums load(const float* p) { return _mm512_loadu_ps(p); }
  static Sums load_partial(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store(float* p, Sums v) { _mm512_storeu_ps(p, v); }
  static void store_partial(float* p, Sums v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
  static Pairs pairs(const bf16* p) { return _mm512_loadu_si512(p); }
  static Pairs broadcast(const bf16* p) {
    int pair;
    std::memcpy(&pair, p, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static Sums multiply(Sums sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};

}  // namespace

void gemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t, int64_t ldc, bool add, const bf16* a,
          const bf16* b, float* c, const Ahead& ahead) {
  dot_gemm<Avx512Dots>(M, N, K, lda, ldc, add, a, b, c, ahead);
}

}  // namespace minitron::avx512_bf16
