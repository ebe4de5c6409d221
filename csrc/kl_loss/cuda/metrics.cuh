// What else is known of a row where the caller asks for it, all of the student at temperature 1: entropy,
// cross-entropy, log p(label), and the cross-entropy's gradient. y = s tau are its logits.
//
// The sums come out of the registers that hold a run for the loss, and of its exponentials: at temperature 1
// no logit has a second one. The label's logit is read once more, alone, at the row's end.
//
// A kernel takes `Metrics... of_metrics`: one of the structs below, or nothing; a kernel with nothing is
// compiled as if there were no metrics.
#pragma once

#include <type_traits>

#include "common/cuda/vec.cuh"
#include "kl_loss/cuda/divergence.cuh"
#include "kl_loss/cuda/row_pairs.cuh"

namespace minitron::cuda {

struct Labels {
  const int64_t* labels;  // (N) or null
  int64_t stride;
  int64_t first_token;  // what column 0 is

  // The column of the row's label; -1 if it is none of these.
  __device__ __forceinline__ int column(int64_t row, int columns) const {
    if (labels == nullptr) return -1;
    const int64_t column = load_scalar<true>(labels + row * stride) - first_token;
    return column >= 0 && column < columns ? static_cast<int>(column) : -1;
  }
};

struct MetricOptions {
  float tau, smoothing;
  float share;  // of a token in what smoothing spreads, 1 / tokens

  MetricOptions() = default;
  MetricOptions(const LossOptions& options, int64_t total_vocab)
      : tau(static_cast<float>(1.0 / options.inv_tau)),
        smoothing(static_cast<float>(options.label_smoothing)),
        share(static_cast<float>(1.0 / static_cast<double>(total_vocab))) {}

  // y of a transformed logit, rounded: where it is subtracted from another, equal logits give 0.
  __device__ __forceinline__ float at_one(float s) const { return mul_rounded(s, tau); }
};

// Of some tokens, mergeable together with the maximum of their s. The fields are the first of MetricState.
struct MetricSums {
  float sum;    // sum exp(y - max_y); at temperature 1 nobody reads it, since the row's own is the same
  float dot;    // sum exp(y - max_y) (y - max_y) <= 0
  float total;  // sum y

  static constexpr int kFields = 3;

  static __device__ __forceinline__ MetricSums empty() { return {0.0f, 0.0f, 0.0f}; }

  // Of one run, whose s have this maximum and exps = exp(s - maximum). Where is_token(i) is false, there is
  // none, and its s is -inf.
  template <int N, typename IsToken>
  static __device__ __forceinline__ MetricSums of(const float (&s)[N], const float (&exps)[N], float max,
                                                  float tau, const IsToken& is_token) {
    MetricSums out = empty();
    const float zero = OnlineSum::base(max);
    if (tau == 1.0f) {
#pragma unroll
      for (int i = 0; i < N; ++i) out.add(exps[i], s[i] - zero);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float y = (s[i] - zero) * tau;
        out.add(exp_approx(y), y);
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) out.total += is_token(i) ? s[i] : 0.0f;
    out.total *= tau;
    return out;
  }

  // The same from a larger maximum, top.
  __device__ __forceinline__ MetricSums below(float max, float top, float tau) const {
    const float y = (max - OnlineSum::base(top)) * tau, mass = exp_approx(y);
    return {sum * mass, product(mass, dot + y * sum), total};
  }
  __device__ __forceinline__ MetricSums plus(const MetricSums& other) const {
    return {sum + other.sum, dot + other.dot, total + other.total};
  }

 private:
  // A token or part without mass adds nothing, even if its y is -inf.
  static __device__ __forceinline__ float product(float mass, float y) {
    return mass == 0.0f ? 0.0f : mass * y;
  }
  __device__ __forceinline__ void add(float exp_y, float y) {
    sum += exp_y;
    dot += product(exp_y, y);
  }
};

// RowState or RowSums, and the sums of the metrics.
template <typename Row>
struct WithMetrics {
  Row row;
  MetricSums sums;

  static __device__ __forceinline__ WithMetrics empty() { return {Row::empty(), MetricSums::empty()}; }

  template <int N, typename IsToken>
  __device__ __forceinline__ void add(const float (&s)[N], const float (&t)[N], const IsToken& is_token,
                                      float tau) {
    float exps[N];
    const Row run = Row::of(s, t, exps);
    *this = merged({run, MetricSums::of(s, exps, run.student.max, tau, is_token)}, tau);
  }
  template <int N>
  __device__ __forceinline__ void add(const float (&s)[N], const float (&t)[N], float tau) {
    add(s, t, [](int) { return true; }, tau);
  }
  __device__ __forceinline__ WithMetrics merged(const WithMetrics& other, float tau) const {
    const Row all = row.merged(other.row);
    const float top = all.student.max;
    return {all,
            sums.below(row.student.max, top, tau).plus(other.sums.below(other.row.student.max, top, tau))};
  }
  __device__ __forceinline__ auto stats() const { return row.stats(); }
  __device__ __forceinline__ auto loss() const { return row.loss(); }

  // sum exp(y - max_y)
  __device__ __forceinline__ float sum_y(float tau) const { return tau == 1.0f ? row.student.sum : sums.sum; }
};

// What a kernel keeps of a row.
template <typename Row, typename... Metrics>
using StateOf = std::conditional_t<sizeof...(Metrics) == 0, Row, WithMetrics<Row>>;

// The two ways between a state and what stands in memory.
template <typename Row>
__device__ __forceinline__ Row state_of(const Row& row) {
  return row;
}
template <typename Row>
__device__ __forceinline__ WithMetrics<Row> state_of(const Row& row, const MetricSums& sums) {
  return {row, sums};
}
template <typename Row>
__device__ __forceinline__ const Row& row_of(const Row& state) {
  return state;
}
template <typename Row>
__device__ __forceinline__ const Row& row_of(const WithMetrics<Row>& state) {
  return state.row;
}

// Metrics of whole rows, written.
struct MetricsOut {
  Labels labels;
  MetricOptions options;
  float* metrics;  // (N, kNumMetrics)

  __device__ __forceinline__ float tau() const { return options.tau; }

  __device__ __forceinline__ void store_zero(int64_t row) const {
#pragma unroll
    for (int i = 0; i < kNumMetrics; ++i) store_scalar(metrics + row * kNumMetrics + i, 0.0f);
  }

  // label: its y, -inf where it is not among the tokens.
  template <typename State>
  __device__ __forceinline__ void store(int64_t row, const State& state, float label) const {
    const float sum = state.sum_y(options.tau), log_sum = logf(sum);
    const float max = options.at_one(state.row.student.max);
    const float logprob = (label - max) - log_sum;
    float ce = 0.0f;  // neither part where it has no weight: it may be infinite
    if (options.smoothing < 1.0f) ce = (options.smoothing - 1.0f) * logprob;
    if (options.smoothing > 0.0f) {
      ce += options.smoothing * ((max - state.sums.total * options.share) + log_sum);
    }
    float* out = metrics + row * kNumMetrics;
    const bool labelled = labels.labels != nullptr;
    store_scalar(out + kInvSumY, 1.0f / sum);
    store_scalar(out + kCE, labelled ? ce : 0.0f);
    store_scalar(out + kEntropy, log_sum - state.sums.dot / sum);
    store_scalar(out + kLabelLogprob, labelled ? logprob : 0.0f);
  }

  // The same with the label's logit out of the row's.
  template <typename State, typename T>
  __device__ __forceinline__ void store(int64_t row, const State& state, const LogitRows<T>& student,
                                        const DeviceOptions& of_logits) const {
    store(row, state, label_of(row, student, of_logits, labels, options, -INFINITY));
  }

  template <typename T>
  static __device__ __forceinline__ float label_of(int64_t row, const LogitRows<T>& student,
                                                   const DeviceOptions& of_logits, const Labels& labels,
                                                   const MetricOptions& options, float otherwise) {
    const int column = labels.column(row, of_logits.vocab_size);
    if (column < 0) return otherwise;
    float s[1];
    student.load_one(column, of_logits.student, s);
    return options.at_one(s[0]);
  }
};

// The state of a tile's metrics, carried from tile to tile.
struct MetricsState {
  Labels labels;
  MetricOptions options;
  float* state;  // (kNumMetricState, N)
  int64_t stride;

  __device__ __forceinline__ float tau() const { return options.tau; }

  __device__ __forceinline__ MetricSums load(int64_t row) const {
    return load_fields<MetricSums>(state + row, stride);
  }

  template <typename State, typename T>
  __device__ __forceinline__ void store(int64_t row, const State& merged, bool first,
                                        const LogitRows<T>& student, const DeviceOptions& of_logits) const {
    float* out = state + row;
    const float begun = first ? -INFINITY : load_scalar<false>(out + kStateLabel * stride);
    const float label = MetricsOut::label_of(row, student, of_logits, labels, options, begun);
    const float total = options.smoothing == 0.0f ? 0.0f : merged.sums.total;
    store_fields(out, stride, MetricSums{merged.sum_y(options.tau), merged.sums.dot, total});
    store_scalar(out + kStateLabel * stride, label);
  }
};

// Metrics of rows out of the states of several splits.
struct MetricsFinish {
  MetricsOut out;
  const float* states;  // (splits, kNumMetricState, N)

  __device__ __forceinline__ float tau() const { return out.tau(); }

  __device__ __forceinline__ MetricSums load(int split, int64_t row, int64_t rows) const {
    return load_fields<MetricSums>(part(split, row, rows), rows);
  }
  template <typename State>
  __device__ __forceinline__ void store(int64_t row, bool valid, const State& state, int splits,
                                        int64_t rows) const {
    if (!valid) return out.store_zero(row);
    float label = -INFINITY;
    for (int split = 0; split < splits; ++split) {
      label = fmaxf(label, load_scalar<true>(part(split, row, rows) + kStateLabel * rows));
    }
    out.store(row, state, label);
  }

 private:
  __device__ __forceinline__ const float* part(int split, int64_t row, int64_t rows) const {
    return states + split * kNumMetricState * rows + row;
  }
};

// The cross-entropy's part in the gradient of one row.
struct RowCrossEntropy {
  float max_s, inv_sum_y;
  float kl_weight, ce_weight;  // the latter times tau, by which softcap_grad is divided
  float tau, spread, hit;      // what a token's, and the label's, target is
  int label;                   // its column, or -1

  // The gradient to s of the divergence, which is grad, and the cross-entropy, both weighted.
  __device__ __forceinline__ float combined(float grad, int column, float s) const {
    const float p = exp_approx((s - max_s) * tau) * inv_sum_y;
    const float target = column == label ? hit : spread;
    // nothing is left of an infinite divergence that has no weight
    return (kl_weight == 0.0f ? 0.0f : kl_weight * grad) + ce_weight * (p - target);
  }
};

// What that is made from.
struct CrossEntropy {
  Labels labels;
  MetricOptions options;
  const float* ce_weight;  // (N), or null for 0
  int64_t ce_weight_stride;

  __device__ __forceinline__ RowCrossEntropy at(int64_t row, int columns, float max_s, float inv_sum_y,
                                                float kl_weight) const {
    const float weight = ce_weight == nullptr ? 0.0f : load_scalar<true>(ce_weight + row * ce_weight_stride);
    const float spread = options.smoothing * options.share;
    return {max_s,
            inv_sum_y,
            kl_weight,
            weight * options.tau,
            options.tau,
            spread,
            spread + (1.0f - options.smoothing),
            labels.column(row, columns)};
  }
};

// Of a gradient kernel, which reads the metrics that a forward wrote.
struct MetricsIn {
  CrossEntropy ce;
  const float* metrics;  // (N, kNumMetrics)

  __device__ __forceinline__ RowCrossEntropy at(int64_t row, int columns, float max_s,
                                                float kl_weight) const {
    return ce.at(row, columns, max_s, load_scalar<true>(metrics + row * kNumMetrics + kInvSumY), kl_weight);
  }
};

// Of a kernel that makes metrics and gradient.
struct MetricsInOut {
  MetricsOut out;
  const float* ce_weight;
  int64_t ce_weight_stride;

  __device__ __forceinline__ float tau() const { return out.tau(); }
  __device__ __forceinline__ CrossEntropy ce() const {
    return {out.labels, out.options, ce_weight, ce_weight_stride};
  }
};

}  // namespace minitron::cuda
