// Launchers of the row kernels. They do not wait for the GPU, and allocate only the outputs.
#include <optional>
#include <tuple>

#include "kl_loss/cuda/launch_torch.cuh"

namespace minitron::cuda {
namespace {

// Calls f(divergence, student element, teacher element), all of them compile-time constants.
template <typename F>
void dispatch(Divergence divergence, const Tensor& student, const Tensor& teacher, F&& f) {
  dispatch_float(student.scalar_type(), "student_logits", [&](auto s) {
    dispatch_float(teacher.scalar_type(), "teacher_logits",
                   [&](auto t) { with_divergence(divergence, [&](auto constant) { f(constant, s, t); }); });
  });
}

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

Tensor kl_loss_backward_cuda(const Tensor& grad_loss, const Tensor& stats, const Tensor& student_logits,
                             const Tensor& teacher_logits, const std::optional<Tensor>& mask,
                             int64_t vocab_size, const std::vector<double>& options,
                             const std::optional<Tensor>& labels, const std::optional<Tensor>& metrics,
                             const std::optional<Tensor>& ce_weight) {
  const LogitTensors logits = {student_logits, teacher_logits, std::nullopt, std::nullopt, mask};
  const int64_t rows = logits.check(vocab_size);
  const LossOptions loss_options = LossOptions::of(options);
  const DeviceOptions device_options(loss_options, vocab_size);
  STD_TORCH_CHECK(grad_loss.dim() == 1 && grad_loss.size(0) == rows &&
                      grad_loss.scalar_type() == ScalarType::Float &&
                      grad_loss.device() == student_logits.device(),
                  "grad_loss must be float32 [N] on the device of student_logits");
  check_stats(stats, student_logits);
  const LaunchScope scope(student_logits);
  Tensor grad = torch::stable::new_empty(student_logits, {rows, student_logits.size(1)});
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
  m.impl("kl_loss_backward", TORCH_BOX(&minitron::cuda::kl_loss_backward_cuda));
}
