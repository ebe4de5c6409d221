// Checks of the tensors that have to do with labels and metrics, and what launches the kernels with metrics:
// declared here, compiled in *_metrics.cu beside the files of the kernels without.
#pragma once

#include <optional>

#include "kl_loss/cuda/launch_torch.cuh"
#include "kl_loss/cuda/metrics.cuh"

namespace minitron::cuda {

using MaybeTensor = std::optional<Tensor>;

// like: a tensor of rows, for their number and device.
inline Labels check_labels(const MaybeTensor& labels, const Tensor& like, int64_t rows,
                           int64_t first_token = 0) {
  if (!labels) return {nullptr, 0, first_token};
  STD_TORCH_CHECK(labels->dim() == 1 && labels->size(0) == rows &&
                      labels->scalar_type() == ScalarType::Long && labels->device() == like.device(),
                  "labels must be int64 [N] on the device of student_logits");
  return {static_cast<const int64_t*>(labels->const_data_ptr()), labels->stride(0), first_token};
}

inline void check_metrics(const Tensor& metrics, const Tensor& like, int64_t rows) {
  STD_TORCH_CHECK(metrics.dim() == 2 && metrics.size(0) == rows && metrics.size(1) == kNumMetrics &&
                      metrics.scalar_type() == ScalarType::Float && metrics.is_contiguous() &&
                      metrics.device() == like.device(),
                  "metrics must be contiguous float32 [N, ", kNumMetrics, "]");
}

inline void check_ce_weight(const MaybeTensor& ce_weight, const MaybeTensor& labels,
                            const MaybeTensor& metrics, const Tensor& student) {
  if (!ce_weight) return;
  STD_TORCH_CHECK(labels && metrics, "ce_weight needs labels and metrics");
  check_weight("ce_weight", *ce_weight, student);
}

inline MetricsOut metrics_out(const MaybeTensor& labels, Tensor& metrics, const Tensor& like,
                              const LossOptions& options, int64_t total_vocab) {
  const int64_t rows = metrics.size(0);
  return {check_labels(labels, like, rows), MetricOptions(options, total_vocab), floats(metrics)};
}

inline MetricsIn metrics_in(const MaybeTensor& labels, const MaybeTensor& metrics,
                            const MaybeTensor& ce_weight, const Tensor& student, const LossOptions& options,
                            int64_t first_token, int64_t total_vocab) {
  check_ce_weight(ce_weight, labels, metrics, student);
  check_metrics(*metrics, student, student.size(0));
  return {{check_labels(labels, student, student.size(0), first_token), MetricOptions(options, total_vocab),
           const_floats(*ce_weight), ce_weight->stride(0)},
          const_floats(*metrics)};
}

// Rows of any type of element.
void launch_forward_metrics(const LaunchScope& scope, const LogitTensors& logits, Divergence divergence,
                            const DeviceOptions& options, float* loss, float* stats,
                            const MetricsOut& of_metrics);
// grad: of the student's type, or of any where both are fp32.
void launch_backward_metrics(const LaunchScope& scope, const LogitTensors& logits, Divergence divergence,
                             const DeviceOptions& options, const Tensor& weight, const float* stats,
                             Tensor& grad, const MetricsIn& of_metrics);

}  // namespace minitron::cuda
