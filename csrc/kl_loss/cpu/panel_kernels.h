// The epilogues of linear_kl_loss on a panel of logits, [entries of the vocabulary, kPanel tokens]. The
// vocabulary runs down, so that each lane is a token: sums over the vocabulary are plain vector additions,
// without a horizontal reduction or a remainder, and the panel is already the A operand of dW = dz^T X.
#pragma once

#include <cmath>

#include "kl_loss/cpu/divergence.h"
#include "kl_loss/cpu/metrics.h"

namespace minitron::MINITRON_SIMD {

template <typename A>
inline void transform_panel(A* panel, PanelSize size, const A* bias, A scale, A softcap, A inv_tau) {
  if (!bias && scale == A(1) && softcap == A(0) && inv_tau == A(1)) return;
  for (int64_t v = 0; v < size.entries; ++v) {
    const Vec<A> b = splat(bias ? bias[v] : A(0));
    for (int c = 0; c < size.lanes; c += kLanes<A>) {
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

// A column's maximum and sum of exp.
template <typename A>
inline Vec<A> reduce_column(const A* column, int64_t entries, Vec<A>* max) {
  *max = column_max<A>(column, entries);
  // of a column that is all -inf no maximum can be subtracted; its sum is 0
  const Vec<A> base = *max == -std::numeric_limits<A>::infinity() ? Vec<A>{} : *max;
  return column_sum<A>(entries,
                       [&](int64_t v) { return exp_nonpositive<A>(load<A>(column + v * kPanel) - base); });
}

// That, and with the same exponentials at temperature 1, else with others beside them, the sums of
// MetricState but for the label's logit.
template <typename A, AtUnitTemperature kY>
inline Vec<A> reduce_column_with_metrics(const A* column, int64_t entries, A tau, Vec<A>* max, A* state,
                                         int64_t stride) {
  *max = column_max<A>(column, entries);
  const Vec<A> base = *max == -std::numeric_limits<A>::infinity() ? Vec<A>{} : *max;
  Vec<A> sum_y[2] = {}, dot_y[2] = {}, total_y[2] = {};  // in two chains each: four would not fit registers
  const Vec<A> sum_s = column_sum<A>(entries, [&](int64_t v) {
    const Vec<A> x = load<A>(column + v * kPanel) - base, e = exp_nonpositive<A>(x);
    if constexpr (kY == AtUnitTemperature::kShared) {
      dot_y[v & 1] += weigh<A>(e, x);
      total_y[v & 1] += x;
    } else {
      const Vec<A> y = x * tau, e_y = exp_nonpositive<A>(y);
      sum_y[v & 1] += e_y;
      dot_y[v & 1] += weigh<A>(e_y, y);
      total_y[v & 1] += y;
    }
    return e;
  });
  store(state + kStateSumY * stride, kY == AtUnitTemperature::kShared ? sum_s : sum_y[0] + sum_y[1]);
  store(state + kStateDotY * stride, dot_y[0] + dot_y[1]);
  store(state + kStateTotalY * stride, total_y[0] + total_y[1]);
  return sum_s;
}

template <typename A, AtUnitTemperature kY>
void panel_stats_of(const A* student, const A* teacher, PanelSize size, const LossOptions& o, bool needs_kl,
                    A* partials, int64_t stride, A* metric_state) {
  for (int c = 0; c < size.lanes; c += kLanes<A>) {
    Vec<A> max_s, sum_s, max_t;
    if constexpr (kY == AtUnitTemperature::kNothing) {
      sum_s = reduce_column<A>(student + c, size.entries, &max_s);
    } else {
      sum_s = reduce_column_with_metrics<A, kY>(student + c, size.entries, A(1 / o.inv_tau), &max_s,
                                                metric_state + c, stride);
    }
    const Vec<A> sum_t = reduce_column<A>(teacher + c, size.entries, &max_t);
    store(partials + kPartMaxS * stride + c, max_s);
    store(partials + kPartSumS * stride + c, sum_s);
    store(partials + kPartMaxT * stride + c, max_t);
    store(partials + kPartSumT * stride + c, sum_t);
    store(partials + kPartKL * stride + c, needs_kl ? tile_kl<A>(student + c, teacher + c, size.entries,
                                                                 o.divergence(), max_s, sum_s, max_t, sum_t)
                                                    : Vec<A>{});
  }
}

// The logits of the labels; -inf where a token's is not in the panel.
template <typename A>
inline void take_labels(const A* student, PanelSize size, const PanelLabels& labels, A* out) {
  for (int c = 0; c < size.lanes; ++c) {
    const int64_t v = labels.labels[c] - labels.first_token;
    out[c] = v >= 0 && v < size.entries ? student[v * kPanel + c] : -std::numeric_limits<A>::infinity();
  }
}

template <typename A>
void panel_stats(A* student, A* teacher, PanelSize size, const A* student_bias, const A* teacher_bias,
                 const LossOptions& o, bool needs_kl, A* partials, int64_t stride, const PanelLabels& labels,
                 A* metric_state) {
  transform_panel<A>(student, size, student_bias, A(o.student_scale), A(o.student_softcap), A(o.inv_tau));
  transform_panel<A>(teacher, size, teacher_bias, A(o.teacher_scale), A(o.teacher_softcap), A(o.inv_tau));
  with_unit_temperature(metric_state != nullptr, o, [&](auto y) {
    panel_stats_of<A, y()>(student, teacher, size, o, needs_kl, partials, stride, metric_state);
  });
  if (metric_state) take_labels(student, size, labels, metric_state + kStateLabel * stride);
}

// JSD: each token's loss over these entries, and KL(student || mixture), which its gradient needs first.
template <typename A>
void panel_kl(const A* student, const A* teacher, PanelSize size, const LossOptions& o, const A* stats,
              int64_t stride, A* kl, A* loss) {
  for (int c = 0; c < size.lanes; c += kLanes<A>) {
    const RowStats<A> row = load_stats(stats, stride, c);
    Vec<A> total_kl{};
    store(loss + c, column_sum<A>(size.entries, [&](int64_t v) {
            const auto terms = divergence_terms<A, Divergence::kJSD>(
                load<A>(student + v * kPanel + c), load<A>(teacher + v * kPanel + c), row, Shares<A>(o.beta));
            total_kl += terms.kl;
            return terms.loss;
          }));
    store(kl + c, total_kl);
  }
}

template <typename A, Divergence kDivergence, AtUnitTemperature kY>
void panel_grad_of(const A* student, const A* teacher, int64_t ahead, PanelSize size, const LossOptions& o,
                   const A* stats, int64_t stride, const A* row_weight, const PanelCrossEntropy<A>* ce, A* dz,
                   A* loss) {
  const A tau = A(1 / o.inv_tau);
  const Vec<A> spread = splat(
      kY == AtUnitTemperature::kNothing ? A(0) : TargetShares<A>(o.label_smoothing, ce->total_vocab).spread);
  for (int c = 0; c < size.lanes; c += kLanes<A>) {
    const RowStats<A> row = load_stats(stats, stride, c);
    const Vec<A> weight = load<A>(row_weight + c);
    Vec<A> ce_weight{}, inv_sum_y{};
    if constexpr (kY != AtUnitTemperature::kNothing) {
      ce_weight = load<A>(ce->weight + c) * tau;
      inv_sum_y = load<A>(ce->inv_sum_y + c);
    }
    store(loss + c, column_sum<A>(size.entries, [&](int64_t v) {
            const int64_t part =
                ahead + c * size.entries + v * kLanes<A>;  // the passes over c fetch all of it
            __builtin_prefetch(student + part);
            __builtin_prefetch(teacher + part);
            const Vec<A> s = load<A>(student + v * kPanel + c);
            const auto terms = divergence_terms<A, kDivergence>(s, load<A>(teacher + v * kPanel + c), row,
                                                                Shares<A>(o.beta));
            Vec<A> mixed = terms.grad * weight;
            if constexpr (kY != AtUnitTemperature::kNothing) {
              mixed = mixed_grad<A, kY>(s, terms, weight, row.max_s, inv_sum_y, ce_weight, spread, tau);
            }
            store(dz + v * kPanel + c,
                  grad_of_logit<A>(s, mixed, A(o.student_scale), A(o.student_softcap), A(o.inv_tau)));
            return terms.loss;
          }));
  }
}

// What the labels add to a panel's dz, of which there is at most one a token.
template <typename A>
inline void subtract_labels(const A* student, PanelSize size, const LossOptions& o,
                            const PanelCrossEntropy<A>& ce, A* dz) {
  const A share = TargetShares<A>(o.label_smoothing, ce.total_vocab).label * A(1 / o.inv_tau);
  for (int c = 0; c < size.lanes; ++c) {
    const int64_t v = ce.labels.labels[c] - ce.labels.first_token;
    if (v < 0 || v >= size.entries) continue;
    const Vec<A> g = grad_of_logit<A>(splat(student[v * kPanel + c]), splat(ce.weight[c] * share),
                                      A(o.student_scale), A(o.student_softcap), A(o.inv_tau));
    dz[v * kPanel + c] -= g[0];
  }
}

template <typename A>
void panel_grad(const A* student, const A* teacher, int64_t ahead, PanelSize size, const LossOptions& o,
                const A* stats, int64_t stride, const A* row_weight, const PanelCrossEntropy<A>* ce, A* dz,
                A* loss) {
  with_divergence(o.divergence(), [&](auto divergence) {
    with_unit_temperature(ce != nullptr, o, [&](auto y) {
      panel_grad_of<A, divergence(), y()>(student, teacher, ahead, size, o, stats, stride, row_weight, ce, dz,
                                          loss);
    });
  });
  if (ce) subtract_labels<A>(student, size, o, *ce, dz);
}

template <typename A>
void panel_entry_sums(const A* panel, PanelSize size, A* sums) {
  for (int64_t v = 0; v < size.entries; ++v) {
    Vec<A> total{};
    for (int c = 0; c < size.lanes; c += kLanes<A>) total += load<A>(panel + v * kPanel + c);
    sums[v] += sum_lanes<A>(total);
  }
}

}  // namespace minitron::MINITRON_SIMD
