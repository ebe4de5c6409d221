// Compiled once per SIMD level: a gradient times a factor.
#include "common/cpu/vec.h"
#include "kl_loss/cpu/scale_grad.h"

namespace minitron::MINITRON_SIMD {
namespace {

template <typename A>
void scale_grad(void* grad, DType dtype, int64_t n, A factor) {
  constexpr int L = kLanes<A>;
  dispatch_readable<A>(dtype, [&](auto element) {
    auto* p = static_cast<decltype(element)*>(grad);
    int64_t i = 0;
    for (; i + L <= n; i += L) store(p + i, load<A>(p + i) * factor);
    if (i < n) store_partial(p + i, load_partial<A>(p + i, n - i, A(0)) * factor, n - i);
  });
}

}  // namespace

const ScaleKernels& scale_kernels() {
  static const ScaleKernels table{&scale_grad<double>, &scale_grad<float>};
  return table;
}

}  // namespace minitron::MINITRON_SIMD
