// A row of student and teacher logits as a kernel reads it: runs of 16-byte accesses, transformed, in fp32
// registers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cuda/vec.cuh"
#include "kl_loss/cuda/divergence.cuh"

namespace minitron::cuda {

// LossOptions in the form that kernels use.
struct DeviceOptions {
  int vocab_size;  // columns from here on are padding
  Shares shares;   // JSD's
  LogitTransform student, teacher;

  DeviceOptions(const LossOptions& options, int64_t vocab_size)
      : vocab_size(static_cast<int>(vocab_size)),
        shares(options.beta),
        student(options.student_scale, options.student_softcap, options.inv_tau),
        teacher(options.teacher_scale, options.teacher_softcap, options.inv_tau) {}
};

// One matrix of logits.
template <typename T>
struct LogitRows {
  const T* logits;    // (N, >= vocab_size), stride 1 in the vocabulary
  const float* bias;  // (vocab_size), added to each row before the transform, or null
  int64_t stride;     // elements from row to row

  __device__ __forceinline__ LogitRows at(int64_t row) const { return {logits + row * stride, bias, stride}; }

  template <int N>
  __device__ __forceinline__ void load(int column, bool aligned, const LogitTransform& transform,
                                       float (&x)[N]) const {
    load_run(logits + column, aligned, x);
    if (bias != nullptr) {
      float b[N];
      load_run(bias + column, aligned16(bias + column), b);
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] += b[i];
    }
    transform.apply(x);
  }
  __device__ __forceinline__ void load_one(int column, const LogitTransform& transform, float (&x)[1]) const {
    x[0] = to_float(load_scalar<true>(logits + column));
    if (bias != nullptr) x[0] += load_scalar<true>(bias + column);
    transform.apply(x);
  }
};

template <typename S, typename T>
struct KlRows {
  LogitRows<S> student;
  LogitRows<T> teacher;
  const bool* mask;  // (N) or null: false where the token is not valid, and its logits are not read
  int64_t mask_stride;

  __device__ __forceinline__ bool is_valid(int64_t row) const {
    return mask == nullptr || load_scalar<true>(mask + row * mask_stride);
  }
};

// The number of elements that fills whole 16-byte accesses of each of these types.
template <typename... Elements>
constexpr int kRunOf = 16 / std::min({sizeof(Elements)...});

// The runs of a pair of rows, one after the other. Runs of the student are aligned; where those of the
// teacher are not, they are read element by element.
template <typename S, typename T, int kRun = kRunOf<S, T>>
struct PairRow {
  const LogitRows<S> student;
  const LogitRows<T> teacher;
  const DeviceOptions& options;
  const RowSplit<kRun, S> split;
  const bool teacher_aligned;

  __device__ __forceinline__ PairRow(const KlRows<S, T>& rows, int64_t row, const DeviceOptions& options)
      : student(rows.student.at(row)),
        teacher(rows.teacher.at(row)),
        options(options),
        split(student.logits, options.vocab_size),
        teacher_aligned(aligned16(teacher.logits + split.head)) {}

  __device__ __forceinline__ void load(int column, float (&s)[kRun], float (&t)[kRun]) const {
    student.load(column, true, options.student, s);
    teacher.load(column, teacher_aligned, options.teacher, t);
  }

  // Calls visit(column, s, t) with arrays of one logit for the tokens before and after the runs.
  template <typename Visit>
  __device__ __forceinline__ void for_each_rest(int begin, int step, Visit visit) const {
    for (int i = begin; i < split.rest; i += step) {
      const int column = split.rest_index(i);
      float s[1], t[1];
      student.load_one(column, options.student, s);
      teacher.load_one(column, options.teacher, t);
      visit(column, s, t);
    }
  }

  // Calls visit(column, s, t) with arrays of transformed logits, for the runs begin, begin + step, ...
  template <bool kBackwards, typename Visit>
  __device__ __forceinline__ void for_each(int begin, int step, Visit visit) const {
    for (int run = begin; run < split.runs; run += step) {
      const int column = split.run_start(kBackwards ? split.runs - 1 - run : run);
      float s[kRun], t[kRun];
      load(column, s, t);
      visit(column, s, t);
    }
    for_each_rest(begin, step, visit);
  }

  // Calls visit(s, t) with kRuns runs at a time, step apart; runs beyond the last are masked-out tokens.
  template <int kRuns, typename Visit>
  __device__ __forceinline__ void for_each_several(int begin, int step, Visit visit) const {
    for (int first = begin; first < split.runs; first += kRuns * step) {
      float s[kRuns * kRun], t[kRuns * kRun];
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        float run_s[kRun], run_t[kRun];
        const int run = first + i * step;
        if (run < split.runs) {
          load(split.run_start(run), run_s, run_t);
        } else {
#pragma unroll
          for (int j = 0; j < kRun; ++j) run_s[j] = run_t[j] = -INFINITY;
        }
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
          s[i * kRun + j] = run_s[j];
          t[i * kRun + j] = run_t[j];
        }
      }
      visit(s, t);
    }
    for_each_rest(begin, step, [&](int, const auto& s, const auto& t) { visit(s, t); });
  }
};

}  // namespace minitron::cuda
