// Launchers of the row kernels. No host sync, no allocation but the outputs.
#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "common/cuda_torch.cuh"
#include "kl_loss/kl_loss_cuda.cuh"

namespace minitron::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Shape {
  int64_t rows;
  int vocab_size;
};

Shape check_rows(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                 int64_t vocab_size) {
  for (const auto& [name, logits] :
       {std::pair{"student_logits", &student}, std::pair{"teacher_logits", &teacher}}) {
    STD_TORCH_CHECK(logits->dim() == 2, name, " must be [N, V], got ", logits->dim(), " dimensions");
    STD_TORCH_CHECK(logits->size(1) <= 1 || logits->stride(1) == 1, name,
                    " must have stride 1 in its last dimension");
    STD_TORCH_CHECK(logits->size(1) <= std::numeric_limits<int>::max(), name,
                    " has more than 2^31 - 1 columns");
    STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= logits->size(1), "vocab_size ", vocab_size,
                    " is not in [1, ", logits->size(1), "], the columns of ", name);
  }
  STD_TORCH_CHECK(teacher.size(0) == student.size(0), "teacher_logits has ", teacher.size(0),
                  " rows, student_logits ", student.size(0));
  STD_TORCH_CHECK(teacher.device() == student.device(),
                  "teacher_logits and student_logits are on different devices");
  STD_TORCH_CHECK(student.size(0) <= std::numeric_limits<int>::max(), "more than 2^31 - 1 rows");
  if (mask) {
    STD_TORCH_CHECK(mask->dim() == 1 && mask->size(0) == student.size(0) &&
                        mask->scalar_type() == ScalarType::Bool && mask->device() == student.device(),
                    "mask must be bool [N] on the device of student_logits");
  }
  return {student.size(0), static_cast<int>(vocab_size)};
}

template <typename S, typename T>
KlRows<S, T> rows_of(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask) {
  return {static_cast<const S*>(student.const_data_ptr()),
          static_cast<const T*>(teacher.const_data_ptr()),
          mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr,
          student.stride(0),
          teacher.stride(0),
          mask ? mask->stride(0) : 0};
}

// One run a thread, up to kMaxThreads; a power of two, so that there are few distinct launches.
int threads_for(int runs) {
  int threads = kWarpSize;
  while (threads < kMaxThreads && threads < runs) threads *= 2;
  return threads;
}

// Blocks that share a row of the backward, for when the rows alone do not fill the device.
int parts_for(int64_t rows, int runs, int threads) {
  constexpr int64_t kEnoughBlocks = 2048;
  constexpr int64_t kRunsPerThread = 4;  // at least
  const int64_t most = std::max<int64_t>(1, runs / (threads * kRunsPerThread));
  return static_cast<int>(std::clamp<int64_t>(kEnoughBlocks / rows, 1, most));
}

// Calls f(kind, student element, teacher element), each a compile-time choice.
template <typename F>
void dispatch(float beta, const Tensor& student, const Tensor& teacher, F&& f) {
  const auto with_kind = [&](auto s, auto t) {
    if (beta <= 0.0f) return f(std::integral_constant<KlKind, KlKind::kForward>{}, s, t);
    if (beta >= 1.0f) return f(std::integral_constant<KlKind, KlKind::kReverse>{}, s, t);
    return f(std::integral_constant<KlKind, KlKind::kJsd>{}, s, t);
  };
  dispatch_float(student.scalar_type(), "student_logits", [&](auto s) {
    dispatch_float(teacher.scalar_type(), "teacher_logits", [&](auto t) { with_kind(s, t); });
  });
}

std::tuple<Tensor, Tensor> kl_loss_forward_cuda(const Tensor& student_logits, const Tensor& teacher_logits,
                                                const std::optional<Tensor>& mask, int64_t vocab_size,
                                                double beta, double inv_tau, double student_scale,
                                                double student_softcap, double teacher_scale,
                                                double teacher_softcap) {
  const Shape shape = check_rows(student_logits, teacher_logits, mask, vocab_size);
  const LaunchScope scope(student_logits);
  Tensor loss = torch::stable::new_empty(student_logits, {shape.rows}, ScalarType::Float);
  Tensor stats = torch::stable::new_empty(student_logits, {shape.rows, RowStats::kFields}, ScalarType::Float);
  if (shape.rows == 0) return {loss, stats};

  const KlOptions options = {shape.vocab_size, static_cast<float>(beta),
                             LogitTransform(student_scale, student_softcap, inv_tau),
                             LogitTransform(teacher_scale, teacher_softcap, inv_tau)};
  dispatch(options.beta, student_logits, teacher_logits, [&](auto kind, auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    const auto kernel = &kl_forward_kernel<decltype(kind)::value, S, T>;
    MINITRON_LAUNCH(kernel, dim3(shape.rows), dim3(threads_for(shape.vocab_size / kPairRun<S, T>)),
                    scope.stream(), rows_of<S, T>(student_logits, teacher_logits, mask), options,
                    static_cast<float*>(loss.mutable_data_ptr()),
                    static_cast<float*>(stats.mutable_data_ptr()));
  });
  scope.check("kl_loss_forward");
  return {loss, stats};
}

Tensor kl_loss_backward_cuda(const Tensor& grad_loss, const Tensor& stats, const Tensor& student_logits,
                             const Tensor& teacher_logits, const std::optional<Tensor>& mask,
                             int64_t vocab_size, double beta, double inv_tau, double student_scale,
                             double student_softcap, double teacher_scale, double teacher_softcap) {
  const Shape shape = check_rows(student_logits, teacher_logits, mask, vocab_size);
  STD_TORCH_CHECK(grad_loss.dim() == 1 && grad_loss.size(0) == shape.rows &&
                      grad_loss.scalar_type() == ScalarType::Float &&
                      grad_loss.device() == student_logits.device(),
                  "grad_loss must be float32 [N] on the device of student_logits");
  STD_TORCH_CHECK(stats.dim() == 2 && stats.size(0) == shape.rows && stats.size(1) == RowStats::kFields &&
                      stats.scalar_type() == ScalarType::Float && stats.is_contiguous() &&
                      stats.device() == student_logits.device(),
                  "stats must be the contiguous float32 [N, 6] that kl_loss_forward returned");
  const LaunchScope scope(student_logits);
  const int64_t columns = student_logits.size(1);
  Tensor grad = torch::stable::new_empty(student_logits, {shape.rows, columns});
  if (shape.rows == 0) return grad;

  const KlOptions options = {shape.vocab_size, static_cast<float>(beta),
                             LogitTransform(student_scale, student_softcap, inv_tau),
                             LogitTransform(teacher_scale, teacher_softcap, inv_tau)};
  dispatch(options.beta, student_logits, teacher_logits, [&](auto kind, auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    const auto kernel = &kl_backward_kernel<decltype(kind)::value, S, T>;
    const int runs = shape.vocab_size / kPairRun<S, T>;
    const int threads = threads_for(runs);
    MINITRON_LAUNCH(kernel, dim3(shape.rows, parts_for(shape.rows, runs, threads)), dim3(threads),
                    scope.stream(), rows_of<S, T>(student_logits, teacher_logits, mask), options,
                    static_cast<const float*>(grad_loss.const_data_ptr()), grad_loss.stride(0),
                    static_cast<const float*>(stats.const_data_ptr()),
                    static_cast<S*>(grad.mutable_data_ptr()), static_cast<int>(columns));
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
