// What linear_kl_loss knows of each token: its tiles of the vocabulary merged into stats and loss, always in
// order and in double, so that the bits do not depend on the threads.
#pragma once

#include <cmath>
#include <limits>

#include "kl_loss/cpu/linear_workspace.h"
#include "kl_loss/cpu/metrics.h"

namespace minitron {

template <typename Op, typename A>
class RowMerger {
 public:
  RowMerger(const LinearProblem& problem, const LinearShape& shape, const Workspace<Op, A>& workspace)
      : problem_(problem), shape_(shape), workspace_(workspace), divergence_(problem.options.divergence()) {}

  // Whether the tiles' own KL is needed: for reverse KL, whose gradient needs that of the row first, and
  // where no gradient pass sums the loss; never for JSD.
  bool needs_tile_kl() const {
    return !needs_second_look(divergence_) &&
           (grad_needs_kl(divergence_) || shape_.plan.schedule == Schedule::kForward);
  }

  // The stats of each token from the partials of its tiles, and its loss where the tiles have their KL.
  void merge_stats(const Chunk& chunk) const {
    A* stats = workspace_.row_stats(chunk);
    parallel_tasks(chunk.padded / kPanel, [&](int64_t panel, int64_t) {
      for (int64_t n = panel * kPanel; n < (panel + 1) * kPanel; ++n) {
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
  void merge_mixture_kl(const Chunk& chunk) const {
    parallel_tasks(chunk.padded / kPanel, [&](int64_t panel, int64_t) {
      for (int64_t n = panel * kPanel; n < (panel + 1) * kPanel; ++n) {
        double kl = 0;
        for (int64_t t = 0; t < shape_.tiles(); ++t) kl += workspace_.tile_kl(chunk, t)[n];
        workspace_.row_stats(chunk)[kKL * chunk.padded + n] = A(kl);
      }
    });
    write_stats(chunk);
    merge_loss(chunk, 0, shape_.tiles());
  }

  // Adds a tile group's part of the loss to that of the groups before it, in double: both schedules give the
  // same bits.
  void merge_loss(const Chunk& chunk, int64_t first_tile, int64_t last_tile) const {
    for (int64_t n = 0; n < chunk.tokens; ++n) {
      double& loss = workspace_.row_losses(chunk)[n];
      if (first_tile == 0) loss = 0;
      for (int64_t t = first_tile; t < last_tile; ++t) loss += workspace_.tile_loss(chunk, t)[n];
      set_loss(chunk, n, loss);
    }
  }

  // In place of merge_stats(): the stats of an earlier call.
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

  // The labels of a chunk, which its tiles look for.
  void load_labels(const Chunk& chunk) const {
    for (int64_t n = 0; shape_.metrics && n < chunk.padded; ++n) {
      workspace_.labels(chunk)[n] =
          problem_.labels && n < chunk.tokens ? problem_.labels[row_of(chunk, n)] : -1;
    }
  }

 private:
  struct MergedSum {
    double max = -std::numeric_limits<double>::infinity(), sum = 0;
    // What a tile's sum is multiplied by; 0 for a tile whose tokens are all masked out, with a maximum of
    // -inf.
    double scale(double tile_max) const { return tile_max == max ? 1.0 : std::exp(tile_max - max); }
  };
  MergedSum merge_sum(const Chunk& chunk, int64_t n, int max_column, int sum_column) const {
    MergedSum merged;
    for (int64_t t = 0; t < shape_.tiles(); ++t) {
      merged.max = std::max(merged.max, double(workspace_.partials(chunk, t)[max_column * chunk.padded + n]));
    }
    for (int64_t t = 0; t < shape_.tiles(); ++t) {
      const A* part = workspace_.partials(chunk, t) + n;
      merged.sum += merged.scale(part[max_column * chunk.padded]) * part[sum_column * chunk.padded];
    }
    return merged;
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

  int64_t row_of(const Chunk& chunk, int64_t n) const { return problem_.valid_tokens[chunk.begin + n]; }
  void set_loss(const Chunk& chunk, int64_t n, double value) const {
    static_cast<A*>(problem_.loss)[row_of(chunk, n)] = A(value);
  }
  A* stats_of(const Chunk& chunk, int64_t n) const {
    return static_cast<A*>(problem_.stats) + row_of(chunk, n) * kNumStats;
  }
  A* metrics_of(const Chunk& chunk, int64_t n) const {
    return static_cast<A*>(problem_.metrics) + row_of(chunk, n) * kNumMetrics;
  }
  void write_stats(const Chunk& chunk) const {
    for (int64_t n = 0; n < chunk.tokens; ++n) {
      for (int which = 0; which < kNumStats; ++which) {
        stats_of(chunk, n)[which] = workspace_.row_stats(chunk)[which * chunk.padded + n];
      }
    }
  }
  // Tokens that only fill up a panel have a weight of 0.
  void load_weights(const Chunk& chunk) const {
    const A* weight = static_cast<const A*>(problem_.row_weight);
    const A* ce_weight = static_cast<const A*>(problem_.ce_weight);
    for (int64_t n = 0; n < chunk.padded; ++n) {
      workspace_.row_weights(chunk)[n] = n >= chunk.tokens ? A(0) : weight ? weight[row_of(chunk, n)] : A(1);
      if (shape_.metrics) {
        workspace_.ce_weights(chunk)[n] = n < chunk.tokens && ce_weight ? ce_weight[row_of(chunk, n)] : A(0);
      }
    }
  }

  const LinearProblem& problem_;
  const LinearShape& shape_;
  const Workspace<Op, A>& workspace_;
  const Divergence divergence_;
};

}  // namespace minitron
