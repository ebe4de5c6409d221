// C[M, N] (+)= A[M, K] B[K, N] for one panel of B (N <= kPanel), in plain vector code of this SIMD level; for
// bf16 operands only in tests, since fp32 operands are as fast here and need no rounding. On operands in the
// caches it is as fast as libtorch's brgemm (AVX-512 and AVX2), which fetches nothing ahead.
#pragma once

#include "common/cpu/gemm.h"
#include "common/cpu/vec.h"

namespace minitron::MINITRON_SIMD {

// A vector of B's row k from column j on. Rows are plain, or bf16 ones interleaved in pairs.
template <typename A>
inline Vec<A> load_b(const A* b, int64_t ldb, int64_t k, int64_t j) {
  return load<A>(b + k * ldb + j);
}
template <typename A>
inline Vec<A> load_b(const bf16* b, int64_t ldb, int64_t k, int64_t j) {
  U32 pairs;
  std::memcpy(&pairs, b + k / 2 * 2 * ldb + 2 * j, sizeof(pairs));
  return bit_cast<Vec<float>>(k % 2 ? pairs & 0xffff0000u : pairs << 16);
}
template <typename A>
inline A element(const A* a) {
  return *a;
}
inline float element(const bf16* a) { return bit_cast<float>(uint32_t(a->bits) << 16); }

// Between so many k a line is fetched of what comes after the GEMM.
constexpr int64_t kFetchEvery = 8;

// kRows x kVecs accumulators stay in registers. K is summed in order, so C does not depend on the blocking.
template <typename A, int kRows, int kVecs, typename Op>
inline void gemm_block(int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const Op* a,
                       const Op* b, A* c, Fetcher& fetcher) {
  constexpr int L = kLanes<A>;
  Vec<A> acc[kRows][kVecs] = {};
  for (int64_t k = 0; k < K;) {
    fetcher.next();
    for (const int64_t end = std::min(k + kFetchEvery, K); k < end; ++k) {
      Vec<A> row[kVecs];
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j) row[j] = load_b<A>(b, ldb, k, j * L);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
        for (int j = 0; j < kVecs; ++j) acc[i][j] += element(a + i * lda + k) * row[j];
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVecs; ++j) {
      const int64_t n = N - j * L;
      A* out = c + i * ldc + j * L;
      if (n >= L) {
        store(out, add ? load<A>(out) + acc[i][j] : acc[i][j]);
      } else if (n > 0) {
        store_partial(out, add ? load_partial<A>(out, n, A(0)) + acc[i][j] : acc[i][j], n);
      }
    }
  }
}

// Where column n of a panel of B begins in its first row.
template <typename Op>
inline const Op* column_of(const Op* b, int64_t n) {
  return b + (sizeof(Op) == 2 ? 2 * n : n);
}

// The columns of C that kVecs vectors hold, N of them.
template <typename A, int kVecs, typename Op>
inline void gemm_columns(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                         const Op* a, const Op* b, A* c, Fetcher& fetcher) {
  constexpr int kRows = kVecs > 1 ? 6 : 12;  // so that additions overlap
  int64_t m = 0;
  for (; m + kRows <= M; m += kRows) {
    gemm_block<A, kRows, kVecs>(N, K, lda, ldb, ldc, add, a + m * lda, b, c + m * ldc, fetcher);
  }
  for (; m + 4 <= M; m += 4) {
    gemm_block<A, 4, kVecs>(N, K, lda, ldb, ldc, add, a + m * lda, b, c + m * ldc, fetcher);
  }
  for (; m < M; ++m) {
    gemm_block<A, 1, kVecs>(N, K, lda, ldb, ldc, add, a + m * lda, b, c + m * ldc, fetcher);
  }
}

// A last block of columns takes no more vectors than it needs: of few tokens a panel has few.
template <typename Op, typename A>
void portable_gemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                   const Op* a, const Op* b, A* c, const Ahead& ahead) {
  Fetcher fetcher(ahead);
  constexpr int L = kLanes<A>, kVecs = MINITRON_VECTOR_BYTES == 64 ? 4 : 2;
  for (int64_t n = 0; n < N; n += kVecs * L) {
    const Op* columns = column_of(b, n);
    const int64_t rest = N - n;
    if (rest <= L) {
      gemm_columns<A, 1>(M, rest, K, lda, ldb, ldc, add, a, columns, c + n, fetcher);
    } else if (rest <= 2 * L) {
      gemm_columns<A, 2>(M, rest, K, lda, ldb, ldc, add, a, columns, c + n, fetcher);
    } else {
      gemm_columns<A, kVecs>(M, rest, K, lda, ldb, ldc, add, a, columns, c + n, fetcher);
    }
  }
}

}  // namespace minitron::MINITRON_SIMD
