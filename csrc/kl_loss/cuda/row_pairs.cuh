// A row of student and teacher logits as a kernel reads it: runs of 16-byte accesses, transformed, in fp32
// registers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cuda/vec.cuh"
#include "kl_loss/cuda/divergence.cuh"

namespace minitron::cuda {

// The order of a look at a row. Backwards after a look forwards: what was read last is still in the caches.
enum class Pass { kForwards, kBackwards, kLastForwards, kLastBackwards };
constexpr bool is_backwards(Pass pass) { return pass == Pass::kBackwards || pass == Pass::kLastBackwards; }
constexpr bool is_last(Pass pass) { return pass == Pass::kLastForwards || pass == Pass::kLastBackwards; }

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

  // Logits from column on, of which x is as it was read, transformed.
  template <int N>
  __device__ __forceinline__ void finish(int column, bool bias_aligned, const LogitTransform& transform,
                                         float (&x)[N]) const {
    if (bias != nullptr) {
      float b[N];
      load_run(bias + column, bias_aligned, b);
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

// The runs of a pair of rows. Runs of the student are aligned; where those of the teacher are not, they are
// read element by element.
//
// Memory is busy only while enough loads are under way: a thread issues those of several runs in a row before
// it looks at the first. Nothing that depends on what is only known at run time (bias, softcap, alignment,
// the row's end) may stand between them.
//
// kAligned: rows and biases all begin at multiples of 16 bytes.
template <typename S, typename T, int kRun_ = kRunOf<S, T>, bool kAligned = false>
struct PairRow {
  static constexpr int kRun = kRun_;
  const LogitRows<S> student;
  const LogitRows<T> teacher;
  const DeviceOptions& options;
  const RowSplit<kRun, S> split;
  const bool teacher_aligned, student_bias_aligned, teacher_bias_aligned;

  __device__ __forceinline__ PairRow(const KlRows<S, T>& rows, int64_t row, const DeviceOptions& options)
      : student(rows.student.at(row)),
        teacher(rows.teacher.at(row)),
        options(options),
        split(kAligned ? nullptr : student.logits, options.vocab_size),
        teacher_aligned(kAligned || aligned16(teacher.logits + split.head)),
        student_bias_aligned(kAligned || aligned16(student.bias + split.head)),
        teacher_bias_aligned(kAligned || aligned16(teacher.bias + split.head)) {}

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

  // Calls visit(column, s, t) with arrays of transformed logits, for the runs begin, begin + step, ..., kRuns
  // of them loaded at a time.
  template <int kRuns, Pass kPass, typename Visit>
  __device__ __forceinline__ void for_each(int begin, int step, Visit visit) const {
    turns<kRuns, kPass>(begin, step, [&](const auto& turn) {
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        if (!turn.within(i)) continue;
        float s[kRun], t[kRun];
        turn.read(i, s, t);
        visit(turn.column[i], s, t);
      }
    });
    for_each_rest(begin, step, visit);
  }

  // Calls visit(s, t, is_token) with kRuns runs at a time, step apart; runs beyond the last look like tokens
  // that are masked out, but is_token(i) is false.
  template <int kRuns, typename Visit>
  __device__ __forceinline__ void for_each_several(int begin, int step, Visit visit) const {
    turns<kRuns, Pass::kForwards>(begin, step, [&](const auto& turn) {
      float s[kRuns * kRun], t[kRuns * kRun];
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        float run_s[kRun], run_t[kRun];
        turn.read(i, run_s, run_t);
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
          s[i * kRun + j] = turn.within(i) ? run_s[j] : -INFINITY;
          t[i * kRun + j] = turn.within(i) ? run_t[j] : -INFINITY;
        }
      }
      visit(s, t, [&](int i) { return turn.within(i / kRun); });
    });
    for_each_rest(begin, step,
                  [&](int, const auto& s, const auto& t) { visit(s, t, [](int) { return true; }); });
  }

 private:
  // kRuns runs that have been read but not yet looked at.
  template <int kRuns>
  struct Turn {
    const PairRow& row;
    int first, step;
    int column[kRuns];
    Run<S, kRun> student[kRuns];
    Run<T, kRun> teacher[kRuns];

    __device__ __forceinline__ bool within(int i) const { return first + i * step < row.split.runs; }
    __device__ __forceinline__ void read(int i, float (&s)[kRun], float (&t)[kRun]) const {
      student[i].unpack(s);
      teacher[i].unpack(t);
      row.student.finish(column[i], row.student_bias_aligned, row.options.student, s);
      row.teacher.finish(column[i], row.teacher_bias_aligned, row.options.teacher, t);
    }
  };

  template <int kRuns, Pass kPass, typename Visit>
  __device__ __forceinline__ void turns(int begin, int step, Visit visit) const {
    constexpr bool kLast = is_last(kPass);
    for (int first = begin; first < split.runs; first += kRuns * step) {
      Turn<kRuns> turn{*this, first, step};
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        const int run = first + i * step < split.runs ? first + i * step : split.runs - 1;  // may be read
        turn.column[i] = split.run_start(is_backwards(kPass) ? split.runs - 1 - run : run);
        turn.student[i] = Run<S, kRun>::template load<kLast>(student.logits + turn.column[i], true);
      }
      // one branch for all, the same for the whole block: nothing waits for the student's loads
      if (teacher_aligned) {
#pragma unroll
        for (int i = 0; i < kRuns; ++i)
          turn.teacher[i] = Run<T, kRun>::template load<kLast>(teacher.logits + turn.column[i], true);
      } else {
#pragma unroll
        for (int i = 0; i < kRuns; ++i)
          turn.teacher[i] = Run<T, kRun>::template load<kLast>(teacher.logits + turn.column[i], false);
      }
      visit(turn);
    }
  }
};

}  // namespace minitron::cuda
