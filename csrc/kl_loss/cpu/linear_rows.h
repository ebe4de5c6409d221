// What linear_kl_loss knows of each row: tiles of the vocabulary merged into stats and loss, always in order
// and in double, so that the bits do not depend on the threads.
#pragma once

#include <cmath>
#include <limits>

#include "kl_loss/cpu/linear_workspace.h"

namespace minitron {

template <typename Op, typename A>
class LinearRows : protected LinearBuffers<Op, A> {
 protected:
  using Base = LinearBuffers<Op, A>;
  using Base::Base, Base::p_, Base::s_, Base::partials, Base::tile_kl, Base::tile_loss, Base::row_losses,
      Base::row_stats, Base::row_weights;
  using typename Base::Chunk;

  void merge_stats(const Chunk& c) const {
    A* stats = row_stats(c);
    parallel_tasks(c.padded / kPanel, [&](int64_t panel, int64_t) {
      for (int64_t n = panel * kPanel; n < (panel + 1) * kPanel; ++n) {
        const MergedSum student = merge_sum(c, n, kPartMaxS, kPartSumS);
        const MergedSum teacher = merge_sum(c, n, kPartMaxT, kPartSumT);
        const double kl = wants_tile_kl() ? merge_kl(c, n, student, teacher) : 0.0;
        const auto set = [&](int which, double value) { stats[which * c.padded + n] = A(value); };
        set(kMaxS, student.max);
        set(kInvSumS, 1 / student.sum);
        set(kMaxT, teacher.max);
        set(kInvSumT, 1 / teacher.sum);
        set(kDelta, delta_between<A>(A(student.max), student.sum, A(teacher.max), teacher.sum));
        set(kKl, p_.options.kind() == Divergence::kReverse ? kl : 0.0);
        if (n < c.rows) set_loss(c, n, kl);
      }
    });
    write_stats(c);
    load_weights(c);
  }

  // Without a gradient pass to sum the loss, and for reverse KL, whose gradient needs it first.
  bool wants_tile_kl() const {
    const Divergence kind = p_.options.kind();
    return kind == Divergence::kReverse ||
           (kind == Divergence::kForward && s_.schedule == Schedule::kForward);
  }

  struct MergedSum {
    double max = -std::numeric_limits<double>::infinity(), sum = 0;
    // Of a tile's sum; 0 for a tile without a possible token, whose maximum is -inf.
    double scale(double tile_max) const { return tile_max == max ? 1.0 : std::exp(tile_max - max); }
  };
  MergedSum merge_sum(const Chunk& c, int64_t n, int max_column, int sum_column) const {
    MergedSum merged;
    for (int64_t t = 0; t < s_.tiles(); ++t) {
      merged.max = std::max(merged.max, double(partials(c, t)[max_column * c.padded + n]));
    }
    for (int64_t t = 0; t < s_.tiles(); ++t) {
      const A* part = partials(c, t) + n;
      merged.sum += merged.scale(part[max_column * c.padded]) * part[sum_column * c.padded];
    }
    return merged;
  }

  // The chain rule of KL over tiles, each term >= 0. The ratio of a tile's masses is taken in log space: a
  // mass that is too small for any float has a logarithm all the same. Only a tile without a possible token
  // has none. As for single tokens, a mass below the numbers of A is 0, also where it meets an infinite
  // factor.
  double merge_kl(const Chunk& c, int64_t n, const MergedSum& student, const MergedSum& teacher) const {
    double kl = 0;
    for (int64_t t = 0; t < s_.tiles(); ++t) {
      const A* part = partials(c, t) + n;
      TileMass x = tile_mass(teacher, part[kPartMaxT * c.padded], part[kPartSumT * c.padded]);
      TileMass y = tile_mass(student, part[kPartMaxS * c.padded], part[kPartSumS * c.padded]);
      if (p_.options.kind() == Divergence::kReverse) std::swap(x, y);
      if (x.mass < std::numeric_limits<A>::min()) {
        kl += y.mass;
      } else if (!y.possible) {
        kl += x.mass * std::numeric_limits<double>::infinity() + y.mass;
      } else {
        const double ratio = (x.below - y.below) + std::log(x.share / y.share);
        kl += x.mass * (ratio + part[kPartKl * c.padded]) + (y.mass - x.mass);
      }
    }
    return kl;
  }

  // mass = exp(below) * share: a tile's part of the row's probability.
  struct TileMass {
    double mass, below, share;
    bool possible;
  };
  static TileMass tile_mass(const MergedSum& row, double tile_max, double tile_sum) {
    const double share = tile_sum / row.sum;
    return {row.scale(tile_max) * share, tile_max - row.max, share,
            tile_max > -std::numeric_limits<double>::infinity() || tile_sum != 0};
  }

  void set_loss(const Chunk& c, int64_t n, double value) const {
    static_cast<A*>(p_.loss)[p_.rows[c.begin + n]] = A(value);
  }
  A* stats_out(const Chunk& c, int64_t n) const {
    return static_cast<A*>(p_.stats) + p_.rows[c.begin + n] * kStats;
  }

  void write_stats(const Chunk& c) const {
    for (int64_t n = 0; n < c.rows; ++n) {
      for (int which = 0; which < kStats; ++which)
        stats_out(c, n)[which] = row_stats(c)[which * c.padded + n];
    }
  }
  void load_stats(const Chunk& c) const {
    for (int64_t n = 0; n < c.padded; ++n) {
      for (int which = 0; which < kStats; ++which) {
        row_stats(c)[which * c.padded + n] = n < c.rows ? stats_out(c, n)[which] : A(0);
      }
    }
    load_weights(c);
  }
  // Rows that only pad a panel weigh nothing.
  void load_weights(const Chunk& c) const {
    const A* weight = static_cast<const A*>(p_.row_weight);
    for (int64_t n = 0; n < c.padded; ++n) {
      row_weights(c)[n] = n >= c.rows ? A(0) : weight ? weight[p_.rows[c.begin + n]] : A(1);
    }
  }

  // KL(S || M) of each row from its tiles.
  void merge_mixture_kl(const Chunk& c) const {
    parallel_tasks(c.padded / kPanel, [&](int64_t panel, int64_t) {
      for (int64_t n = panel * kPanel; n < (panel + 1) * kPanel; ++n) {
        double kl = 0;
        for (int64_t t = 0; t < s_.tiles(); ++t) kl += tile_kl(c, t)[n];
        row_stats(c)[kKl * c.padded + n] = A(kl);
      }
    });
    write_stats(c);
    merge_loss(c, 0, s_.tiles());
  }

  // Tiles in order, in double, and continued from stretch to stretch: both schedules give the same bits.
  void merge_loss(const Chunk& c, int64_t first_tile, int64_t last_tile) const {
    for (int64_t n = 0; n < c.rows; ++n) {
      double& loss = row_losses(c)[n];
      if (first_tile == 0) loss = 0;
      for (int64_t t = first_tile; t < last_tile; ++t) loss += tile_loss(c, t)[n];
      set_loss(c, n, loss);
    }
  }
};

}  // namespace minitron
