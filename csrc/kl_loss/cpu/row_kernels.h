// kl_loss on rows of logits. A row is read in blocks that stay in the L1 cache: once for its normalisers,
// once for the loss (out of the caches), and once more in the backward. The only result of size [N, V] is the
// gradient.
#pragma once

#include <cmath>

#include "kl_loss/cpu/divergence.h"
#include "kl_loss/cpu/metrics.h"

namespace minitron::MINITRON_SIMD {

constexpr int64_t kBlock = 1024;  // logits of one side per block; a multiple of every kLanes

// A block of a row, transformed, as A; filled up to whole vectors with masked-out tokens.
template <typename A>
inline void read_block(const void* row, DType dtype, int64_t begin, int64_t n, A scale, A softcap, A inv_tau,
                       A* out) {
  constexpr int L = kLanes<A>;
  constexpr A masked_out = -std::numeric_limits<A>::infinity();
  dispatch_readable<A>(dtype, [&](auto element) {
    const auto* p = static_cast<const decltype(element)*>(row) + begin;
    for (int64_t i = 0; i < n; i += L) {
      const Vec<A> z = n - i >= L ? load<A>(p + i) : load_partial<A>(p + i, n - i, masked_out);
      Vec<A> y = transform_logit<A>(z, scale, softcap, inv_tau);
      if (n - i < L) {
        for (int64_t j = n - i; j < L; ++j) y[j] = masked_out;
      }
      store(out + i, y);
    }
  });
}

template <typename A>
class RowReader {
 public:
  RowReader(const LogitsRow& row, const LossOptions& options) : row_(row), options_(options) {}

  // Calls f(s, t, n, begin) for each block.
  template <typename F>
  void each_block(F&& f) {
    for (int64_t begin = 0; begin < row_.vocab_size; begin += kBlock) {
      const int64_t n = row_.vocab_size - begin < kBlock ? row_.vocab_size - begin : kBlock;
      read_block<A>(row_.student, row_.student_dtype, begin, n, A(options_.student_scale),
                    A(options_.student_softcap), A(options_.inv_tau), student_);
      read_block<A>(row_.teacher, row_.teacher_dtype, begin, n, A(options_.teacher_scale),
                    A(options_.teacher_softcap), A(options_.inv_tau), teacher_);
      f(student_, teacher_, n, begin);
    }
  }

 private:
  const LogitsRow& row_;
  const LossOptions& options_;
  alignas(64) A student_[kBlock], teacher_[kBlock];  // the current block
};

// Running maximum and sum of exp. Sums of a block are short and stay in A; that of the row is kept in double.
template <typename A>
struct RunningSum {
  A max = -std::numeric_limits<A>::infinity();
  double sum = 0;

  void add_block(const A* x, int64_t n) {
    constexpr int L = kLanes<A>;
    const A base = raise_maximum(x, n);
    Vec<A> total{};
    for (int64_t i = 0; i < n; i += L) total += exp_nonpositive<A>(load<A>(x + i) - base);
    sum += sum_lanes<A>(total);
  }

  // Takes a block into the maximum; what is to be subtracted of its logits.
  A raise_maximum(const A* x, int64_t n) {
    constexpr int L = kLanes<A>;
    Vec<A> top = splat(-std::numeric_limits<A>::infinity());
    for (int64_t i = 0; i < n; i += L) top = max_of(load<A>(x + i), top);
    const A block_max = max_lanes<A>(top);
    if (block_max > max) {
      sum *= std::exp(double(max) - double(block_max));
      max = block_max;
    }
    // of a row that is all -inf so far no maximum can be subtracted
    return max == -std::numeric_limits<A>::infinity() ? A(0) : max;
  }
};

// The student's sums and, from the same look at a block, what its metrics are made of.
template <typename A, AtUnitTemperature kY>
class RunningMetrics {
 public:
  explicit RunningMetrics(const LossOptions& options, const int64_t* label)
      : tau_(1 / options.inv_tau), smoothed_(options.label_smoothing > 0), label_(label) {}

  RunningSum<A> student;

  void add_block(const A* s, int64_t n, int64_t begin) {
    if constexpr (kY == AtUnitTemperature::kNothing) {
      student.add_block(s, n);
      return;
    }
    constexpr int L = kLanes<A>;
    const A before = student.max, base = student.raise_maximum(s, n), tau = A(tau_);
    if (student.max > before) y_ = y_.measured_from((double(before) - double(student.max)) * tau_, begin);
    Vec<A> sum_s{}, sum_y{}, dot_y{};
    for (int64_t i = 0; i < n; i += L) {
      const Vec<A> x = load<A>(s + i) - base, e = exp_nonpositive<A>(x);
      sum_s += e;
      if constexpr (kY == AtUnitTemperature::kShared) {
        dot_y += weigh<A>(e, x);
      } else {
        const Vec<A> y = x * tau, e_y = exp_nonpositive<A>(y);
        sum_y += e_y;
        dot_y += weigh<A>(e_y, y);
      }
    }
    student.sum += sum_lanes<A>(sum_s);
    if constexpr (kY == AtUnitTemperature::kShared) sum_y = sum_s;
    y_.add({sum_lanes<A>(sum_y), sum_lanes<A>(dot_y), smoothed_ ? total_of(s, n, base) * tau_ : 0.0});
    if (label_ && *label_ >= begin && *label_ < begin + n) label_logit_ = s[*label_ - begin];
  }

  void write(const LossOptions& options, int64_t vocab_size, A* metrics) const {
    write_metrics<A>(y_, label_ != nullptr, (double(label_logit_) - double(student.max)) * tau_,
                     options.label_smoothing, vocab_size, metrics);
  }

 private:
  static double total_of(const A* s, int64_t n, A base) {
    constexpr int L = kLanes<A>;
    Vec<A> total{};
    int64_t i = 0;
    for (; i + L <= n; i += L) total += load<A>(s + i) - base;
    double sum = sum_lanes<A>(total);
    for (; i < n; ++i) sum += double(s[i] - base);  // behind n the block is filled with -inf
    return sum;
  }

  const double tau_;
  const bool smoothed_;
  const int64_t* label_;
  MetricSums y_;
  A label_logit_ = -std::numeric_limits<A>::infinity();
};

template <typename A>
inline RowStats<A> broadcast_stats(const A* stats) {
  return {splat(stats[kMaxS]),    splat(stats[kInvSumS]), splat(stats[kMaxT]),
          splat(stats[kInvSumT]), splat(stats[kLseDiff]), splat(stats[kKL])};
}

template <typename A, AtUnitTemperature kY>
void reduce_row(RowReader<A>& reader, const LogitsRow& row, const LossOptions& options, A* stats,
                const int64_t* label, A* metrics) {
  RunningMetrics<A, kY> running(options, label);
  RunningSum<A> teacher;
  reader.each_block([&](const A* s, const A* t, int64_t n, int64_t begin) {
    running.add_block(s, n, begin);
    teacher.add_block(t, n);
  });
  const RunningSum<A>& student = running.student;
  stats[kMaxS] = student.max;
  stats[kInvSumS] = A(1.0 / student.sum);
  stats[kMaxT] = teacher.max;
  stats[kInvSumT] = A(1.0 / teacher.sum);
  stats[kLseDiff] = lse_diff_between<A>(student.max, student.sum, teacher.max, teacher.sum);
  stats[kKL] = 0;
  if constexpr (kY != AtUnitTemperature::kNothing) running.write(options, row.vocab_size, metrics);
}

template <typename A, Divergence kDivergence>
void row_loss(RowReader<A>& reader, const LossOptions& options, A* loss, A* stats) {
  constexpr int L = kLanes<A>;
  double total = 0, kl = 0;
  const RowStats<A> row_stats = broadcast_stats(stats);
  reader.each_block([&](const A* s, const A* t, int64_t n, int64_t) {
    // four chains: equal terms all round the same way, which adds up along a single long chain
    Vec<A> block_loss[4] = {}, block_kl[4] = {};
    const auto add = [&](int64_t i, int chain) {
      const auto terms = divergence_terms<A, kDivergence>(load<A>(s + i), load<A>(t + i), row_stats,
                                                          Shares<A>(options.beta));
      block_loss[chain] += terms.loss;
      block_kl[chain] += terms.kl;
    };
    int64_t i = 0;
    for (; i + 3 * L < n; i += 4 * L) {
#pragma GCC unroll 4
      for (int chain = 0; chain < 4; ++chain) add(i + chain * L, chain);
    }
    for (; i < n; i += L) add(i, 0);
    total += sum_lanes<A>((block_loss[0] + block_loss[1]) + (block_loss[2] + block_loss[3]));
    kl += sum_lanes<A>((block_kl[0] + block_kl[1]) + (block_kl[2] + block_kl[3]));
  });
  *loss = A(total);
  if (grad_needs_kl(kDivergence)) stats[kKL] = A(needs_second_look(kDivergence) ? kl : total);
}

template <typename A, Divergence kDivergence, AtUnitTemperature kY>
void row_backward_of(const LogitsRow& row, const LossOptions& options, const A* stats, A grad_loss,
                     const RowCrossEntropy<A>* ce, void* grad) {
  constexpr int L = kLanes<A>;
  const RowStats<A> row_stats = broadcast_stats(stats);
  const A tau = A(1 / options.inv_tau);
  const TargetShares<A> shares(options.label_smoothing, row.vocab_size);
  RowReader<A> reader(row, options);
  reader.each_block([&](const A* s, const A* t, int64_t n, int64_t begin) {
    dispatch_readable<A>(row.student_dtype, [&](auto element) {
      auto* out = static_cast<decltype(element)*>(grad) + begin;
      for (int64_t i = 0; i < n; i += L) {
        const Vec<A> x = load<A>(s + i);
        const auto terms =
            divergence_terms<A, kDivergence>(x, load<A>(t + i), row_stats, Shares<A>(options.beta));
        Vec<A> mixed = terms.grad * splat(grad_loss);
        if constexpr (kY != AtUnitTemperature::kNothing) {
          Vec<A> target = splat(shares.spread);
          const int64_t lane = ce->label - (begin + i);
          if (lane >= 0 && lane < L) target[lane] += shares.label;
          mixed = mixed_grad<A, kY>(x, terms, splat(grad_loss), row_stats.max_s, splat(ce->inv_sum_y),
                                    splat(ce->weight * tau), target, tau);
        }
        const Vec<A> g = grad_of_logit<A>(x, mixed, A(options.student_scale), A(options.student_softcap),
                                          A(options.inv_tau));
        if (n - i >= L) {
          store(out + i, g);
        } else {
          store_partial(out + i, g, n - i);
        }
      }
    });
  });
}

template <typename A>
void row_forward(const LogitsRow& row, const LossOptions& options, A* loss, A* stats, const int64_t* label,
                 A* metrics) {
  RowReader<A> reader(row, options);
  with_unit_temperature(metrics != nullptr, options,
                        [&](auto y) { reduce_row<A, y()>(reader, row, options, stats, label, metrics); });
  with_divergence(options.divergence(),
                  [&](auto divergence) { row_loss<A, divergence()>(reader, options, loss, stats); });
}

template <typename A>
void row_backward(const LogitsRow& row, const LossOptions& options, const A* stats, A grad_loss,
                  const RowCrossEntropy<A>* ce, void* grad) {
  with_divergence(options.divergence(), [&](auto divergence) {
    with_unit_temperature(ce != nullptr, options, [&](auto y) {
      row_backward_of<A, divergence(), y()>(row, options, stats, grad_loss, ce, grad);
    });
  });
}

}  // namespace minitron::MINITRON_SIMD
