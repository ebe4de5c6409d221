"""A GEMM is tried before it is used (csrc/common/cpu/gemm_trial.h): each kind of wrong edge is found."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SOURCE = """
#include <stdexcept>
#include "common/cpu/gemm_trial.h"

namespace minitron {
namespace {

int fault;
float number(float x) { return x; }
float number(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

// The product as it should be but for one fault.
template <typename Op>
void gemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const Op* a,
          const Op* b, float* c, const Ahead&) {
  const auto is = [](int which) { return fault == which; };
  const int64_t pairs = sizeof(Op) == 2 ? 2 : 1;
  if (is(1)) throw std::runtime_error("not on this CPU");
  if (is(2)) M -= M % 4;                                  // rows that fill no block
  if (is(3)) N -= N % 16;                                 // columns that fill no vector
  if (is(4) && N < 64) N = 64;                            // columns that are not there
  if (is(5)) K -= K % (4 * pairs);                        // k that fill no step
  if (is(6)) K += pairs;                                  // one step more
  if (is(7)) ldc = N;
  if (is(8)) lda = K;
  if (is(9)) add = true;
  if (is(10)) add = false;
  if (is(11)) M += 1;
  for (int64_t m = 0; m < M; ++m) {
    const int64_t from = is(15) && m >= 16 ? m - 16 : m;  // a block of rows for another
    for (int64_t n = 0; n < N; ++n) {
      float sum = add ? c[m * ldc + n] : 0;
      for (int64_t k = 0; k < K; ++k) {
        const int64_t column = is(12) && N == 48 ? n % 32 : n;  // one kernel of several
        if (is(13) && k >= 128) break;                          // the second half of a long chain
        const int64_t row = k / pairs * pairs * ldb;
        const int64_t at = is(16) && k >= 32 ? k - 32 : k;
        sum += number(a[from * lda + at]) * number(b[row + column * pairs + k % pairs]);
      }
      c[m * ldc + n] = is(14) && N == 64 && n == 63 ? sum + 1 : sum;
    }
  }
}

}  // namespace
}  // namespace minitron

extern "C" int trial(int fault, int is_bf16) {
  minitron::fault = fault;
  return is_bf16 ? minitron::multiplies_panels<minitron::bf16>(&minitron::gemm<minitron::bf16>)
                 : minitron::multiplies_panels<float>(&minitron::gemm<float>);
}
"""
FAULTS = {
    "throws": 1,
    "a rest of rows is left out": 2,
    "a rest of columns is left out": 3,
    "columns behind are written": 4,
    "a rest of k is left out": 5,
    "a step of k too many": 6,
    "rows of C": 7,
    "rows of A": 8,
    "always adds": 9,
    "never adds": 10,
    "a row behind is written": 11,
    "wrong at 48 columns alone": 12,
    "wrong beyond 128 k alone": 13,
    "wrong in one column": 14,
    "a block of rows for another": 15,
    "a step of k for another": 16,
}


@pytest.fixture(scope="module", name="trial")
def trial_fixture(tmp_path_factory):
    if shutil.which("g++") is None or not CSRC.is_dir():
        pytest.skip("needs g++ and csrc/")
    folder = tmp_path_factory.mktemp("gemm_trial")
    (folder / "trial.cpp").write_text(SOURCE)
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{CSRC}", "trial.cpp", "-o", "trial.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "trial.so")).trial


@pytest.mark.parametrize("is_bf16", [0, 1])
def test_a_gemm_that_is_right_passes(trial, is_bf16):
    assert trial(0, is_bf16) == 1


@pytest.mark.parametrize("is_bf16", [0, 1])
@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found(trial, name, is_bf16):
    assert trial(FAULTS[name], is_bf16) == 0
