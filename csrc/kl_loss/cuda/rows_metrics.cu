// The kernels of rows.cu with metrics, and the gradients of fp32 rows in any type, for linear_kl_loss.
#include <type_traits>

#include "kl_loss/cuda/metrics_torch.cuh"

namespace minitron::cuda {
namespace {

// The gradient's type: the student's, but any where both sides are fp32.
template <typename S, typename T, typename F>
void dispatch_grad(const Tensor& grad, F&& f) {
  if constexpr (std::is_same_v<S, float> && std::is_same_v<T, float>) {
    dispatch_float(grad.scalar_type(), "grad", f);
  } else {
    f(S{});
  }
}

}  // namespace

void launch_forward_metrics(const LaunchScope& scope, const LogitTensors& logits, Divergence divergence,
                            const DeviceOptions& options, float* loss, float* stats,
                            const MetricsOut& of_metrics) {
  dispatch(divergence, logits.student, logits.teacher, [&](auto constant, auto s, auto t) {
    launch_forward<constant(), decltype(s), decltype(t)>(scope, logits, options, loss, stats, of_metrics);
  });
}

void launch_backward_metrics(const LaunchScope& scope, const LogitTensors& logits, Divergence divergence,
                             const DeviceOptions& options, const Tensor& weight, const float* stats,
                             Tensor& grad, const MetricsIn& of_metrics) {
  dispatch(divergence, logits.student, logits.teacher, [&](auto constant, auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    dispatch_grad<S, T>(grad, [&](auto g) {
      launch_backward<constant(), S, T, decltype(g)>(scope, logits, options, weight, stats, grad, of_metrics);
    });
  });
}

}  // namespace minitron::cuda
