// kl_loss on rows of logits. A row is read in blocks that stay in the L1 cache: once for its normalisers,
// once for the loss (out of the caches), and once more in the backward. The only result of size [N, V] is the
// gradient.
#pragma once

#include <cmath>

#include "kl_loss/cpu/divergence.h"

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
    Vec<A> top = splat(-std::numeric_limits<A>::infinity());
    for (int64_t i = 0; i < n; i += L) top = max_of(load<A>(x + i), top);
    const A block_max = max_lanes<A>(top);
    if (block_max > max) {
      sum *= std::exp(double(max) - double(block_max));
      max = block_max;
    }
    // of a row that is all -inf so far no maximum can be subtracted
    const A base = max == -std::numeric_limits<A>::infinity() ? A(0) : max;
    Vec<A> total{};
    for (int64_t i = 0; i < n; i += L) total += exp_nonpositive<A>(load<A>(x + i) - base);
    sum += sum_lanes<A>(total);
  }
};

template <typename A>
inline RowStats<A> broadcast_stats(const A* stats) {
  return {splat(stats[kMaxS]),    splat(stats[kInvSumS]), splat(stats[kMaxT]),
          splat(stats[kInvSumT]), splat(stats[kLseDiff]), splat(stats[kKL])};
}

template <typename A, Divergence kDivergence>
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
  stats[kLseDiff] = lse_diff_between<A>(student.max, student.sum, teacher.max, teacher.sum);
  stats[kKL] = 0;

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

template <typename A, Divergence kDivergence>
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
        const auto terms =
            divergence_terms<A, kDivergence>(x, load<A>(t + i), row_stats, Shares<A>(options.beta));
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
  with_divergence(options.divergence(),
                  [&](auto constant) { row_forward_of<A, constant()>(row, options, loss, stats); });
}

template <typename A>
void row_backward(const LogitsRow& row, const LossOptions& options, const A* stats, A grad_loss, void* grad) {
  with_divergence(options.divergence(), [&](auto constant) {
    row_backward_of<A, constant()>(row, options, stats, grad_loss, grad);
  });
}

}  // namespace minitron::MINITRON_SIMD
