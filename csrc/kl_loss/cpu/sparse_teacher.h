// A teacher of k ids a token and one probability for all others: what linear_sparse_kl_loss makes of a panel
// of the student's logits, and of its tokens.
//
// The tiles leave the logits of the ids and the sums of the tail. Once these are merged a token has k + 1
// logits, those of its outcomes, and its divergence and their gradient are kl_loss of a row of them. The
// tail's gradient is spread over its tokens as their probabilities are.
#pragma once

#include "kl_loss/cpu/linear.h"
#include "kl_loss/cpu/metrics.h"
#include "kl_loss/cpu/token_rows.h"

namespace minitron {

struct SparseProblem {
  const int64_t* ids;  // [N, k], ascending in a row, -1 behind them
  int64_t k;
  const void* teacher_outcomes;  // [N, k + 1], accumulate type: log-probabilities up to a constant
  void* student_outcomes;        // [N, k + 1], as in PanelOutcomes
};

template <typename Op, typename A>
class SparseTeacher : public TokenRows<Op, A> {
 public:
  using Rows = TokenRows<Op, A>;
  using Rows::load_weights;

  SparseTeacher(const LinearProblem& problem, const LinearShape& shape, const Workspace<Op, A>& workspace,
                const SparseProblem& sparse)
      : Rows(problem, shape, workspace), sparse_(sparse), kernels_(cpu_kernels().kl<A>()) {
    row_options_.beta = problem.options.beta;
  }

  void reduce(const Chunk& chunk, const Tile& tile, int64_t panel, const PanelLogits<A>& logits,
              bool first_look) const {
    const A* bias = static_cast<const A*>(problem_.student_bias);
    const int64_t n = panel * kPanel;
    kernels_.sparse_panel_stats(
        logits.student, {tile.entries, chunk.width(panel)}, bias ? bias + tile.begin : nullptr,
        problem_.options, outcomes_of(chunk, tile, panel), first_look,
        workspace_.partials(chunk, tile.index) + n, chunk.padded, workspace_.panel_labels(chunk, tile, panel),
        shape_.metrics && first_look ? workspace_.metric_state(chunk, tile.index) + n : nullptr);
  }

  // The last outcome of each token from its tiles, its metrics, its loss, and the gradient to its outcomes.
  void merge(const Chunk& chunk) const {
    each_token(chunk, [&](int64_t n) {
      A* outcomes = student_outcomes(chunk, n);
      const int64_t* ids = ids_of(chunk, n);
      for (int64_t i = 0; i < sparse_.k; ++i) {
        if (ids[i] < 0) outcomes[i] = -std::numeric_limits<A>::infinity();
      }
      const MergedSum tail = merge_sum(shape_, workspace_, chunk, n, kPartMaxS, kPartSumS);
      outcomes[sparse_.k] = A(tail.max + std::log(tail.sum));
      if (shape_.metrics) merge_metrics(chunk, n, tail.max);
      divide(chunk, n);
    });
  }

  // In place of merge(): the outcomes, and metrics, of an earlier call.
  void load_stats(const Chunk& chunk) const {
    each_token(chunk, [&](int64_t n) {
      if (shape_.metrics) lse_y(chunk)[n] = metrics_of(chunk, n)[kInvSumY];
      divide(chunk, n);
    });
  }

  bool looks_again() const { return false; }
  void look_again(const Chunk&, const Tile&, int64_t, const PanelLogits<A>&) const {}
  void merge_again(const Chunk&) const {}
  void merge_grads(const Chunk&, int64_t, int64_t) const {}

  void grad(const Chunk& chunk, const Tile& tile, int64_t panel, const PanelLogits<A>& logits, A* dz) const {
    const int64_t n = panel * kPanel;
    PanelCrossEntropy<A> ce{};
    if (problem_.ce_weight) {
      ce = {workspace_.panel_labels(chunk, tile, panel), lse_y(chunk) + n, workspace_.ce_weights(chunk) + n,
            problem_.total_vocab};
    }
    kernels_.sparse_panel_grad(
        logits.student, {tile.entries, chunk.width(panel)}, problem_.options, outcomes_of(chunk, tile, panel),
        {tail_lse(chunk) + n, tail_grad(chunk) + n, grads(chunk, n)}, problem_.ce_weight ? &ce : nullptr, dz);
  }

 private:
  using Rows::metrics_of;
  using Rows::problem_;
  using Rows::row_of;
  using Rows::set_loss;
  using Rows::shape_;
  using Rows::workspace_;

  // Runs of a chunk's tokens, in the place of a dense teacher's stats.
  A* tail_lse(const Chunk& chunk) const { return workspace_.row_stats(chunk); }
  A* tail_grad(const Chunk& chunk) const { return tail_lse(chunk) + chunk.padded; }
  A* lse_y(const Chunk& chunk) const { return workspace_.inv_sum_y(chunk); }
  A* grads(const Chunk& chunk, int64_t n) const {
    return workspace_.outcome_grads(chunk) + n * (sparse_.k + 1);
  }
  const int64_t* ids_of(const Chunk& chunk, int64_t n) const {
    return sparse_.ids + row_of(chunk, n) * sparse_.k;
  }
  A* student_outcomes(const Chunk& chunk, int64_t n) const {
    return static_cast<A*>(sparse_.student_outcomes) + row_of(chunk, n) * (sparse_.k + 1);
  }
  PanelOutcomes<A> outcomes_of(const Chunk& chunk, const Tile& tile, int64_t panel) const {
    const int64_t n = panel * kPanel;
    return {sparse_.ids,
            static_cast<A*>(sparse_.student_outcomes),
            problem_.valid_tokens.data() + chunk.begin + n,
            std::min<int64_t>(kPanel, chunk.tokens - n),
            sparse_.k,
            tile.begin};
  }

  template <typename F>
  void each_token(const Chunk& chunk, F&& f) const {
    load_weights(chunk);
    parallel_tasks(chunk.panels(), [&](int64_t panel, int64_t) {
      for (int64_t n = panel * kPanel; n < panel * kPanel + chunk.width(panel); ++n) {
        if (n < chunk.tokens) {
          f(n);
          continue;
        }
        // only fills up the panel: of any logit exp(s - this) is 0
        tail_lse(chunk)[n] = std::numeric_limits<A>::max() / 2;
        tail_grad(chunk)[n] = 0;
        if (shape_.metrics) lse_y(chunk)[n] = tail_lse(chunk)[n];
      }
    });
  }

  // The loss of a token from its outcomes, and its gradient to them.
  void divide(const Chunk& chunk, int64_t n) const {
    const A* outcomes = student_outcomes(chunk, n);
    const A* teacher = static_cast<const A*>(sparse_.teacher_outcomes) + row_of(chunk, n) * (sparse_.k + 1);
    const LogitsRow row{outcomes, teacher, kDTypeOf<A>, kDTypeOf<A>, sparse_.k + 1};
    A loss, stats[kNumStats];
    kernels_.row_forward(row, row_options_, &loss, stats, nullptr, nullptr);
    set_loss(chunk, n, loss);
    if (!shape_.has_grad()) return;
    const A weight = workspace_.row_weights(chunk)[n];
    if (weight == A(0)) {  // leaves the divergence out, even if its gradient is not finite
      std::fill_n(grads(chunk, n), sparse_.k + 1, A(0));
    } else {
      kernels_.row_backward(row, row_options_, stats, weight, nullptr, grads(chunk, n));
    }
    tail_lse(chunk)[n] = outcomes[sparse_.k];
    tail_grad(chunk)[n] = grads(chunk, n)[sparse_.k];
  }

  // Those of the tail, tile by tile, and of the ids, all measured from the largest logit.
  void merge_metrics(const Chunk& chunk, int64_t n, double tail_max) const {
    const double tau = 1 / problem_.options.inv_tau;
    const A* outcomes = student_outcomes(chunk, n);
    const int64_t* ids = ids_of(chunk, n);
    double max = tail_max, label = -std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < sparse_.k; ++i) max = std::max(max, double(outcomes[i]));
    const auto distance = [&](double s) { return s == max ? 0.0 : (s - max) * tau; };

    MetricSums merged;
    int64_t i = 0;
    for (int64_t t = 0; t < shape_.tiles(); ++t) {
      const Tile tile = shape_.tile(t);
      int64_t tokens = tile.entries;
      for (; i < sparse_.k && ids[i] >= 0 && ids[i] < tile.begin + tile.entries; ++i) --tokens;
      const A* state = workspace_.metric_state(chunk, t) + n;
      const auto at = [&](int which) { return double(state[which * chunk.padded]); };
      merged.add(MetricSums{at(kStateSumY), at(kStateDotY), at(kStateTotalY)}.measured_from(
          distance(workspace_.partials(chunk, t)[kPartMaxS * chunk.padded + n]), tokens));
      label = std::max(label, at(kStateLabel));
    }
    for (i = 0; i < sparse_.k && ids[i] >= 0; ++i) {
      merged.add(MetricSums{1, 0, 0}.measured_from(distance(outcomes[i]), 1));
      if (!(outcomes[i] > -std::numeric_limits<A>::infinity())) merged.total = outcomes[i];
    }
    A* metrics = metrics_of(chunk, n);
    write_metrics<A>(merged, problem_.labels != nullptr, (label - max) * tau,
                     problem_.options.label_smoothing, problem_.total_vocab, metrics);
    metrics[kInvSumY] = A(max * tau + std::log(merged.sum));  // log sum exp y
    lse_y(chunk)[n] = metrics[kInvSumY];
  }

  const SparseProblem& sparse_;
  const KlKernels<A>& kernels_;
  LossOptions row_options_;
};

}  // namespace minitron
