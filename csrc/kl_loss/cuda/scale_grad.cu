// Launcher of kl_scale_grad_. It does not wait for the GPU, and allocates nothing.
#include <algorithm>

#include "common/cuda/launch_torch.cuh"
#include "common/memory.h"
#include "kl_loss/cuda/scale_grad.cuh"

namespace minitron::cuda {
namespace {

using torch::stable::Tensor;

void kl_scale_grad_cuda(Tensor grad, const Tensor& factor) {
  STD_TORCH_CHECK(grad.is_contiguous(), "grad must be contiguous");
  STD_TORCH_CHECK(factor.dim() == 0 && factor.scalar_type() == torch::headeronly::ScalarType::Float &&
                      factor.device() == grad.device(),
                  "factor must be float32 without dimensions, on the device of grad");
  check_memory(grad, "grad");
  const int64_t n = grad.numel();
  const LaunchScope scope(grad);
  dispatch_float(grad.scalar_type(), "grad", [&](auto element) {
    using T = decltype(element);
    if (n == 0) return;
    const int64_t turns = (n + kScaleTurn<T> - 1) / kScaleTurn<T>;
    MINITRON_LAUNCH(scale_grad_kernel<T>, dim3(std::min(turns, kScaleBlocks)), dim3(kScaleThreads),
                    scope.stream(), static_cast<T*>(grad.mutable_data_ptr()), n,
                    static_cast<const float*>(factor.const_data_ptr()));
  });
  scope.check("kl_scale_grad_");
}

}  // namespace
}  // namespace minitron::cuda

STABLE_TORCH_LIBRARY_IMPL(MINITRON_CUDA_LIBRARY, MINITRON_CUDA_KEY, m) {
  m.impl("kl_scale_grad_", TORCH_BOX(&minitron::cuda::kl_scale_grad_cuda));
}
