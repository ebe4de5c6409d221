// Launchers of the epilogues of linear_kl_loss on fp32 logits. They write into the caller's tensors, allocate
// nothing, and do not wait for the GPU.
#include <optional>

#include "kl_loss/cuda/cluster_kernels.cuh"
#include "kl_loss/cuda/launch_torch.cuh"
#include "kl_loss/cuda/tile_kernels.cuh"

namespace minitron::cuda {
namespace {

using MaybeTensor = std::optional<Tensor>;

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
  if (rows == 0) return;
  const LaunchScope scope(student_logits);
  const LossOptions loss_options = LossOptions::of(options);
  const DeviceOptions device_options(loss_options, vocab_size);
  with_divergence(loss_options.divergence(), [&](auto constant) {
    launch_forward<constant(), float, float>(scope, logits, device_options, floats(loss), floats(stats));
  });
  scope.check("kl_tile_forward_");
}

void check_grad(const Tensor& weight, const Tensor& grad, int64_t vocab_size, const Tensor& student) {
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == student.size(0) &&
                      weight.scalar_type() == ScalarType::Float && weight.device() == student.device(),
                  "weight must be float32 [N] on the device of student_logits");
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
  if (rows == 0) return;
  const LaunchScope scope(student_logits);
  const LossOptions loss_options = LossOptions::of(options);
  const DeviceOptions device_options(loss_options, vocab_size);
  dispatch_float(grad.scalar_type(), "grad", [&](auto g) {
    with_divergence(loss_options.divergence(), [&](auto constant) {
      launch_backward<constant(), float, float, decltype(g)>(scope, logits, device_options, weight,
                                                             const_floats(stats), grad);
    });
  });
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

// False if the device has no clusters, or this build no code for it that uses them.
template <Divergence kDivergence, typename G>
bool launch_clusters(const LaunchScope& scope, const LogitTensors& logits, const DeviceOptions& options,
                     const Tensor& weight, float* loss, float* stats, Tensor& grad) {
  const auto kernel = &kl_forward_grad_kernel<kDivergence, G>;
  const int threads =
      threads_for(options.vocab_size / (kClusterBlocks * kClusterPairsAtOnce), kClusterThreads);
  const ClusterLaunch launch(grad.size(0), kClusterBlocks, threads, scope.stream());
  if (!launch.fits(kernel)) return false;
  launch(kernel, logits.rows<float, float>(), options, const_floats(weight), weight.stride(0), loss, stats,
         static_cast<G*>(grad.mutable_data_ptr()), grad.stride(0), static_cast<int>(grad.size(1)));
  return true;
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
  if (rows == 0) return;
  const LaunchScope scope(student_logits);
  const LossOptions loss_options = LossOptions::of(options);
  const DeviceOptions device_options(loss_options, vocab_size);
  const bool suits = suit_clusters(logits, grad, vocab_size);
  dispatch_float(grad.scalar_type(), "grad", [&](auto g) {
    with_divergence(loss_options.divergence(), [&](auto constant) {
      using G = decltype(g);
      if (!suits || !launch_clusters<constant(), G>(scope, logits, device_options, weight, floats(loss),
                                                    floats(stats), grad)) {
        launch_forward<constant(), float, float>(scope, logits, device_options, floats(loss), floats(stats));
        scope.check("kl_tile_forward_grad_");
        launch_backward<constant(), float, float, G>(scope, logits, device_options, weight,
                                                     const_floats(stats), grad);
      }
      scope.check("kl_tile_forward_grad_");
    });
  });
}

void kl_tile_stats(const Tensor& student_logits, const Tensor& teacher_logits,
                   const MaybeTensor& student_bias, const MaybeTensor& teacher_bias, const MaybeTensor& mask,
                   Tensor state, bool first, const std::vector<double>& options, const MaybeTensor& labels,
                   MaybeTensor metric_state, int64_t first_token) {
  const LogitTensors logits = {student_logits, teacher_logits, student_bias, teacher_bias, mask};
  const int64_t columns = student_logits.size(1), rows = check_tile(logits, columns);
  check_floats("state", state, {RowState<Divergence::kForwardKL>::kFields, rows}, student_logits);
  if (rows == 0) return;
  const LaunchScope scope(student_logits);
  const LossOptions loss_options = LossOptions::of(options);
  const DeviceOptions device_options(loss_options, columns);
  with_divergence(loss_options.divergence(), [&](auto constant) {
    const auto kernel = &kl_tile_stats_kernel<constant()>;
    MINITRON_LAUNCH(kernel, dim3(rows), dim3(state_threads(columns)), scope.stream(),
                    (logits.rows<float, float>()), device_options, floats(state), state.stride(0), first);
  });
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
FinishRows check_finish(const char* name, const Tensor& parts, int64_t fields, const MaybeTensor& mask,
                        const Tensor& loss, const Tensor& stats) {
  STD_TORCH_CHECK(parts.dim() == 3 && parts.size(1) == fields && parts.size(2) == loss.size(0) &&
                      parts.scalar_type() == ScalarType::Float && parts.is_contiguous(),
                  name, " must be contiguous float32 [splits, ", fields, ", N]");
  check_floats("loss", loss, {parts.size(2)}, parts);
  check_stats(stats, loss);
  check_mask(mask, loss);
  return {mask_pointer(mask), mask ? mask->stride(0) : 0, parts.size(2), static_cast<int>(parts.size(0))};
}

dim3 finish_grid(int64_t rows) { return dim3((rows + kFinishThreads - 1) / kFinishThreads); }

void kl_finish_stats(const Tensor& states, const MaybeTensor& mask, Tensor loss, Tensor stats,
                     const std::vector<double>& options, const MaybeTensor& labels,
                     const MaybeTensor& metric_states, MaybeTensor metrics, int64_t total_vocab) {
  const FinishRows rows =
      check_finish("states", states, RowState<Divergence::kForwardKL>::kFields, mask, loss, stats);
  if (rows.rows == 0) return;
  const LaunchScope scope(states);
  with_divergence(LossOptions::of(options).divergence(), [&](auto constant) {
    const auto kernel = &kl_finish_stats_kernel<constant()>;
    MINITRON_LAUNCH(kernel, finish_grid(rows.rows), dim3(kFinishThreads), scope.stream(), rows,
                    const_floats(states), floats(loss), floats(stats));
  });
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
