// The epilogues of linear_sparse_kl_loss on a panel of the student's logits. The ids' logits are taken out
// and -inf is left in their place, as a masked-out token has it: what the panel then sums to is the tail, out
// of positive terms. Nothing is subtracted from a sum over the vocabulary.
#pragma once

#include "kl_loss/cpu/panel_kernels.h"

namespace minitron::MINITRON_SIMD {

// Calls f(token of the panel, place among its ids, entry of the panel) for each id that is in the panel.
template <typename A, typename F>
inline void each_id(const PanelOutcomes<A>& outcomes, int64_t entries, F&& f) {
  const uint64_t first = outcomes.first_token, last = first + entries;
  for (int64_t c = 0; c < outcomes.tokens; ++c) {
    const int64_t* ids = outcomes.ids + outcomes.rows[c] * outcomes.k;
    // the first id that is not before the panel; -1, behind the ids, is the largest of all numbers
    int64_t low = 0;
    for (int64_t high = outcomes.k; low < high;) {
      const int64_t middle = (low + high) / 2;
      if (uint64_t(ids[middle]) < first) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    for (; low < outcomes.k && uint64_t(ids[low]) < last; ++low) f(c, low, int64_t(ids[low] - first));
  }
}

// kStateTotalY of the tail: -inf in a column is an id, or a token that is masked out, whose y is -inf.
template <typename A>
inline void total_of_tail(const A* panel, PanelSize size, A tau, const A* max, const int64_t* ids, A* out) {
  for (int c = 0; c < size.lanes; c += kLanes<A>) {
    const Vec<A> top = load<A>(max + c), lowest = splat(-std::numeric_limits<A>::infinity());
    const Vec<A> base = top == lowest ? Vec<A>{} : top;
    Vec<A> gone{};
    store(out + c, column_sum<A>(size.entries, [&](int64_t v) {
            const Vec<A> x = load<A>(panel + v * kPanel + c);
            gone += x == lowest ? splat(A(1)) : Vec<A>{};
            return x == lowest ? Vec<A>{} : (x - base) * tau;
          }));
    for (int i = 0; i < kLanes<A>; ++i) {
      if (int64_t(gone[i]) > ids[c + i]) out[c + i] = lowest[i];
    }
  }
}

template <typename A>
void sparse_panel_stats(A* student, PanelSize size, const A* bias, const LossOptions& o,
                        const PanelOutcomes<A>& outcomes, bool write, A* partials, int64_t stride,
                        const PanelLabels& labels, A* metric_state) {
  transform_panel<A>(student, size, bias, A(o.student_scale), A(o.student_softcap), A(o.inv_tau));
  if (metric_state) take_labels(student, size, labels, metric_state + kStateLabel * stride);
  int64_t taken[kPanel] = {};
  each_id(outcomes, size.entries, [&](int64_t c, int64_t i, int64_t v) {
    A& logit = student[v * kPanel + c];
    if (write) outcomes.student[outcomes.rows[c] * (outcomes.k + 1) + i] = logit;
    logit = -std::numeric_limits<A>::infinity();
    ++taken[c];
  });
  const A tau = A(1 / o.inv_tau);
  A* max = partials + kPartMaxS * stride;
  with_unit_temperature(metric_state != nullptr, o, [&](auto y) {
    for (int c = 0; c < size.lanes; c += kLanes<A>) {
      Vec<A> max_s, sum_s;
      if constexpr (y() == AtUnitTemperature::kNothing) {
        sum_s = reduce_column<A>(student + c, size.entries, &max_s);
      } else {
        sum_s = reduce_column_with_metrics<A, y()>(student + c, size.entries, tau, &max_s, metric_state + c,
                                                   stride);
      }
      store(max + c, max_s);
      store(partials + kPartSumS * stride + c, sum_s);
    }
  });
  if (metric_state && o.label_smoothing > 0) {
    total_of_tail<A>(student, size, tau, max, taken, metric_state + kStateTotalY * stride);
  }
}

template <typename A, AtUnitTemperature kY>
void grad_of_tail(const A* student, PanelSize size, const LossOptions& o, const PanelOutcomeGrads<A>& of,
                  const PanelCrossEntropy<A>* ce, A* dz) {
  const A tau = A(1 / o.inv_tau);
  for (int c = 0; c < size.lanes; c += kLanes<A>) {
    const Vec<A> lse = load<A>(of.tail_lse + c), g = load<A>(of.tail_grad + c);
    Vec<A> ce_weight{}, lse_y{}, share{}, spread{};
    if constexpr (kY != AtUnitTemperature::kNothing) {
      ce_weight = load<A>(ce->weight + c) * tau;
      lse_y = load<A>(ce->inv_sum_y + c);
      share = exp_nonpositive<A>(lse - lse_y);  // the tail's, of all probability
      spread = splat(TargetShares<A>(o.label_smoothing, ce->total_vocab).spread);
    }
    for (int64_t v = 0; v < size.entries; ++v) {
      const Vec<A> s = load<A>(student + v * kPanel + c), p = exp_nonpositive<A>(s - lse);
      Vec<A> mixed = g * p;
      if constexpr (kY == AtUnitTemperature::kShared) mixed += (p * share - spread) * ce_weight;
      if constexpr (kY == AtUnitTemperature::kOwn) {
        mixed += (exp_nonpositive<A>(s * tau - lse_y) - spread) * ce_weight;
      }
      store(dz + v * kPanel + c,
            grad_of_logit<A>(s, mixed, A(o.student_scale), A(o.student_softcap), A(o.inv_tau)));
    }
  }
}

template <typename A>
void sparse_panel_grad(const A* student, PanelSize size, const LossOptions& o,
                       const PanelOutcomes<A>& outcomes, const PanelOutcomeGrads<A>& of,
                       const PanelCrossEntropy<A>* ce, A* dz) {
  with_unit_temperature(ce != nullptr, o,
                        [&](auto y) { grad_of_tail<A, y()>(student, size, o, of, ce, dz); });
  if (ce) subtract_labels<A>(student, size, o, *ce, dz);  // those of the tail
  const TargetShares<A> shares(o.label_smoothing, ce ? ce->total_vocab : 1);
  const A tau = A(1 / o.inv_tau);
  each_id(outcomes, size.entries, [&](int64_t c, int64_t i, int64_t v) {
    const A s = outcomes.student[outcomes.rows[c] * (outcomes.k + 1) + i];
    A g = of.grads[c * (outcomes.k + 1) + i];
    if (ce) {
      const bool is_label = ce->labels.labels[c] == outcomes.first_token + v;
      const A p = exp_nonpositive<A>(splat(s * tau - ce->inv_sum_y[c]))[0];
      g += (p - shares.spread - (is_label ? shares.label : A(0))) * (ce->weight[c] * tau);
    }
    dz[v * kPanel + c] =
        grad_of_logit<A>(splat(s), splat(g), A(o.student_scale), A(o.student_softcap), A(o.inv_tau))[0];
  });
}

}  // namespace minitron::MINITRON_SIMD
