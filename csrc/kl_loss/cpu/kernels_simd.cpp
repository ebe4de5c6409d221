// Compiled once per SIMD level: the level's table of kernels.
#include "common/cpu/pack.h"
#include "common/cpu/portable_gemm.h"
#include "kl_loss/cpu/panel_kernels.h"
#include "kl_loss/cpu/row_kernels.h"
#include "kl_loss/cpu/sparse_panel_kernels.h"

namespace minitron::MINITRON_SIMD {
namespace {

// Calls f with src as a pointer to elements of its dtype.
template <typename Op, typename F>
void with_source(const void* src, DType dtype, F&& f) {
  dispatch_readable<Op>(dtype, [&](auto element) { f(static_cast<const decltype(element)*>(src)); });
}

template <typename A, typename Op>
constexpr PackKernels<A, Op> pack_kernels() {
  PackKernels<A, Op> k{};
  k.transposed = [](const void* src, DType dtype, int64_t ld, const int64_t* index, int64_t rows,
                    int64_t cols, Op* dst) {
    with_source<Op>(src, dtype, [&](const auto* p) { pack_transposed(p, ld, index, rows, cols, dst); });
  };
  k.rows = [](const void* src, DType dtype, int64_t ld, const int64_t* index, int64_t rows,
              int64_t padded_rows, int64_t cols, Op* dst) {
    with_source<Op>(src, dtype,
                    [&](const auto* p) { pack_rows(p, ld, index, rows, padded_rows, cols, dst); });
  };
  k.convert = [](const void* src, DType dtype, int64_t ld, int64_t rows, int64_t cols, int64_t padded_cols,
                 Op* dst) {
    with_source<Op>(src, dtype, [&](const auto* p) { convert_rows(p, ld, rows, cols, padded_cols, dst); });
  };
  k.cast_panel = &cast_panel<A, Op>;
  k.transpose_panel = &transpose_panel<A, Op>;
  k.narrow = &narrow_rows<A>;
  return k;
}

template <typename A>
constexpr KlKernels<A> kl_kernels() {
  return {&row_forward<A>,       &row_backward<A>,     &panel_stats<A>,
          &panel_kl<A>,          &panel_grad<A>,       &sparse_panel_stats<A>,
          &sparse_panel_grad<A>, &panel_entry_sums<A>, &portable_gemm<A, A>};
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels table{
      kl_kernels<float>(),         kl_kernels<double>(),           pack_kernels<float, float>(),
      pack_kernels<float, bf16>(), pack_kernels<double, double>(), &portable_gemm<bf16, float>};
  return table;
}

}  // namespace minitron::MINITRON_SIMD
