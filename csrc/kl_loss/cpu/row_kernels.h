// kl_loss on rows of logits that already exist. A row is read in blocks that stay in L1: once for its
// normalisers, once for the loss (from cache), and once more in the backward. Nothing of size [N, V] is
// written but the gradient.
#pragma once

#include <cmath>

#include "kl_loss/cpu/divergence.h"

namespace minitron::MINITRON_SIMD {

constexpr int64_t kBlock = 1024;  // logits of one side per block; a multiple of every kLanes

// A block of a row, transformed, as A; padded with impossible tokens to whole vectors.
template <typename A>
inline void read_block(const void* row, DType dtype, int64_t begin, int64_t n, A scale, A softcap, A inv_tau,
                       A* out) {
  constexpr int L = kLanes<A>;
  constexpr A impossible = -std::numeric_limits<A>::infinity();
  dispatch_readable<A>(dtype, [&](auto element) {
    const auto* p = static_cast<const decltype(element)*>(row) + begin;
    for (int64_t i = 0; i < n; i += L) {
      const Vec<A> z = n - i >= L ? load<A>(p + i) : load_partial<A>(p + i, n - i, impossible);
      Vec<A> y = transform_logit<A>(z, scale, softcap, inv_tau);
      if (n - i < L) {
        for (int64_t j = n - i; j < L; ++j) y[j] = impossible;
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
                    A(options_.student_softcap), A(options_.inv_tau), s_);
      read_block<A>(row_.teacher, row_.teacher_dtype, begin, n, A(options_.teacher_scale),
                    A(options_.teacher_softcap), A(options_.inv_tau), t_);
      f(s_, t_, n, begin);
    }
  }

 private:
  const LogitsRow& row_;
  const LossOptions& options_;
  alignas(64) A s_[kBlock], t_[kBlock];
};

// Online max and sum of exp; the sums of a block are short, those of the row are kept in double.
template <typename A>
struct RunningSum {
  A max = -std::numeric_limits<A>::infinity();
  double sum = 0;

  void add_block(const A* x, int64_t n) {
    constexpr int L = kLanes<A>;
    Vec<A> top = splat(-std::numeric_limits<A>::infinity());
    for (int64_t i = 0; i < n; i += L) top = max_of(load<A>(x + i), top);
    const A block_max = max_lanes<A>(top);
    if (block_max > max) {
      sum *= std::exp(double(max) - double(block_max));
      max = block_max;
    }
    // a row that is all -inf so far has no maximum to subtract
    const A base = max == -std::numeric_limits<A>::infinity() ? A(0) : max;
    Vec<A> total{};
    for (int64_t i = 0; i < n; i += L) total += exp_nonpositive<A>(load<A>(x + i) - base);
    sum += sum_lanes<A>(total);
  }
};

template <typename A>
inline RowStats<A> broadcast_stats(const A* stats) {
  return {splat(stats[kMaxS]),    splat(stats[kInvSumS]), splat(stats[kMaxT]),
          splat(stats[kInvSumT]), splat(stats[kDelta]),   splat(stats[kKl])};
}

template <typename A, Divergence kind>
void row_forward_of(const LogitsRow& row, const LossOptions& options, A* loss, A* stats) {
  constexpr int L = kLanes<A>;
  RowReader<A> reader(row, options);
  RunningSum<A> student, teacher;
  reader.each_block([&](const A* s, const A* t, int64_t n, int64_t) {
    student.add_block(s, n);
    teacher.add_block(t, n);
  });
  stats[kMaxS] = student.max;
  stats[kInvSumS] = A(1.0 / student.sum);
  stats[kMaxT] = teacher.max;
  stats[kInvSumT] = A(1.0 / teacher.sum);
  stats[kDelta] = delta_between<A>(student.max, student.sum, teacher.max, teacher.sum);
  stats[kKl] = 0;

  double total = 0, kl = 0;
  const RowStats<A> row_stats = broadcast_stats(stats);
  reader.each_block([&](const A* s, const A* t, int64_t n, int64_t) {
    // four chains: equal terms all round the same way, and a long chain of them adds that up
    Vec<A> block_loss[4] = {}, block_kl[4] = {};
    const auto add = [&](int64_t i, int chain) {
      const auto terms =
          divergence_terms<A, kind>(load<A>(s + i), load<A>(t + i), row_stats, Shares<A>(options.beta));
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
  if (kind == Divergence::kReverse) stats[kKl] = A(total);
  if (kind == Divergence::kJsd) stats[kKl] = A(kl);
}

template <typename A, Divergence kind>
void row_backward_of(const LogitsRow& row, const LossOptions& options, const A* stats, A grad_loss,
                     void* grad) {
  constexpr int L = kLanes<A>;
  const RowStats<A> row_stats = broadcast_stats(stats);
  RowReader<A> reader(row, options);
  reader.each_block([&](const A* s, const A* t, int64_t n, int64_t begin) {
    dispatch_readable<A>(row.student_dtype, [&](auto element) {
      auto* out = static_cast<decltype(element)*>(grad) + begin;
      for (int64_t i = 0; i < n; i += L) {
        const Vec<A> x = load<A>(s + i);
        const auto terms = divergence_terms<A, kind>(x, load<A>(t + i), row_stats, Shares<A>(options.beta));
        const Vec<A> g = grad_of_logit<A>(x, terms.grad, splat(grad_loss), A(options.student_scale),
                                          A(options.student_softcap), A(options.inv_tau));
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
void row_forward(const LogitsRow& row, const LossOptions& options, A* loss, A* stats) {
  with_divergence(options.kind(), [&](auto kind) { row_forward_of<A, kind()>(row, options, loss, stats); });
}

template <typename A>
void row_backward(const LogitsRow& row, const LossOptions& options, const A* stats, A grad_loss, void* grad) {
  with_divergence(options.kind(),
                  [&](auto kind) { row_backward_of<A, kind()>(row, options, stats, grad_loss, grad); });
}

}  // namespace minitron::MINITRON_SIMD
