// The student's side alone, of rows of fp32 logits: for a teacher that is known by few tokens, whose logits
// the caller has taken out (-inf stands in their place). A row may have nothing left: its maximum is -inf,
// its sum 0, its gradient 0.
//
//   student_stats  grid (N), one block a row: merges a tile into the state (2, N) of its rows, max and sum.
//   student_grad   grid (N, parts of a row): the gradient of sum(weight * lse + ce_weight * cross-entropy).
//
// Each logit is read once, each gradient written once, padding included.
#pragma once

#include "kl_loss/cuda/row_kernels.cuh"

namespace minitron::cuda {

constexpr int kStudentBlocksPerSM = 4;      // of kStateThreads: at most 64 registers a thread
constexpr int kStudentLogitsAtOnce = 16;    // 64 bytes of loads under way a thread
constexpr int kStudentGradBlocksPerSM = 2;  // of kGradThreads

struct StudentState {
  OnlineSum student;

  static constexpr int kFields = 2;  // as stored: max_s, sum_s

  static __device__ __forceinline__ StudentState empty() { return {OnlineSum::empty()}; }
  __device__ __forceinline__ StudentState merged(const StudentState& other) const {
    return {student.merged(other.student)};
  }
};

// A state and a run. What is masked out adds nothing to the metrics' total: here it may be a token that the
// caller has taken out.
template <int N>
__device__ __forceinline__ StudentState with_run(StudentState state, const float (&s)[N]) {
  state.student.add(s);
  return state;
}
template <int N>
__device__ __forceinline__ WithMetrics<StudentState> with_run(const WithMetrics<StudentState>& state,
                                                              const float (&s)[N], float tau) {
  float exps[N];
  const StudentState run = {OnlineSum::of(s, exps)};
  const auto is_token = [&](int i) { return !masked_out(s[i]); };
  return state.merged({run, MetricSums::of(s, exps, run.student.max, tau, is_token)}, tau);
}

// The runs of a row, as those of a PairRow.
template <int kRun>
struct StudentRow {
  const LogitRows<float> student;
  const DeviceOptions& options;
  const RowSplit<kRun, float> split;
  const bool bias_aligned;

  __device__ __forceinline__ StudentRow(const LogitRows<float>& rows, int64_t row,
                                        const DeviceOptions& options)
      : student(rows.at(row)),
        options(options),
        split(student.logits, options.vocab_size),
        bias_aligned(aligned16(student.bias + split.head)) {}

  // Calls visit(column, s) with arrays of transformed logits, of kRuns runs loaded at a time, or of one.
  template <int kRuns, typename Visit>
  __device__ __forceinline__ void for_each(int begin, int step, Visit visit) const {
    for (int first = begin; first < split.runs; first += kRuns * step) {
      Run<float, kRun> loaded[kRuns];
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {  // the last run may be read several times
        loaded[i] = Run<float, kRun>::load(student.logits + split.run_start(run_at(first, i, step)), true);
      }
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        if (first + i * step >= split.runs) continue;
        const int column = split.run_start(first + i * step);
        float s[kRun];
        loaded[i].unpack(s);
        student.finish(column, bias_aligned, options.student, s);
        visit(column, s);
      }
    }
    for_each_rest(begin, step, visit);
  }

  // Calls visit(s) with kRuns runs at a time; -inf stands for what is beyond the last.
  template <int kRuns, typename Visit>
  __device__ __forceinline__ void for_each_several(int begin, int step, Visit visit) const {
    for (int first = begin; first < split.runs; first += kRuns * step) {
      Run<float, kRun> loaded[kRuns];
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        loaded[i] = Run<float, kRun>::load(student.logits + split.run_start(run_at(first, i, step)), true);
      }
      float s[kRuns * kRun];
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        float run[kRun];
        loaded[i].unpack(run);
        student.finish(split.run_start(run_at(first, i, step)), bias_aligned, options.student, run);
#pragma unroll
        for (int j = 0; j < kRun; ++j) s[i * kRun + j] = first + i * step < split.runs ? run[j] : -INFINITY;
      }
      visit(s);
    }
    for_each_rest(begin, step, [&](int, const auto& s) { visit(s); });
  }

 private:
  __device__ __forceinline__ int run_at(int first, int i, int step) const {
    return first + i * step < split.runs ? first + i * step : split.runs - 1;
  }
  template <typename Visit>
  __device__ __forceinline__ void for_each_rest(int begin, int step, Visit visit) const {
    for (int i = begin; i < split.rest; i += step) {
      float s[1];
      student.load_one(split.rest_index(i), options.student, s);
      visit(split.rest_index(i), s);
    }
  }
};

// The student's logits, and which rows count.
struct StudentRows {
  LogitRows<float> student;
  const bool* mask;  // (N) or null
  int64_t mask_stride;

  __device__ __forceinline__ bool is_valid(int64_t row) const {
    return mask == nullptr || load_scalar<true>(mask + row * mask_stride);
  }
};

template <typename... Metrics>  // MetricsState or nothing
__global__ void __launch_bounds__(kStateThreads, kStudentBlocksPerSM)
    kl_student_stats_kernel(StudentRows rows, DeviceOptions options,
                            float* __restrict__ state,         // (2, N)
                            int64_t state_stride, bool first,  // first: there is no state yet
                            Metrics... of_metrics) {
  using State = StateOf<StudentState, Metrics...>;
  constexpr int kRun = kRunOf<float>;
  MINITRON_SHARED(State, partial, kMaxWarps);
  const int64_t row = blockIdx.x;
  if (!rows.is_valid(row)) options.vocab_size = 0;
  State begun = State::empty();
  if (threadIdx.x == 0 && !first) {
    begun = state_of(load_fields<StudentState>(state + row, state_stride), of_metrics.load(row)...);
  }
  const StudentRow<kRun> logits(rows.student, row, options);
  logits.template for_each_several<kStudentLogitsAtOnce / kRun>(
      threadIdx.x, blockDim.x, [&](const auto& s) { begun = with_run(begun, s, of_metrics.tau()...); });
  const State merged = block_reduce(begun, State::empty(), partial, [&](const auto& a, const auto& b) {
    return a.merged(b, of_metrics.tau()...);
  });
  if (threadIdx.x == 0) {
    store_fields(state + row, state_stride, row_of<StudentState>(merged));
    (of_metrics.store(row, merged, first, logits.student, options), ...);
  }
}

// The cross-entropy of a student_grad, by log-sum-exp of all y and not of these tokens alone.
struct StudentCrossEntropy {
  CrossEntropy ce;
  const float* lse_y;  // (N)
  int64_t lse_y_stride;
  float inv_tau;

  __device__ __forceinline__ RowCrossEntropy at(int64_t row, int columns, float weight) const {
    const float lse = load_scalar<true>(lse_y + row * lse_y_stride);
    return ce.at(row, columns, lse * inv_tau, 1.0f, weight);
  }
};

template <typename G, typename... Metrics>  // StudentCrossEntropy or nothing
__global__ void __launch_bounds__(kGradThreads, kStudentGradBlocksPerSM)
    kl_student_grad_kernel(StudentRows rows, DeviceOptions options, const float* __restrict__ weight,  // (N)
                           int64_t weight_stride, const float* __restrict__ lse,  // (N), of these tokens
                           int64_t lse_stride, G* __restrict__ grad, int64_t grad_stride,
                           int columns,  // (N, columns)
                           Metrics... of_metrics) {
  constexpr int kRun = kRunOf<float, G>;
  const int64_t row = blockIdx.x;
  const int begin = blockIdx.y * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.x;
  grad += row * grad_stride;
  if (!rows.is_valid(row)) return fill_zero(grad, columns, begin, step);

  const float row_weight = load_scalar<true>(weight + row * weight_stride);
  const float row_lse = load_scalar<true>(lse + row * lse_stride);
  const float zero = row_lse == -INFINITY ? INFINITY : row_lse;  // of no token: exp(s - zero) is 0
  const StudentRow<kRun> logits(rows.student, row, options);
  const bool grad_aligned = aligned16(grad + logits.split.head);
  const auto write = [&](const auto&... ce) {
    const auto make = [&](int column, float s, float) {
      return combined(exp_approx(s - zero), column, s, ce...);
    };
    logits.template for_each<kStudentLogitsAtOnce / kRun>(begin, step, [&](int column, const auto& s) {
      store_grads<false>(grad, column, grad_aligned, s, s, sizeof...(ce) == 0 ? row_weight : 1.0f,
                         options.student, make);
    });
  };
  write(of_metrics.at(row, options.vocab_size, row_weight)...);
  fill_zero(grad + options.vocab_size, columns - options.vocab_size, begin, step);
}

}  // namespace minitron::cuda
