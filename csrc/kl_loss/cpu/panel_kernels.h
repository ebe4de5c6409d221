// The epilogues of linear_kl_loss on a panel of logits, [entries of the vocabulary, kPanel tokens]. The
// vocabulary runs down, so that each lane is a token: sums over the vocabulary are plain vector additions,
// without a horizontal reduction or a remainder, and the panel is already the A operand of dW = dz^T X.
#pragma once

#include <cmath>

#include "kl_loss/cpu/divergence.h"

namespace minitron::MINITRON_SIMD {

template <typename A>
inline void transform_panel(A* panel, int64_t entries, const A* bias, A scale, A softcap, A inv_tau) {
  if (!bias && scale == A(1) && softcap == A(0) && inv_tau == A(1)) return;
  for (int64_t v = 0; v < entries; ++v) {
    const Vec<A> b = splat(bias ? bias[v] : A(0));
    for (int c = 0; c < kPanel; c += kLanes<A>) {
      A* p = panel + v * kPanel + c;
      store(p, transform_logit<A>(load<A>(p) + b, scale, softcap, inv_tau));
    }
  }
}

template <typename A>
inline Vec<A> column_max(const A* column, int64_t entries) {
  Vec<A> top = splat(-std::numeric_limits<A>::infinity());
  for (int64_t v = 0; v < entries; ++v) top = max_of(load<A>(column + v * kPanel), top);
  return top;
}

// Sums over a column in four interleaved chains: shorter chains round less, and their additions overlap.
template <typename A, typename F>
inline Vec<A> column_sum(int64_t entries, F&& term) {
  Vec<A> total[4] = {};
  int64_t v = 0;
  for (; v + 4 <= entries; v += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) total[i] += term(v + i);
  }
  for (; v < entries; ++v) total[0] += term(v);
  return (total[0] + total[1]) + (total[2] + total[3]);
}

template <typename A>
inline RowStats<A> load_stats(const A* stats, int64_t stride, int c) {
  const auto at = [&](int which) { return load<A>(stats + which * stride + c); };
  return {at(kMaxS), at(kInvSumS), at(kMaxT), at(kInvSumT), at(kLseDiff), at(kKL)};
}

// KL of the two distributions over a tile's entries, given that the token is one of them: forward or reverse.
template <typename A>
inline Vec<A> tile_kl(const A* s, const A* t, int64_t entries, Divergence divergence, Vec<A> max_s,
                      Vec<A> sum_s, Vec<A> max_t, Vec<A> sum_t) {
  RowStats<A> row{max_s, A(1) / sum_s, max_t, A(1) / sum_t, Vec<A>{}, Vec<A>{}};
  for (int i = 0; i < kLanes<A>; ++i) {
    row.lse_diff[i] = lse_diff_between<A>(max_s[i], sum_s[i], max_t[i], sum_t[i]);
  }
  const auto sum = [&](auto constant) {
    return column_sum<A>(entries, [&](int64_t v) {
      return divergence_terms<A, constant()>(load<A>(s + v * kPanel), load<A>(t + v * kPanel), row,
                                             Shares<A>(0))
          .loss;
    });
  };
  if (is_of_student(divergence)) {
    return sum(std::integral_constant<Divergence, Divergence::kReverseKL>{});
  }
  return sum(std::integral_constant<Divergence, Divergence::kForwardKL>{});
}

template <typename A>
void panel_stats(A* student, A* teacher, int64_t entries, const A* student_bias, const A* teacher_bias,
                 const LossOptions& o, bool needs_kl, A* partials, int64_t stride) {
  transform_panel<A>(student, entries, student_bias, A(o.student_scale), A(o.student_softcap), A(o.inv_tau));
  transform_panel<A>(teacher, entries, teacher_bias, A(o.teacher_scale), A(o.teacher_softcap), A(o.inv_tau));
  for (int c = 0; c < kPanel; c += kLanes<A>) {
    const auto reduce = [&](const A* column, Vec<A>* max) {
      *max = column_max<A>(column, entries);
      // of a column that is all -inf no maximum can be subtracted; its sum is 0
      const Vec<A> base = *max == -std::numeric_limits<A>::infinity() ? Vec<A>{} : *max;
      return column_sum<A>(
          entries, [&](int64_t v) { return exp_nonpositive<A>(load<A>(column + v * kPanel) - base); });
    };
    Vec<A> max_s, max_t;
    const Vec<A> sum_s = reduce(student + c, &max_s), sum_t = reduce(teacher + c, &max_t);
    store(partials + kPartMaxS * stride + c, max_s);
    store(partials + kPartSumS * stride + c, sum_s);
    store(partials + kPartMaxT * stride + c, max_t);
    store(partials + kPartSumT * stride + c, sum_t);
    store(partials + kPartKL * stride + c,
          needs_kl ? tile_kl<A>(student + c, teacher + c, entries, o.divergence(), max_s, sum_s, max_t, sum_t)
                   : Vec<A>{});
  }
}

// JSD: each token's loss over these entries, and KL(student || mixture), which its gradient needs first.
template <typename A>
void panel_kl(const A* student, const A* teacher, int64_t entries, const LossOptions& o, const A* stats,
              int64_t stride, A* kl, A* loss) {
  for (int c = 0; c < kPanel; c += kLanes<A>) {
    const RowStats<A> row = load_stats(stats, stride, c);
    Vec<A> total_kl{};
    store(loss + c, column_sum<A>(entries, [&](int64_t v) {
            const auto terms = divergence_terms<A, Divergence::kJSD>(
                load<A>(student + v * kPanel + c), load<A>(teacher + v * kPanel + c), row, Shares<A>(o.beta));
            total_kl += terms.kl;
            return terms.loss;
          }));
    store(kl + c, total_kl);
  }
}

template <typename A, Divergence kDivergence>
void panel_grad_of(const A* student, const A* teacher, int64_t entries, const LossOptions& o, const A* stats,
                   int64_t stride, const A* row_weight, A* dz, A* loss) {
  for (int c = 0; c < kPanel; c += kLanes<A>) {
    const RowStats<A> row = load_stats(stats, stride, c);
    const Vec<A> weight = load<A>(row_weight + c);
    store(loss + c, column_sum<A>(entries, [&](int64_t v) {
            const Vec<A> s = load<A>(student + v * kPanel + c);
            const auto terms = divergence_terms<A, kDivergence>(s, load<A>(teacher + v * kPanel + c), row,
                                                                Shares<A>(o.beta));
            store(dz + v * kPanel + c, grad_of_logit<A>(s, terms.grad, weight, A(o.student_scale),
                                                        A(o.student_softcap), A(o.inv_tau)));
            return terms.loss;
          }));
  }
}

template <typename A>
void panel_grad(const A* student, const A* teacher, int64_t entries, const LossOptions& o, const A* stats,
                int64_t stride, const A* row_weight, A* dz, A* loss) {
  with_divergence(o.divergence(), [&](auto constant) {
    panel_grad_of<A, constant()>(student, teacher, entries, o, stats, stride, row_weight, dz, loss);
  });
}

template <typename A>
void panel_entry_sums(const A* panel, int64_t entries, A* sums) {
  for (int64_t v = 0; v < entries; ++v) {
    Vec<A> total{};
    for (int c = 0; c < kPanel; c += kLanes<A>) total += load<A>(panel + v * kPanel + c);
    sums[v] += sum_lanes<A>(total);
  }
}

}  // namespace minitron::MINITRON_SIMD
