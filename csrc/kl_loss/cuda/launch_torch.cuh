// What the launchers of kl_loss and linear_kl_loss share: checks of their tensors, the arguments of the
// kernels, and the numbers of threads and blocks.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>

#include "common/cuda/launch_torch.cuh"
#include "kl_loss/cuda/row_kernels.cuh"

namespace minitron::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_logits(const char* name, const Tensor& logits, const Tensor& student) {
  STD_TORCH_CHECK(logits.dim() == 2, name, " must be [N, V], got ", logits.dim(), " dimensions");
  STD_TORCH_CHECK(logits.size(1) <= 1 || logits.stride(1) == 1, name,
                  " must have stride 1 in its last dimension");
  STD_TORCH_CHECK(logits.size(1) <= std::numeric_limits<int>::max(), name, " has more than 2^31 - 1 columns");
  STD_TORCH_CHECK(logits.size(0) <= std::numeric_limits<int>::max(), name, " has more than 2^31 - 1 rows");
  STD_TORCH_CHECK(logits.size(0) == student.size(0), name, " has ", logits.size(0), " rows, student_logits ",
                  student.size(0));
  STD_TORCH_CHECK(logits.device() == student.device(), name, " and student_logits are on different devices");
}

// A float32 vector or matrix of the kernels, stride 1 in its last dimension.
inline void check_floats(const char* name, const Tensor& x, std::initializer_list<int64_t> shape,
                         const Tensor& student) {
  bool fits = x.dim() == static_cast<int64_t>(shape.size()) && x.scalar_type() == ScalarType::Float &&
              x.device() == student.device();
  int64_t dim = 0;
  for (const int64_t size : shape) fits = fits && x.size(dim++) == size;
  STD_TORCH_CHECK(
      fits && (x.size(dim - 1) <= 1 || x.stride(dim - 1) == 1), name,
      " must be float32 on the device of student_logits, of the expected shape and with stride 1 in "
      "its last dimension");
}

inline void check_stats(const Tensor& stats, const Tensor& student) {
  STD_TORCH_CHECK(stats.dim() == 2 && stats.size(0) == student.size(0) && stats.size(1) == kNumStats &&
                      stats.scalar_type() == ScalarType::Float && stats.is_contiguous() &&
                      stats.device() == student.device(),
                  "stats must be the contiguous float32 [N, ", kNumStats, "] that the forward wrote");
}

inline void check_mask(const std::optional<Tensor>& mask, const Tensor& student) {
  if (!mask) return;
  STD_TORCH_CHECK(mask->dim() == 1 && mask->size(0) == student.size(0) &&
                      mask->scalar_type() == ScalarType::Bool && mask->device() == student.device(),
                  "mask must be bool [N] on the device of student_logits");
}

// A factor of each row.
inline void check_weight(const char* name, const Tensor& weight, const Tensor& student) {
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == student.size(0) &&
                      weight.scalar_type() == ScalarType::Float && weight.device() == student.device(),
                  name, " must be float32 [N] on the device of student_logits");
}

inline const bool* mask_pointer(const std::optional<Tensor>& mask) {
  return mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
}

// The tensors that every kernel on logits reads.
struct LogitTensors {
  const Tensor &student, &teacher;
  const std::optional<Tensor>&student_bias, &teacher_bias, &mask;

  // Returns the number of rows.
  int64_t check(int64_t vocab_size) const {
    for (const auto& [name, logits] :
         {std::pair{"student_logits", &student}, std::pair{"teacher_logits", &teacher}}) {
      check_logits(name, *logits, student);
      STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= logits->size(1), "vocab_size ", vocab_size,
                      " is not in [1, ", logits->size(1), "], the columns of ", name);
    }
    for (const auto& [name, bias] :
         {std::pair{"student_bias", &student_bias}, std::pair{"teacher_bias", &teacher_bias}}) {
      if (*bias) check_floats(name, **bias, {vocab_size}, student);
    }
    check_mask(mask, student);
    return student.size(0);
  }

  template <typename S, typename T>
  KlRows<S, T> rows() const {
    return {{static_cast<const S*>(student.const_data_ptr()), bias_pointer(student_bias), student.stride(0)},
            {static_cast<const T*>(teacher.const_data_ptr()), bias_pointer(teacher_bias), teacher.stride(0)},
            mask_pointer(mask),
            mask ? mask->stride(0) : 0};
  }

 private:
  static const float* bias_pointer(const std::optional<Tensor>& bias) {
    return bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  }
};

inline float* floats(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }
inline const float* const_floats(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }

// A thread for each piece of work, at most `most`: a power of two, so that there are few distinct launches.
inline int threads_for(int64_t pieces, int most) {
  int threads = kWarpSize;
  while (threads < most && threads < pieces) threads *= 2;
  return threads;
}
inline int state_threads(int64_t vocab_size) { return threads_for(vocab_size / kPairsAtOnce, kStateThreads); }

// Blocks that share a row of the backward, where the rows alone would not fill the device.
inline int parts_for(int64_t rows, int64_t runs, int threads) {
  constexpr int64_t kEnoughBlocks = 2048;
  constexpr int64_t kRunsPerThread = 4;  // at least
  const int64_t most = std::max<int64_t>(1, runs / (threads * kRunsPerThread));
  return static_cast<int>(std::clamp<int64_t>(kEnoughBlocks / rows, 1, most));
}

// Calls f(divergence, student element, teacher element), all of them compile-time constants.
template <typename F>
void dispatch(Divergence divergence, const Tensor& student, const Tensor& teacher, F&& f) {
  dispatch_float(student.scalar_type(), "student_logits", [&](auto s) {
    dispatch_float(teacher.scalar_type(), "teacher_logits",
                   [&](auto t) { with_divergence(divergence, [&](auto constant) { f(constant, s, t); }); });
  });
}

// of_metrics: what the kernel takes of that name, or nothing.
template <Divergence kDivergence, typename S, typename T, typename... Metrics>
void launch_forward(const LaunchScope& scope, const LogitTensors& logits, const DeviceOptions& options,
                    float* loss, float* stats, const Metrics&... of_metrics) {
  const auto kernel = &kl_forward_kernel<kDivergence, S, T, Metrics...>;
  MINITRON_LAUNCH(kernel, dim3(logits.student.size(0)), dim3(state_threads(options.vocab_size)),
                  scope.stream(), logits.rows<S, T>(), options, loss, stats, of_metrics...);
}

template <Divergence kDivergence, typename S, typename T, typename G, typename... Metrics>
void launch_backward(const LaunchScope& scope, const LogitTensors& logits, const DeviceOptions& options,
                     const Tensor& weight, const float* stats, Tensor& grad, const Metrics&... of_metrics) {
  const auto kernel = &kl_backward_kernel<kDivergence, S, T, G, Metrics...>;
  const int64_t rows = grad.size(0), runs = options.vocab_size / kRunOf<S, T, G>;
  const int threads = threads_for(runs / kGradRuns<S, T, G>, kGradThreads);
  MINITRON_LAUNCH(kernel, dim3(rows, parts_for(rows, runs, threads)), dim3(threads), scope.stream(),
                  logits.rows<S, T>(), options, const_floats(weight), weight.stride(0), stats,
                  static_cast<G*>(grad.mutable_data_ptr()), grad.stride(0), static_cast<int>(grad.size(1)),
                  of_metrics...);
}

}  // namespace minitron::cuda
