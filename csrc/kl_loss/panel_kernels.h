// The epilogues of linear_kl_loss on a panel of logits, [rows of the vocabulary, kPanel tokens]: the vocabulary runs
// down, so that a token is a lane. Sums over the vocabulary are then plain vector additions, with no horizontal
// reduction and no remainder, and the panel is already the A operand of dW = dz^T X.
#pragma once

#include "kl_loss/divergence.h"

namespace minitron::MINITRON_SIMD {

template <typename A>
inline void transform_panel(A* panel, int64_t rows, const A* bias, A scale, A softcap, A inv_tau) {
  if (!bias && scale == A(1) && softcap == A(0) && inv_tau == A(1)) return;
  for (int64_t v = 0; v < rows; ++v) {
    const Vec<A> b = splat(bias ? bias[v] : A(0));
    for (int c = 0; c < kPanel; c += kLanes<A>) {
      A* p = panel + v * kPanel + c;
      store(p, transform_logit<A>(load<A>(p) + b, scale, softcap, inv_tau));
    }
  }
}

template <typename A>
inline Vec<A> column_max(const A* column, int64_t rows) {
  Vec<A> top = splat(-std::numeric_limits<A>::infinity());
  for (int64_t v = 0; v < rows; ++v) top = max_of(load<A>(column + v * kPanel), top);
  return top;
}

// Sums over a column in four interleaved chains: shorter chains round less, and the adds overlap.
template <typename A, typename F>
inline Vec<A> column_sum(int64_t rows, F&& term) {
  Vec<A> total[4] = {};
  int64_t v = 0;
  for (; v + 4 <= rows; v += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) total[i] += term(v + i);
  }
  for (; v < rows; ++v) total[0] += term(v);
  return (total[0] + total[1]) + (total[2] + total[3]);
}

template <typename A>
void panel_stats(A* student, A* teacher, int64_t rows, const A* student_bias, const A* teacher_bias,
                 const LossOptions& o, A* partials, int64_t stride) {
  transform_panel<A>(student, rows, student_bias, A(o.student_scale), A(o.student_softcap), A(o.inv_tau));
  transform_panel<A>(teacher, rows, teacher_bias, A(o.teacher_scale), A(o.teacher_softcap), A(o.inv_tau));
  const Divergence kind = o.kind();
  for (int c = 0; c < kPanel; c += kLanes<A>) {
    const A *s = student + c, *t = teacher + c;
    const Vec<A> max_s = column_max<A>(s, rows), max_t = column_max<A>(t, rows);
    // a column that is all -inf has no maximum to subtract; its sum is 0
    const Vec<A> none = splat(-std::numeric_limits<A>::infinity());
    const Vec<A> base_s = max_s == none ? Vec<A>{} : max_s, base_t = max_t == none ? Vec<A>{} : max_t;
    const auto exp_at = [](const A* column, Vec<A> base, int64_t v) {
      return exp_nonpositive<A>(load<A>(column + v * kPanel) - base);
    };
    store(partials + kPartMaxS * stride + c, max_s);
    store(partials + kPartMaxT * stride + c, max_t);
    Vec<A> dot{};
    Vec<A> sum_s, sum_t;
    // the expectation of the log ratio rides along: KL is dot / sum, up to the difference of the two lse
    if (kind == Divergence::kForward) {
      sum_s = column_sum<A>(rows, [&](int64_t v) { return exp_at(s, base_s, v); });
      sum_t = column_sum<A>(rows, [&](int64_t v) {
        const Vec<A> e = exp_at(t, base_t, v);
        dot += weigh<A>(e, load<A>(t + v * kPanel) - load<A>(s + v * kPanel));
        return e;
      });
    } else {
      sum_t = column_sum<A>(rows, [&](int64_t v) { return exp_at(t, base_t, v); });
      sum_s = column_sum<A>(rows, [&](int64_t v) {
        const Vec<A> e = exp_at(s, base_s, v);
        dot += weigh<A>(e, load<A>(s + v * kPanel) - load<A>(t + v * kPanel));
        return e;
      });
    }
    store(partials + kPartSumS * stride + c, sum_s);
    store(partials + kPartSumT * stride + c, sum_t);
    store(partials + kPartDot * stride + c, dot);
  }
}

template <typename A>
inline RowStats<A> load_stats(const A* stats, int64_t stride, int c) {
  const auto at = [&](int which) { return load<A>(stats + which * stride + c); };
  return {at(kMaxS), at(kInvSumS), at(kMaxT), at(kInvSumT), at(kDelta), at(kKl)};
}

// KL(student || mixture) of each token over these rows, which JSD's gradient needs before it can begin, and the loss.
template <typename A>
void panel_kl(const A* student, const A* teacher, int64_t rows, const LossOptions& o, const A* stats, int64_t stride,
              A* kl, A* loss) {
  for (int c = 0; c < kPanel; c += kLanes<A>) {
    const RowStats<A> row = load_stats(stats, stride, c);
    Vec<A> total_kl{};
    store(loss + c, column_sum<A>(rows, [&](int64_t v) {
            const auto terms = divergence_terms<A, Divergence::kJsd>(
                load<A>(student + v * kPanel + c), load<A>(teacher + v * kPanel + c), row, A(o.beta));
            total_kl += terms.kl;
            return terms.loss;
          }));
    store(kl + c, total_kl);
  }
}

template <typename A, Divergence kind>
void panel_grad_of(A* student, const A* teacher, int64_t rows, const LossOptions& o, const A* stats, int64_t stride,
                   const A* row_weight, A* loss) {
  for (int c = 0; c < kPanel; c += kLanes<A>) {
    const RowStats<A> row = load_stats(stats, stride, c);
    const Vec<A> weight = load<A>(row_weight + c);
    store(loss + c, column_sum<A>(rows, [&](int64_t v) {
            A* p = student + v * kPanel + c;
            const Vec<A> s = load<A>(p);
            const auto terms = divergence_terms<A, kind>(s, load<A>(teacher + v * kPanel + c), row, A(o.beta));
            store(p, grad_of_logit<A>(s, terms.grad, weight, A(o.student_scale), A(o.student_softcap),
                                      A(o.inv_tau)));
            return terms.loss;
          }));
  }
}

template <typename A>
void panel_grad(A* student, const A* teacher, int64_t rows, const LossOptions& o, const A* stats, int64_t stride,
                const A* row_weight, A* loss) {
  with_divergence(o.kind(), [&](auto kind) {
    panel_grad_of<A, kind()>(student, teacher, rows, o, stats, stride, row_weight, loss);
  });
}

template <typename A>
void panel_row_sums(const A* panel, int64_t rows, A* row_sums) {
  for (int64_t v = 0; v < rows; ++v) {
    Vec<A> total{};
    for (int c = 0; c < kPanel; c += kLanes<A>) total += load<A>(panel + v * kPanel + c);
    row_sums[v] += sum_lanes<A>(total);
  }
}

}  // namespace minitron::MINITRON_SIMD
