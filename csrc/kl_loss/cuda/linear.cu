// Launchers of the epilogues of linear_kl_loss on fp32 logits. They write into the caller's tensors, allocate
// nothing, and do not wait for the GPU.
#include <optional>

#include "kl_loss/cuda/linear_torch.cuh"
#include "kl_loss/cuda/tile_mixture.cuh"

namespace minitron::cuda {
namespace {

int64_t check_tile(const LogitTensors& logits, int64_t vocab_size) {
  for (const auto& [name, x] :
       {std::pair{"student_logits", &logits.student}, std::pair{"teacher_logits", &logits.teacher}}) {
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float, name, " must be float32 out of the GEMM, got ",
                    torch::headeronly::toString(x->scalar_type()));
  }
  return logits.check(vocab_size);
}

void kl_tile_forward(const Tensor& student_logits, const Tensor& teacher_logits,
                     const MaybeTensor& student_bias, const MaybeTensor& teacher_bias,
                     const MaybeTensor& mask, Tensor loss, Tensor stats, int64_t vocab_size,
                     const std::vector<double>& options, const MaybeTensor& labels, MaybeTensor metrics) {
  const LogitTensors logits = {student_logits, teacher_logits, student_bias, teacher_bias, mask};
  const int64_t rows = check_tile(logits, vocab_size);
  check_floats("loss", loss, {rows}, student_logits);
  check_stats(stats, student_logits);
  if (metrics) check_metrics(*metrics, student_logits, rows);
  if (rows == 0) return;
  const LaunchScope scope(student_logits);
  const LossOptions loss_options = LossOptions::of(options);
  const DeviceOptions device_options(loss_options, vocab_size);
  if (metrics) {
    const MetricsOut out = metrics_out(labels, *metrics, student_logits, loss_options, vocab_size);
    launch_forward_metrics(scope, logits, loss_options.divergence(), device_options, floats(loss),
                           floats(stats), out);
  } else {
    with_divergence(loss_options.divergence(), [&](auto constant) {
      launch_forward<constant(), float, float>(scope, logits, device_options, floats(loss), floats(stats));
    });
  }
  scope.check("kl_tile_forward_");
}

void check_grad(const Tensor& weight, const Tensor& grad, int64_t vocab_size, const Tensor& student) {
  check_weight("weight", weight, student);
  check_logits("grad", grad, student);
  STD_TORCH_CHECK(grad.size(1) >= vocab_size, "grad has ", grad.size(1), " columns, vocab_size is ",
                  vocab_size);
}

void kl_tile_grad(const Tensor& student_logits, const Tensor& teacher_logits, const MaybeTensor& student_bias,
                  const MaybeTensor& teacher_bias, const MaybeTensor& mask, const Tensor& weight,
                  const Tensor& stats, Tensor grad, int64_t vocab_size, const std::vector<double>& options,
                  const MaybeTensor& labels, const MaybeTensor& metrics, const MaybeTensor& ce_weight,
                  int64_t first_token, int64_t total_vocab) {
  const LogitTensors logits = {student_logits, teacher_logits, student_bias, teacher_bias, mask};
  const int64_t rows = check_tile(logits, vocab_size);
  check_grad(weight, grad, vocab_size, student_logits);
  check_stats(stats, student_logits);
  check_ce_weight(ce_weight, labels, metrics, student_logits);
  if (rows == 0) return;
  const LaunchScope scope(student_logits);
  const LossOptions loss_options = LossOptions::of(options);
  const DeviceOptions device_options(loss_options, vocab_size);
  if (ce_weight) {
    const MetricsIn in = metrics_in(labels, metrics, ce_weight, student_logits, loss_options, first_token,
                                    total_vocab == 0 ? vocab_size : total_vocab);
    launch_backward_metrics(scope, logits, loss_options.divergence(), device_options, weight,
                            const_floats(stats), grad, in);
  } else {
    dispatch_float(grad.scalar_type(), "grad", [&](auto g) {
      with_divergence(loss_options.divergence(), [&](auto constant) {
        launch_backward<constant(), float, float, decltype(g)>(scope, logits, device_options, weight,
                                                               const_floats(stats), grad);
      });
    });
  }
  scope.check("kl_tile_grad_");
}

bool rows_aligned(const Tensor& matrix) {
  const int64_t step = 16 / static_cast<int64_t>(matrix.element_size());
  return aligned16(matrix.const_data_ptr()) && (matrix.size(0) <= 1 || matrix.stride(0) % step == 0);
}

// Whether rows are for clusters, on a GPU that has them. Not short ones, whose few reads take no longer than
// the barriers of a cluster; there it is better that each row has one block, and many are under way. And the
// kernel knows only rows that begin at 16 bytes, as those in the buffers of linear_kl_loss do.
bool suit_clusters(const LogitTensors& logits, const Tensor& grad, int64_t vocab_size) {
  bool aligned = rows_aligned(logits.student) && rows_aligned(logits.teacher) && rows_aligned(grad);
  for (const MaybeTensor* bias : {&logits.student_bias, &logits.teacher_bias}) {
    aligned = aligned && (!*bias || aligned16((*bias)->const_data_ptr()));
  }
  return aligned && vocab_size >= kFewestClusterColumns &&
         logits.student.size(0) <= std::numeric_limits<int>::max() / kClusterBlocks;
}

void kl_tile_forward_grad(const Tensor& student_logits, const Tensor& teacher_logits,
                          const MaybeTensor& student_bias, const MaybeTensor& teacher_bias,
                          const MaybeTensor& mask, const Tensor& weight, Tensor loss, Tensor stats,
                          Tensor grad, int64_t vocab_size, const std::vector<double>& options,
                          const MaybeTensor& labels, MaybeTensor metrics, const MaybeTensor& ce_weight) {
  const LogitTensors logits = {student_logits, teacher_logits, student_bias, teacher_bias, mask};
  const int64_t rows = check_tile(logits, vocab_size);
  check_floats("loss", loss, {rows}, student_logits);
  check_grad(weight, grad, vocab_size, student_logits);
  check_stats(stats, student_logits);
  if (metrics) check_metrics(*metrics, student_logits, rows);
  check_ce_weight(ce_weight, labels, metrics, student_logits);
  if (rows == 0) return;
  const LossOptions loss_options = LossOptions::of(options);
  if (suit_clusters(logits, grad, vocab_size)) {
    const LaunchScope scope(student_logits);
    const DeviceOptions device_options(loss_options, vocab_size);
    const auto launch = [&](const auto&... of_metrics) {
      return launch_clusters(scope, logits, loss_options.divergence(), device_options, weight, floats(loss),
                             floats(stats), grad, of_metrics...);
    };
    const bool launched =
        metrics ? launch(MetricsInOut{metrics_out(labels, *metrics, student_logits, loss_options, vocab_size),
                                      ce_weight ? const_floats(*ce_weight) : nullptr,
                                      ce_weight ? ce_weight->stride(0) : 0})
                : launch();
    scope.check("kl_tile_forward_grad_");
    if (launched) return;
  }
  kl_tile_forward(student_logits, teacher_logits, student_bias, teacher_bias, mask, loss, stats, vocab_size,
                  options, labels, metrics);
  kl_tile_grad(student_logits, teacher_logits, student_bias, teacher_bias, mask, weight, stats, grad,
               vocab_size, options, labels, metrics, ce_weight, 0, 0);
}

void kl_tile_stats(const Tensor& student_logits, const Tensor& teacher_logits,
                   const MaybeTensor& student_bias, const MaybeTensor& teacher_bias, const MaybeTensor& mask,
                   Tensor state, bool first, const std::vector<double>& options, const MaybeTensor& labels,
                   MaybeTensor metric_state, int64_t first_token) {
  const LogitTensors logits = {student_logits, teacher_logits, student_bias, teacher_bias, mask};
  const int64_t columns = student_logits.size(1), rows = check_tile(logits, columns);
  check_floats("state", state, {RowState<Divergence::kForwardKL>::kFields, rows}, student_logits);
  if (metric_state)
    check_floats("metric_state", *metric_state, {int64_t(kNumMetricState), rows}, student_logits);
  const Labels row_labels = check_labels(labels, student_logits, rows, first_token);
  if (rows == 0) return;
  const LaunchScope scope(student_logits);
  const LossOptions loss_options = LossOptions::of(options);
  const DeviceOptions device_options(loss_options, columns);
  const auto launch = [&](const auto&... of_metrics) {
    launch_tile_stats(scope, logits, loss_options.divergence(), device_options, state, first, of_metrics...);
  };
  if (metric_state) {  // it does not know of how many tokens this is a tile, nor ask
    const MetricOptions metric_options(loss_options, columns);
    launch(MetricsState{row_labels, metric_options, floats(*metric_state), metric_state->stride(0)});
  } else {
    launch();
  }
  scope.check("kl_tile_stats_");
}

void kl_tile_mixture(const Tensor& student_logits, const Tensor& teacher_logits,
                     const MaybeTensor& student_bias, const MaybeTensor& teacher_bias,
                     const MaybeTensor& mask, const Tensor& stats, Tensor sums, bool first,
                     const std::vector<double>& options) {
  const LogitTensors logits = {student_logits, teacher_logits, student_bias, teacher_bias, mask};
  const int64_t columns = student_logits.size(1), rows = check_tile(logits, columns);
  check_stats(stats, student_logits);
  check_floats("sums", sums, {MixtureSums::kFields, rows}, student_logits);
  if (rows == 0) return;
  const LaunchScope scope(student_logits);
  const LossOptions loss_options = LossOptions::of(options);
  const DeviceOptions device_options(loss_options, columns);
  const auto kernel = &kl_tile_mixture_kernel;
  MINITRON_LAUNCH(kernel, dim3(rows), dim3(state_threads(columns)), scope.stream(),
                  (logits.rows<float, float>()), device_options, const_floats(stats), floats(sums),
                  sums.stride(0), first);
  scope.check("kl_tile_mixture_");
}

// parts: contiguous, (splits, fields, N).
void check_parts(const char* name, const Tensor& parts, int64_t fields, const Tensor& loss) {
  STD_TORCH_CHECK(parts.dim() == 3 && parts.size(1) == fields && parts.size(2) == loss.size(0) &&
                      parts.scalar_type() == ScalarType::Float && parts.is_contiguous(),
                  name, " must be contiguous float32 [splits, ", fields, ", N]");
}

FinishRows check_finish(const char* name, const Tensor& parts, int64_t fields, const MaybeTensor& mask,
                        const Tensor& loss, const Tensor& stats) {
  check_parts(name, parts, fields, loss);
  check_floats("loss", loss, {parts.size(2)}, parts);
  check_stats(stats, loss);
  check_mask(mask, loss);
  return {mask_pointer(mask), mask ? mask->stride(0) : 0, parts.size(2), static_cast<int>(parts.size(0))};
}

void kl_finish_stats(const Tensor& states, const MaybeTensor& mask, Tensor loss, Tensor stats,
                     const std::vector<double>& options, const MaybeTensor& labels,
                     const MaybeTensor& metric_states, MaybeTensor metrics, int64_t total_vocab) {
  const FinishRows rows =
      check_finish("states", states, RowState<Divergence::kForwardKL>::kFields, mask, loss, stats);
  if (metrics) {
    check_metrics(*metrics, states, rows.rows);
    STD_TORCH_CHECK(metric_states && total_vocab >= 1, "metrics need metric_states and total_vocab");
    check_parts("metric_states", *metric_states, kNumMetricState, loss);
    STD_TORCH_CHECK(metric_states->size(0) == states.size(0), "metric_states has ", metric_states->size(0),
                    " splits, states ", states.size(0));
  }
  if (rows.rows == 0) return;
  const LaunchScope scope(states);
  const LossOptions loss_options = LossOptions::of(options);
  const auto launch = [&](const auto&... of_metrics) {
    launch_finish_stats(scope, rows, loss_options.divergence(), const_floats(states), floats(loss),
                        floats(stats), of_metrics...);
  };
  if (metrics) {
    const MetricsOut out = metrics_out(labels, *metrics, states, loss_options, total_vocab);
    launch(MetricsFinish{out, const_floats(*metric_states)});
  } else {
    launch();
  }
  scope.check("kl_finish_stats_");
}

void kl_finish_mixture(const Tensor& sums, const MaybeTensor& mask, Tensor loss, Tensor stats,
                       const std::vector<double>& options) {
  const FinishRows rows = check_finish("sums", sums, MixtureSums::kFields, mask, loss, stats);
  if (rows.rows == 0) return;
  const LaunchScope scope(sums);
  const auto kernel = &kl_finish_mixture_kernel;
  MINITRON_LAUNCH(kernel, finish_grid(rows.rows), dim3(kFinishThreads), scope.stream(), rows,
                  const_floats(sums), Shares(LossOptions::of(options).beta), floats(loss), floats(stats));
  scope.check("kl_finish_mixture_");
}

}  // namespace
}  // namespace minitron::cuda

STABLE_TORCH_LIBRARY_IMPL(MINITRON_CUDA_LIBRARY, MINITRON_CUDA_KEY, m) {
  m.impl("kl_tile_forward_", TORCH_BOX(&minitron::cuda::kl_tile_forward));
  m.impl("kl_tile_grad_", TORCH_BOX(&minitron::cuda::kl_tile_grad));
  m.impl("kl_tile_forward_grad_", TORCH_BOX(&minitron::cuda::kl_tile_forward_grad));
  m.impl("kl_tile_stats_", TORCH_BOX(&minitron::cuda::kl_tile_stats));
  m.impl("kl_tile_mixture_", TORCH_BOX(&minitron::cuda::kl_tile_mixture));
  m.impl("kl_finish_stats_", TORCH_BOX(&minitron::cuda::kl_finish_stats));
  m.impl("kl_finish_mixture_", TORCH_BOX(&minitron::cuda::kl_finish_mixture));
}
