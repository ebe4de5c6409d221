// kl_scale_grad_ on CPU: a task is a run of elements.
#include "kl_loss/cpu/scale_grad.h"

#include <torch/csrc/stable/library.h>

#include "common/cpu/parallel.h"
#include "common/cpu/tensors.h"

namespace minitron {
namespace {

constexpr int64_t kElementsPerTask = 1 << 16;

template <typename A>
void scale_by(Tensor& grad, const Tensor& factor) {
  const A value = *vector_of<A>(factor, 1, "factor");
  const int64_t n = grad.numel();
  if (value == A(1) || n == 0) return;
  const DType dtype = dtype_of(grad, "grad");
  const int64_t element_size = bytes_of(dtype);
  char* data = static_cast<char*>(grad.mutable_data_ptr());
  const ScaleKernels& kernels = scale_kernels();
  parallel_tasks(ceil_div(n, kElementsPerTask), [&](int64_t task, int64_t) {
    const int64_t begin = task * kElementsPerTask;
    kernels.scale(data + begin * element_size, dtype, std::min(kElementsPerTask, n - begin), value);
  });
}

void kl_scale_grad(Tensor grad, Tensor factor) {
  const bool wide = dtype_of(grad, "grad") == DType::kFloat64;
  STD_TORCH_CHECK(grad.is_contiguous(), "grad must be contiguous");
  STD_TORCH_CHECK(factor.dim() == 0, "factor must have no dimensions, got ", factor.dim());
  check_memory(grad, "grad");
  wide ? scale_by<double>(grad, factor) : scale_by<float>(grad, factor);
}

}  // namespace
}  // namespace minitron

STABLE_TORCH_LIBRARY_IMPL(minitron_kernels, CPU, m) {
  m.impl("kl_scale_grad_", TORCH_BOX(&minitron::kl_scale_grad));
}
