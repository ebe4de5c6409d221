// Launchers of the row kernels. They do not wait for the GPU, and allocate only the outputs.
#include <optional>
#include <tuple>

#include "kl_loss/cuda/launch_torch.cuh"
#include "kl_loss/cuda/metrics_torch.cuh"

namespace minitron::cuda {
namespace {

std::tuple<Tensor, Tensor> kl_loss_forward_cuda(const Tensor& student_logits, const Tensor& teacher_logits,
                                                const std::optional<Tensor>& mask, int64_t vocab_size,
                                                const std::vector<double>& options) {
  const LogitTensors logits = {student_logits, teacher_logits, std::nullopt, std::nullopt, mask};
  const int64_t rows = logits.check(vocab_size);
  const LossOptions loss_options = LossOptions::of(options);
  const DeviceOptions device_options(loss_options, vocab_size);
  const LaunchScope scope(student_logits);
  Tensor loss = torch::stable::new_empty(student_logits, {rows}, ScalarType::Float);
  Tensor stats = torch::stable::new_empty(student_logits, {rows, int64_t(kNumStats)}, ScalarType::Float);
  if (rows == 0) return {loss, stats};

  dispatch(loss_options.divergence(), student_logits, teacher_logits, [&](auto constant, auto s, auto t) {
    launch_forward<constant(), decltype(s), decltype(t)>(scope, logits, device_options, floats(loss),
                                                         floats(stats));
  });
  scope.check("kl_loss_forward");
  return {loss, stats};
}

std::tuple<Tensor, Tensor, Tensor> kl_loss_forward_metrics_cuda(
    const Tensor& student_logits, const Tensor& teacher_logits, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& labels, int64_t vocab_size, const std::vector<double>& options) {
  const LogitTensors logits = {student_logits, teacher_logits, std::nullopt, std::nullopt, mask};
  const int64_t rows = logits.check(vocab_size);
  const LossOptions loss_options = LossOptions::of(options);
  const LaunchScope scope(student_logits);
  const auto new_floats = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(student_logits, shape, ScalarType::Float);
  };
  Tensor loss = new_floats({rows}), stats = new_floats({rows, int64_t(kNumStats)});
  Tensor metrics = new_floats({rows, int64_t(kNumMetrics)});
  const MetricsOut out = metrics_out(labels, metrics, student_logits, loss_options, vocab_size);
  if (rows == 0) return {loss, stats, metrics};
  launch_forward_metrics(scope, logits, loss_options.divergence(), DeviceOptions(loss_options, vocab_size),
                         floats(loss), floats(stats), out);
  scope.check("kl_loss_forward_metrics");
  return {loss, stats, metrics};
}

Tensor kl_loss_backward_cuda(const Tensor& grad_loss, const Tensor& stats, const Tensor& student_logits,
                             const Tensor& teacher_logits, const std::optional<Tensor>& mask,
                             int64_t vocab_size, const std::vector<double>& options,
                             const std::optional<Tensor>& labels, const std::optional<Tensor>& metrics,
                             const std::optional<Tensor>& ce_weight) {
  const LogitTensors logits = {student_logits, teacher_logits, std::nullopt, std::nullopt, mask};
  const int64_t rows = logits.check(vocab_size);
  const LossOptions loss_options = LossOptions::of(options);
  const DeviceOptions device_options(loss_options, vocab_size);
  check_weight("grad_loss", grad_loss, student_logits);
  check_stats(stats, student_logits);
  const LaunchScope scope(student_logits);
  Tensor grad = torch::stable::new_empty(student_logits, {rows, student_logits.size(1)});
  if (ce_weight) {
    const MetricsIn in = metrics_in(labels, metrics, ce_weight, student_logits, loss_options, 0, vocab_size);
    if (rows == 0) return grad;
    launch_backward_metrics(scope, logits, loss_options.divergence(), device_options, grad_loss,
                            const_floats(stats), grad, in);
    scope.check("kl_loss_backward");
    return grad;
  }
  if (rows == 0) return grad;

  dispatch(loss_options.divergence(), student_logits, teacher_logits, [&](auto constant, auto s, auto t) {
    using S = decltype(s);
    launch_backward<constant(), S, decltype(t), S>(scope, logits, device_options, grad_loss,
                                                   const_floats(stats), grad);
  });
  scope.check("kl_loss_backward");
  return grad;
}

}  // namespace
}  // namespace minitron::cuda

STABLE_TORCH_LIBRARY_IMPL(MINITRON_CUDA_LIBRARY, MINITRON_CUDA_KEY, m) {
  m.impl("kl_loss_forward", TORCH_BOX(&minitron::cuda::kl_loss_forward_cuda));
  m.impl("kl_loss_forward_metrics", TORCH_BOX(&minitron::cuda::kl_loss_forward_metrics_cuda));
  m.impl("kl_loss_backward", TORCH_BOX(&minitron::cuda::kl_loss_backward_cuda));
}
