// The metrics of a row (see Metric in loss_options.h) from its running sums, and how the sums of its parts
// merge: always in double, and from the maximum, so that nothing cancels.
#pragma once

#include <cmath>
#include <limits>

#include "kl_loss/loss_options.h"

namespace minitron {

// Always inlined, since the files that include this are compiled for different CPUs.
struct MetricSums {
  double sum = 0, dot = 0, total = 0;  // of e = exp(y - max_y), e (y - max_y), y - max_y; the last two <= 0

  // The same sums of `tokens` tokens, measured from a maximum that lies -distance higher. -inf: so far there
  // are only masked-out tokens.
  [[gnu::always_inline]] MetricSums measured_from(double distance, int64_t tokens) const {
    if (distance == 0) return *this;
    if (distance == -std::numeric_limits<double>::infinity()) return {sum * 0, dot * 0, total};
    const double scale = std::exp(distance);
    return {sum * scale, scale * (dot + distance * sum), total + distance * double(tokens)};
  }
  [[gnu::always_inline]] void add(const MetricSums& other) {
    sum += other.sum;
    dot += other.dot;
    total += other.total;
  }
};

// What cross-entropy's target adds to a token: `spread` to each, and `label` to the label.
template <typename A>
struct TargetShares {
  [[gnu::always_inline]] TargetShares(double smoothing, int64_t tokens)
      : spread(A(smoothing / double(tokens))), label(A(1 - smoothing)) {}
  A spread, label;
};

// label: its y - max_y, -inf for one that is not among the tokens. A share of 0 is left out, even of what is
// infinite.
template <typename A>
[[gnu::always_inline]] inline void write_metrics(const MetricSums& y, bool has_label, double label,
                                                 double smoothing, int64_t tokens, A* metrics) {
  const double log_sum = std::log(y.sum);
  metrics[kInvSumY] = A(1 / y.sum);
  metrics[kEntropy] = A(log_sum - y.dot / y.sum);
  metrics[kLabelLogprob] = A(has_label ? label - log_sum : 0.0);
  double ce = 0;
  if (has_label && smoothing < 1) ce += (1 - smoothing) * (log_sum - label);
  if (has_label && smoothing > 0) ce += smoothing * (log_sum - y.total / double(tokens));
  metrics[kCE] = A(ce);
}

}  // namespace minitron
