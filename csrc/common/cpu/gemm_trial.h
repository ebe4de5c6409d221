// Whether a GEMM does what the ops ask of it, tried on small whole numbers before it is used: an instruction
// that does something else than its flag says, or a microkernel that means something else by its arguments or
// is wrong at an edge, must not go unseen.
#pragma once

#include <cstring>
#include <exception>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/cpu/gemm.h"

namespace minitron {

struct GemmTrial {
  int64_t M, N, K, ldc;
  bool add;
};

template <typename Op>
Op to_operand(float x) {
  if constexpr (std::is_same_v<Op, bf16>) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bf16{uint16_t(bits >> 16)};
  } else {
    return Op(x);
  }
}

// Whether a product is exact, and nothing else of C is written. a and b: the operands' memory, filled with
// what lies between their elements, of which A's (m, k) is at a_at(m, k) and B's (k, n) at b_at(k, n).
template <typename Op, typename PlaceA, typename PlaceB>
bool multiplies(Gemm<Op, float> gemm, const GemmTrial& trial, int64_t lda, std::vector<Op> a,
                std::vector<Op> b, PlaceA&& a_at, PlaceB&& b_at) {
  constexpr float kBeside = -7, kUnwritten = std::numeric_limits<float>::quiet_NaN();
  const auto [M, N, K, ldc, add] = trial;
  // with periods that are prime to sizes of vectors and blocks, one of which may be taken for another
  const auto a_of = [](int64_t m, int64_t k) { return (3 * m + 5 * k) % 7; };
  const auto b_of = [](int64_t k, int64_t n) { return (k * k + 4 * n) % 11; };
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t m = 0; m < M; ++m) a[a_at(m, k)] = to_operand<Op>(float(a_of(m, k)));
    for (int64_t n = 0; n < N; ++n) b[b_at(k, n)] = to_operand<Op>(float(b_of(k, n)));
  }
  std::vector<float> c((M + 1) * ldc, kBeside);  // with a row that is not C's
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) c[m * ldc + n] = add ? 1.0f : kUnwritten;
  }
  try {
    gemm(M, N, K, lda, kPanel, ldc, add, a.data(), b.data(), c.data(), {});
  } catch (const std::exception&) {
    return false;
  }
  for (int64_t m = 0; m <= M; ++m) {
    for (int64_t n = 0; n < ldc; ++n) {
      int64_t sum = add ? 1 : 0;
      for (int64_t k = 0; k < K && m < M && n < N; ++k) sum += a_of(m, k) * b_of(k, n);
      if (c[m * ldc + n] != (m < M && n < N ? float(sum) : kBeside)) return false;
    }
  }
  return true;
}

// The sizes that the ops use of operands in rows and panels: logits and dX write panels, of which the last
// has 16, 32 or 48 columns (dX's: any number), dW also into longer rows; rows and K have any number, K of
// pairs an even one. Between rows of A, and in columns of B beyond N, there may be anything.
template <typename Op>
bool multiplies_panels(Gemm<Op, float> gemm) {
  constexpr int64_t kPairs = sizeof(Op) == 2 ? 2 : 1;
  constexpr GemmTrial kTrials[] = {{19, kPanel, 70, kPanel, true},
                                   {3, 48, kMaxChain, kPanel, false},
                                   {18, 19, 32 + kPairs, kPanel + 19, true},
                                   {1, 1, kPairs, kPanel, false}};
  const Op nothing = to_operand<Op>(std::numeric_limits<float>::quiet_NaN());
  for (const GemmTrial& trial : kTrials) {
    const int64_t lda = trial.K + 6;
    const auto a_at = [&](int64_t m, int64_t k) { return m * lda + k; };
    const auto b_at = [](int64_t k, int64_t n) {
      return k / kPairs * kPairs * kPanel + n * kPairs + k % kPairs;
    };
    if (!multiplies(gemm, trial, lda, std::vector<Op>(trial.M * lda, nothing),
                    std::vector<Op>(trial.K * kPanel, nothing), a_at, b_at)) {
      return false;
    }
  }
  return true;
}

}  // namespace minitron
