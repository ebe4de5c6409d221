// What linear_kl_loss knows of each token: its tiles of the vocabulary merged into stats and loss, always in
// order and in double, so that the bits do not depend on the threads.
#pragma once

#include <cmath>
#include <limits>

#include "kl_loss/cpu/metrics.h"
#include "kl_loss/cpu/token_rows.h"

namespace minitron {

template <typename Op, typename A>
class RowMerger : public TokenRows<Op, A> {
 public:
  using Rows = TokenRows<Op, A>;
  using Rows::load_weights;

  RowMerger(const LinearProblem& problem, const LinearShape& shape, const Workspace<Op, A>& workspace)
      : Rows(problem, shape, workspace), divergence_(problem.options.divergence()) {}

  // Whether the tiles' own KL is needed: for reverse KL, whose gradient needs that of the row first, and
  // where no gradient pass sums the loss; never for JSD.
  bool needs_tile_kl() const {
    return !needs_second_look(divergence_) &&
           (grad_needs_kl(divergence_) || shape_.plan.schedule == Schedule::kForward);
  }

  // The stats of each token from the partials of its tiles, and its loss where the tiles have their KL.
  void merge(const Chunk& chunk) const {
    A* stats = workspace_.row_stats(chunk);
    parallel_tasks(chunk.panels(), [&](int64_t panel, int64_t) {
      for (int64_t n = panel * kPanel; n < panel * kPanel + chunk.width(panel); ++n) {
        const MergedSum student = merge_sum(chunk, n, kPartMaxS, kPartSumS);
        const MergedSum teacher = merge_sum(chunk, n, kPartMaxT, kPartSumT);
        const double kl = needs_tile_kl() ? merge_kl(chunk, n, student, teacher) : 0.0;
        const auto set = [&](int which, double value) { stats[which * chunk.padded + n] = A(value); };
        set(kMaxS, student.max);
        set(kInvSumS, 1 / student.sum);
        set(kMaxT, teacher.max);
        set(kInvSumT, 1 / teacher.sum);
        set(kLseDiff, lse_diff_between<A>(A(student.max), student.sum, A(teacher.max), teacher.sum));
        set(kKL, grad_needs_kl(divergence_) ? kl : 0.0);
        if (n < chunk.tokens) set_loss(chunk, n, kl);
        if (shape_.metrics) merge_metrics(chunk, n, student.max);
      }
    });
    write_stats(chunk);
    load_weights(chunk);
  }

  // JSD: KL(S || M) of each token from its tiles, and the loss.
  void merge_again(const Chunk& chunk) const {
    parallel_tasks(chunk.panels(), [&](int64_t panel, int64_t) {
      for (int64_t n = panel * kPanel; n < panel * kPanel + chunk.width(panel); ++n) {
        double kl = 0;
        for (int64_t t = 0; t < shape_.tiles(); ++t) kl += workspace_.tile_kl(chunk, t)[n];
        workspace_.row_stats(chunk)[kKL * chunk.padded + n] = A(kl);
      }
    });
    write_stats(chunk);
    merge_grads(chunk, 0, shape_.tiles());
  }

  // Adds a tile group's part of the loss to that of the groups before it, in double: both schedules give the
  // same bits.
  void merge_grads(const Chunk& chunk, int64_t first_tile, int64_t last_tile) const {
    for (int64_t n = 0; n < chunk.tokens; ++n) {
      double& loss = workspace_.row_losses(chunk)[n];
      if (first_tile == 0) loss = 0;
      for (int64_t t = first_tile; t < last_tile; ++t) loss += workspace_.tile_loss(chunk, t)[n];
      set_loss(chunk, n, loss);
    }
  }

  // In place of merge(): the stats of an earlier call.
  void load_stats(const Chunk& chunk) const {
    for (int64_t n = 0; n < chunk.padded; ++n) {
      for (int which = 0; which < kNumStats; ++which) {
        workspace_.row_stats(chunk)[which * chunk.padded + n] =
            n < chunk.tokens ? stats_of(chunk, n)[which] : A(0);
      }
      if (shape_.metrics) {
        workspace_.inv_sum_y(chunk)[n] = n < chunk.tokens ? metrics_of(chunk, n)[kInvSumY] : A(0);
      }
    }
    load_weights(chunk);
  }

 protected:
  using Rows::metrics_of;
  using Rows::problem_;
  using Rows::row_of;
  using Rows::set_loss;
  using Rows::shape_;
  using Rows::workspace_;

  MergedSum merge_sum(const Chunk& chunk, int64_t n, int max_column, int sum_column) const {
    return minitron::merge_sum(shape_, workspace_, chunk, n, max_column, sum_column);
  }

  // The tiles' sums at temperature 1, each measured from its own maximum.
  void merge_metrics(const Chunk& chunk, int64_t n, double max) const {
    const double tau = 1 / problem_.options.inv_tau;
    MetricSums merged;
    double label = -std::numeric_limits<double>::infinity();
    for (int64_t t = 0; t < shape_.tiles(); ++t) {
      const A* state = workspace_.metric_state(chunk, t) + n;
      const double tile_max = workspace_.partials(chunk, t)[kPartMaxS * chunk.padded + n];
      const auto at = [&](int which) { return double(state[which * chunk.padded]); };
      const double distance = tile_max == max ? 0.0 : (tile_max - max) * tau;
      merged.add(MetricSums{at(kStateSumY), at(kStateDotY), at(kStateTotalY)}.measured_from(
          distance, shape_.tile(t).entries));
      label = std::max(label, at(kStateLabel));
    }
    A metrics[kNumMetrics];
    write_metrics<A>(merged, problem_.labels != nullptr, (label - max) * tau,
                     problem_.options.label_smoothing, problem_.total_vocab, metrics);
    workspace_.inv_sum_y(chunk)[n] = metrics[kInvSumY];
    if (n < chunk.tokens) std::copy_n(metrics, int(kNumMetrics), metrics_of(chunk, n));
  }

  // The chain rule of KL over tiles, each term >= 0. The ratio of a tile's two probabilities is taken of
  // their logarithms, which exist however small the probabilities are; only a tile whose tokens are all
  // masked out has none. As for single tokens, a probability below the smallest normal A is 0, even if the
  // ratio is infinite.
  double merge_kl(const Chunk& chunk, int64_t n, const MergedSum& student, const MergedSum& teacher) const {
    double kl = 0;
    for (int64_t t = 0; t < shape_.tiles(); ++t) {
      const A* part = workspace_.partials(chunk, t) + n;
      TileMass x = tile_mass(teacher, part[kPartMaxT * chunk.padded], part[kPartSumT * chunk.padded]);
      TileMass y = tile_mass(student, part[kPartMaxS * chunk.padded], part[kPartSumS * chunk.padded]);
      if (is_of_student(divergence_)) std::swap(x, y);
      if (x.mass < std::numeric_limits<A>::min()) {
        kl += y.mass;
      } else if (y.masked_out) {
        kl += x.mass * std::numeric_limits<double>::infinity() + y.mass;
      } else {
        const double log_ratio = (x.below - y.below) + std::log(x.share / y.share);
        kl += x.mass * (log_ratio + part[kPartKL * chunk.padded]) + (y.mass - x.mass);
      }
    }
    return kl;
  }

  // A tile's part of the row's probability: mass = exp(below) * share.
  struct TileMass {
    double mass, below, share;
    bool masked_out;
  };
  static TileMass tile_mass(const MergedSum& row, double tile_max, double tile_sum) {
    const double share = tile_sum / row.sum;
    return {row.scale(tile_max) * share, tile_max - row.max, share,
            !(tile_max > -std::numeric_limits<double>::infinity() || tile_sum != 0)};
  }

  A* stats_of(const Chunk& chunk, int64_t n) const {
    return static_cast<A*>(problem_.stats) + row_of(chunk, n) * kNumStats;
  }
  void write_stats(const Chunk& chunk) const {
    for (int64_t n = 0; n < chunk.tokens; ++n) {
      for (int which = 0; which < kNumStats; ++which) {
        stats_of(chunk, n)[which] = workspace_.row_stats(chunk)[which * chunk.padded + n];
      }
    }
  }

  const Divergence divergence_;
};

}  // namespace minitron
