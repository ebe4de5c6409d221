// The tokens of a chunk as rows of a call's tensors: which row, with which label and weights. What a chunk
// only has to fill up its last panel gets a weight of 0.
#pragma once

#include "kl_loss/cpu/linear_workspace.h"

namespace minitron {

template <typename Op, typename A>
class TokenRows {
 public:
  TokenRows(const LinearProblem& problem, const LinearShape& shape, const Workspace<Op, A>& workspace)
      : problem_(problem), shape_(shape), workspace_(workspace) {}

  // The labels of a chunk, which its tiles look for.
  void load_labels(const Chunk& chunk) const {
    for (int64_t n = 0; shape_.metrics && n < chunk.padded; ++n) {
      workspace_.labels(chunk)[n] =
          problem_.labels && n < chunk.tokens ? problem_.labels[row_of(chunk, n)] : -1;
    }
  }

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

 protected:
  int64_t row_of(const Chunk& chunk, int64_t n) const { return problem_.valid_tokens[chunk.begin + n]; }
  void set_loss(const Chunk& chunk, int64_t n, double value) const {
    static_cast<A*>(problem_.loss)[row_of(chunk, n)] = A(value);
  }
  A* metrics_of(const Chunk& chunk, int64_t n) const {
    return static_cast<A*>(problem_.metrics) + row_of(chunk, n) * kNumMetrics;
  }

  const LinearProblem& problem_;
  const LinearShape& shape_;
  const Workspace<Op, A>& workspace_;
};

// Sums of exp of a token's tiles, merged.
struct MergedSum {
  double max = -std::numeric_limits<double>::infinity(), sum = 0;
  // What a tile's sum is multiplied by; 0 for a tile whose tokens are all masked out, with a maximum of -inf.
  double scale(double tile_max) const { return tile_max == max ? 1.0 : std::exp(tile_max - max); }
};

template <typename Op, typename A>
MergedSum merge_sum(const LinearShape& shape, const Workspace<Op, A>& workspace, const Chunk& chunk,
                    int64_t n, int max_column, int sum_column) {
  MergedSum merged;
  for (int64_t t = 0; t < shape.tiles(); ++t) {
    merged.max = std::max(merged.max, double(workspace.partials(chunk, t)[max_column * chunk.padded + n]));
  }
  for (int64_t t = 0; t < shape.tiles(); ++t) {
    const A* part = workspace.partials(chunk, t) + n;
    merged.sum += merged.scale(part[max_column * chunk.padded]) * part[sum_column * chunk.padded];
  }
  return merged;
}

}  // namespace minitron
