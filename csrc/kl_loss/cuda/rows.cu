// Launchers of the row kernels. No host sync, no allocation but the outputs.
#include <optional>
#include <tuple>

#include "kl_loss/cuda/launch_torch.cuh"

namespace minitron::cuda {
namespace {

// Calls f(kind, student element, teacher element), each a compile-time choice.
template <typename F>
void dispatch(const LossArguments& arguments, const Tensor& student, const Tensor& teacher, F&& f) {
  dispatch_float(student.scalar_type(), "student_logits", [&](auto s) {
    dispatch_float(teacher.scalar_type(), "teacher_logits",
                   [&](auto t) { arguments.with_kind([&](auto kind) { f(kind, s, t); }); });
  });
}

std::tuple<Tensor, Tensor> kl_loss_forward_cuda(const Tensor& student_logits, const Tensor& teacher_logits,
                                                const std::optional<Tensor>& mask, int64_t vocab_size,
                                                double beta, double inv_tau, double student_scale,
                                                double student_softcap, double teacher_scale,
                                                double teacher_softcap) {
  const LogitTensors logits = {student_logits, teacher_logits, std::nullopt, std::nullopt, mask};
  const int64_t rows = logits.check(vocab_size);
  const LaunchScope scope(student_logits);
  Tensor loss = torch::stable::new_empty(student_logits, {rows}, ScalarType::Float);
  Tensor stats = torch::stable::new_empty(student_logits, {rows, RowStats::kFields}, ScalarType::Float);
  if (rows == 0) return {loss, stats};

  const LossArguments arguments = {vocab_size,      beta,          inv_tau,        student_scale,
                                   student_softcap, teacher_scale, teacher_softcap};
  dispatch(arguments, student_logits, teacher_logits, [&](auto kind, auto s, auto t) {
    launch_forward<decltype(kind)::value, decltype(s), decltype(t)>(scope, logits, arguments, floats(loss),
                                                                    floats(stats));
  });
  scope.check("kl_loss_forward");
  return {loss, stats};
}

Tensor kl_loss_backward_cuda(const Tensor& grad_loss, const Tensor& stats, const Tensor& student_logits,
                             const Tensor& teacher_logits, const std::optional<Tensor>& mask,
                             int64_t vocab_size, double beta, double inv_tau, double student_scale,
                             double student_softcap, double teacher_scale, double teacher_softcap) {
  const LogitTensors logits = {student_logits, teacher_logits, std::nullopt, std::nullopt, mask};
  const int64_t rows = logits.check(vocab_size);
  STD_TORCH_CHECK(grad_loss.dim() == 1 && grad_loss.size(0) == rows &&
                      grad_loss.scalar_type() == ScalarType::Float &&
                      grad_loss.device() == student_logits.device(),
                  "grad_loss must be float32 [N] on the device of student_logits");
  check_stats(stats, student_logits);
  const LaunchScope scope(student_logits);
  Tensor grad = torch::stable::new_empty(student_logits, {rows, student_logits.size(1)});
  if (rows == 0) return grad;

  const LossArguments arguments = {vocab_size,      beta,          inv_tau,        student_scale,
                                   student_softcap, teacher_scale, teacher_softcap};
  dispatch(arguments, student_logits, teacher_logits, [&](auto kind, auto s, auto t) {
    using S = decltype(s);
    launch_backward<decltype(kind)::value, S, decltype(t), S>(scope, logits, arguments, grad_loss,
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
