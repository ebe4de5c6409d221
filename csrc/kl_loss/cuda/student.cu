// Launchers of the kernels on the student's logits alone. They write into the caller's tensors, allocate
// nothing, and do not wait for the GPU.
#include <optional>

#include "kl_loss/cuda/metrics_torch.cuh"
#include "kl_loss/cuda/student_kernels.cuh"

namespace minitron::cuda {
namespace {

StudentRows check_student(const Tensor& student_logits, const MaybeTensor& student_bias,
                          const MaybeTensor& mask, int64_t vocab_size) {
  STD_TORCH_CHECK(student_logits.scalar_type() == ScalarType::Float,
                  "student_logits must be float32 out of the GEMM, got ",
                  torch::headeronly::toString(student_logits.scalar_type()));
  check_logits("student_logits", student_logits, student_logits);
  STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= student_logits.size(1), "vocab_size ", vocab_size,
                  " is not in [1, ", student_logits.size(1), "], the columns of student_logits");
  if (student_bias) check_floats("student_bias", *student_bias, {vocab_size}, student_logits);
  check_mask(mask, student_logits);
  return {{const_floats(student_logits), student_bias ? const_floats(*student_bias) : nullptr,
           student_logits.stride(0)},
          mask_pointer(mask),
          mask ? mask->stride(0) : 0};
}

void kl_student_stats(const Tensor& student_logits, const MaybeTensor& student_bias, const MaybeTensor& mask,
                      Tensor state, bool first, const std::vector<double>& options, const MaybeTensor& labels,
                      MaybeTensor metric_state, int64_t first_token) {
  const int64_t rows = student_logits.size(0), columns = student_logits.size(1);
  const StudentRows student = check_student(student_logits, student_bias, mask, columns);
  check_floats("state", state, {StudentState::kFields, rows}, student_logits);
  const Labels row_labels = check_labels(labels, student_logits, rows, first_token);
  if (metric_state) {
    check_floats("metric_state", *metric_state, {int64_t(kNumMetricState), rows}, student_logits);
  }
  if (rows == 0) return;
  const LaunchScope scope(student_logits);
  const LossOptions loss_options = LossOptions::of(options);
  const DeviceOptions device_options(loss_options, columns);
  const auto launch = [&]<typename... Metrics>(const Metrics&... of_metrics) {
    const auto kernel = &kl_student_stats_kernel<Metrics...>;
    const int threads = threads_for(columns / kStudentLogitsAtOnce, kStateThreads);
    MINITRON_LAUNCH(kernel, dim3(rows), dim3(threads), scope.stream(), student, device_options, floats(state),
                    state.stride(0), first, of_metrics...);
  };
  if (metric_state) {
    const MetricOptions metric_options(loss_options, columns);
    launch(MetricsState{row_labels, metric_options, floats(*metric_state), metric_state->stride(0)});
  } else {
    launch();
  }
  scope.check("kl_student_stats_");
}

void kl_student_grad(const Tensor& student_logits, const MaybeTensor& student_bias, const MaybeTensor& mask,
                     const Tensor& weight, const Tensor& lse, Tensor grad, int64_t vocab_size,
                     const std::vector<double>& options, const MaybeTensor& labels, const MaybeTensor& lse_y,
                     const MaybeTensor& ce_weight, int64_t first_token, int64_t total_vocab) {
  const int64_t rows = student_logits.size(0);
  const StudentRows student = check_student(student_logits, student_bias, mask, vocab_size);
  check_weight("weight", weight, student_logits);
  check_weight("lse", lse, student_logits);
  check_logits("grad", grad, student_logits);
  STD_TORCH_CHECK(grad.size(1) >= vocab_size, "grad has ", grad.size(1), " columns, vocab_size is ",
                  vocab_size);
  const Labels row_labels = check_labels(labels, student_logits, rows, first_token);
  if (ce_weight) {
    STD_TORCH_CHECK(labels && lse_y, "ce_weight needs labels and lse_y");
    check_weight("ce_weight", *ce_weight, student_logits);
    check_weight("lse_y", *lse_y, student_logits);
  }
  if (rows == 0) return;
  const LaunchScope scope(student_logits);
  const LossOptions loss_options = LossOptions::of(options);
  const DeviceOptions device_options(loss_options, vocab_size);
  dispatch_float(grad.scalar_type(), "grad", [&](auto g) {
    using G = decltype(g);
    constexpr int kRun = kRunOf<float, G>;
    const int64_t runs = vocab_size / kRun;
    const int threads = threads_for(runs / (kStudentLogitsAtOnce / kRun), kGradThreads);
    const auto launch = [&]<typename... Metrics>(const Metrics&... of_metrics) {
      const auto kernel = &kl_student_grad_kernel<G, Metrics...>;
      MINITRON_LAUNCH(kernel, dim3(rows, parts_for(rows, runs, threads)), dim3(threads), scope.stream(),
                      student, device_options, const_floats(weight), weight.stride(0), const_floats(lse),
                      lse.stride(0), static_cast<G*>(grad.mutable_data_ptr()), grad.stride(0),
                      static_cast<int>(grad.size(1)), of_metrics...);
    };
    if (ce_weight) {
      const MetricOptions metric_options(loss_options, total_vocab == 0 ? vocab_size : total_vocab);
      launch(StudentCrossEntropy{{row_labels, metric_options, const_floats(*ce_weight), ce_weight->stride(0)},
                                 const_floats(*lse_y),
                                 lse_y->stride(0),
                                 static_cast<float>(loss_options.inv_tau)});
    } else {
      launch();
    }
  });
  scope.check("kl_student_grad_");
}

}  // namespace
}  // namespace minitron::cuda

STABLE_TORCH_LIBRARY_IMPL(MINITRON_CUDA_LIBRARY, MINITRON_CUDA_KEY, m) {
  m.impl("kl_student_stats_", TORCH_BOX(&minitron::cuda::kl_student_stats));
  m.impl("kl_student_grad_", TORCH_BOX(&minitron::cuda::kl_student_grad));
}
