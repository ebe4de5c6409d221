// A teacher with hidden states and a head: what linear_kl_loss makes of a panel of both models' logits.
#pragma once

#include "kl_loss/cpu/linear.h"
#include "kl_loss/cpu/row_merger.h"

namespace minitron {

template <typename Op, typename A>
class HeadTeacher : public RowMerger<Op, A> {
 public:
  using Rows = RowMerger<Op, A>;
  using Rows::merge_grads;
  using Rows::needs_tile_kl;

  HeadTeacher(const LinearProblem& problem, const LinearShape& shape, const Workspace<Op, A>& workspace)
      : Rows(problem, shape, workspace), kernels_(cpu_kernels().kl<A>()) {}

  // Transforms logits in place and reduces them; metrics only of the first look at them.
  void reduce(const Chunk& chunk, const Tile& tile, int64_t panel, const PanelLogits<A>& logits,
              bool first_look) const {
    const auto bias = [&](const void* b) { return b ? static_cast<const A*>(b) + tile.begin : nullptr; };
    const int64_t n = panel * kPanel;
    kernels_.panel_stats(
        logits.student, logits.teacher, {tile.entries, chunk.width(panel)}, bias(problem_.student_bias),
        bias(problem_.teacher_bias), problem_.options, needs_tile_kl(),
        workspace_.partials(chunk, tile.index) + n, chunk.padded, workspace_.panel_labels(chunk, tile, panel),
        shape_.metrics && first_look ? workspace_.metric_state(chunk, tile.index) + n : nullptr);
  }

  // JSD's loss, and KL(S || M) of each token, which its gradient needs: both take a second look at the
  // logits, when the stats are known.
  bool looks_again() const { return needs_second_look(problem_.options.divergence()); }
  void look_again(const Chunk& chunk, const Tile& tile, int64_t panel, const PanelLogits<A>& logits) const {
    const int64_t n = panel * kPanel;
    kernels_.panel_kl(logits.student, logits.teacher, {tile.entries, chunk.width(panel)}, problem_.options,
                      workspace_.row_stats(chunk) + n, chunk.padded,
                      workspace_.tile_kl(chunk, tile.index) + n, workspace_.tile_loss(chunk, tile.index) + n);
  }

  void grad(const Chunk& chunk, const Tile& tile, int64_t panel, const PanelLogits<A>& logits, A* dz) const {
    const int64_t n = panel * kPanel;
    PanelCrossEntropy<A> ce{};
    if (problem_.ce_weight) {
      ce = {workspace_.panel_labels(chunk, tile, panel), workspace_.inv_sum_y(chunk) + n,
            workspace_.ce_weights(chunk) + n, problem_.total_vocab};
    }
    kernels_.panel_grad(logits.student, logits.teacher, logits.ahead, {tile.entries, chunk.width(panel)},
                        problem_.options, workspace_.row_stats(chunk) + n, chunk.padded,
                        workspace_.row_weights(chunk) + n, problem_.ce_weight ? &ce : nullptr, dz,
                        workspace_.tile_loss(chunk, tile.index) + n);
  }

 private:
  using Rows::problem_;
  using Rows::shape_;
  using Rows::workspace_;

  const KlKernels<A>& kernels_;
};

}  // namespace minitron
