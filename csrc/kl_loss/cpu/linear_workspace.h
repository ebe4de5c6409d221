// What a call of linear_kl_loss reads and writes: its tensors, and the parts of its workspace.
#pragma once

#include "common/cpu/parallel.h"
#include "common/cpu/tensors.h"
#include "kl_loss/cpu/linear_layout.h"

namespace minitron {

// The tensors of a call; absent ones are null. "Accumulate type" is fp32, for fp64 problems fp64.
struct LinearProblem {
  Matrix student_hidden, student_head, teacher_hidden, teacher_head;  // a sparse teacher has neither
  const void *student_bias, *teacher_bias;                            // [V], accumulate type, or null
  std::vector<int64_t> valid_tokens;  // their indices among the rows of the tensors
  const void* row_weight;             // [N], accumulate type, or null for 1
  LossOptions options;
  const int64_t* labels;  // [N]; -1, and null, for none
  const void* ce_weight;  // [N], accumulate type, or null for 0
  int64_t total_vocab;    // over which label smoothing spreads

  void *loss, *stats;  // [N], [N, kNumStats], accumulate type
  void* metrics;       // [N, kNumMetrics], accumulate type, or null
  bool stats_given;    // stats, and metrics, hold the result of an earlier forward: only gradients are made
  Matrix grad_hidden, grad_head;  // data null where not needed
  void* grad_bias;                // [V], accumulate type
  Matrix grad_head_accumulator;   // the head's gradient is added to it, and grad_head is not written
};

// The parts of the workspace, with their types.
template <typename Op, typename A>
class Workspace {
 public:
  Workspace(const LinearShape& shape, char* memory)
      : shape_(shape), layout_(make_layout(shape)), memory_(memory) {}

  // Packed hidden states of the current chunk: B operands of the logits, and of dW.
  Op* student_packed() const { return at<Op>(layout_.student_packed); }
  Op* teacher_packed() const { return at<Op>(layout_.teacher_packed); }
  Op* hidden_packed() const { return at<Op>(layout_.hidden_packed); }
  // The B operand of dX: a tile of the student's head, one of those of a tile group.
  Op* head_packed(int64_t tile, int64_t first_tile) const {
    const int64_t size = shape_.depth(shape_.plan.tile) * round_up(shape_.student_hidden_size, kPanel);
    return at<Op>(layout_.head_packed) + (tile - first_tile) * size;
  }

  // Scratch of one thread.
  Op* a_block(int64_t slot) const { return scratch<Op>(layout_.a_block, slot); }
  A* logits_block(int64_t slot) const { return scratch<A>(layout_.logits_block, slot); }
  Op* dz_transposed(int64_t slot) const { return scratch<Op>(layout_.dz_transposed, slot); }
  char* head_rows(int64_t slot) const { return scratch<char>(layout_.head_rows, slot); }
  A* panel(int64_t slot) const { return scratch<A>(layout_.panel, slot); }
  A* entry_sums(int64_t slot) const { return scratch<A>(layout_.entry_sums, slot); }

  // Panels of a stored tile; those of the teacher, if it has logits, follow the student's.
  A* stored_logits(const Chunk& chunk, int64_t tile, bool teacher) const {
    const int64_t index = (teacher ? shape_.plan.stored_tiles : 0) + tile;
    return at<A>(layout_.logits.offset) + index * shape_.plan.tile * chunk.padded;
  }

  // What a tile says of each token: [kNumPartials][padded], then its part of the loss, then of JSD's KL; with
  // a sparse teacher kPartMaxS and kPartSumS alone. Where metrics are asked for [kNumMetricState][padded].
  A* partials(const Chunk& chunk, int64_t tile) const {
    return at<A>(layout_.partials.offset) + tile * shape_.partial_columns() * chunk.padded;
  }
  A* tile_loss(const Chunk& chunk, int64_t tile) const {
    return partials(chunk, tile) + kNumPartials * chunk.padded;
  }
  A* tile_kl(const Chunk& chunk, int64_t tile) const { return tile_loss(chunk, tile) + chunk.padded; }
  A* metric_state(const Chunk& chunk, int64_t tile) const {
    return partials(chunk, tile) + (shape_.partial_columns() - kNumMetricState) * chunk.padded;
  }

  // [kNumStats][padded]: the stats of a chunk's tokens; [padded]: their weights. With metrics [padded] each:
  // the weights of their cross-entropy, kInvSumY. And the losses, in double; with metrics, the labels.
  A* row_stats(const Chunk& chunk) const {
    return at<A>(layout_.row_stats.offset) + chunk.index * shape_.row_columns() * shape_.padded_chunk();
  }
  A* row_weights(const Chunk& chunk) const { return row_stats(chunk) + kNumStats * chunk.padded; }
  A* ce_weights(const Chunk& chunk) const { return row_weights(chunk) + chunk.padded; }
  A* inv_sum_y(const Chunk& chunk) const { return ce_weights(chunk) + chunk.padded; }
  double* row_losses(const Chunk& chunk) const {
    const int64_t before = shape_.chunks() * shape_.row_columns() * shape_.padded_chunk();
    return at<double>(layout_.row_stats.offset + before * int64_t(sizeof(A))) +
           chunk.index * shape_.padded_chunk();
  }
  int64_t* labels(const Chunk& chunk) const {
    const int64_t losses = shape_.chunks() * shape_.padded_chunk();
    return reinterpret_cast<int64_t*>(row_losses(shape_.chunk(0)) + losses) +
           chunk.index * shape_.padded_chunk();
  }
  PanelLabels panel_labels(const Chunk& chunk, const Tile& tile, int64_t panel) const {
    return {shape_.metrics ? labels(chunk) + panel * kPanel : nullptr, tile.begin};
  }
  // [padded, outcomes]: the gradient to a sparse teacher's outcomes.
  A* outcome_grads(const Chunk& chunk) const {
    const int64_t rows = shape_.chunks() * shape_.padded_chunk();
    double* end = row_losses(shape_.chunk(0)) + rows;
    if (shape_.metrics) end = reinterpret_cast<double*>(labels(shape_.chunk(0)) + rows);
    return reinterpret_cast<A*>(end) + chunk.index * shape_.padded_chunk() * shape_.outcomes;
  }

  // kPanel columns of a chunk's dX from `column` on: [padded][kPanel], so that a GEMM's C is one piece.
  A* hidden_panel(const Chunk& chunk, int64_t column) const {
    const int64_t chunk_size = round_up(shape_.student_hidden_size, kPanel) * shape_.padded_chunk();
    const int64_t index = shape_.plan.schedule == Schedule::kStore ? 0 : chunk.index;
    return at<A>(layout_.hidden_accumulator.offset) + index * chunk_size + column * chunk.padded;
  }

  // Where the head's gradient adds up over chunks; null if it does so elsewhere, or there is one chunk.
  A* head_accumulator() const {
    return layout_.head_accumulator.bytes ? at<A>(layout_.head_accumulator.offset) : nullptr;
  }

  // dz of a tile as the A operand of dX: [tokens, ld]. first_tile: of the tile group.
  struct Dz {
    Op* data;
    int64_t ld;
  };
  Dz dz(const Chunk& chunk, int64_t tile, int64_t first_tile) const {
    const int64_t depth = shape_.depth(shape_.plan.tile);
    return {at<Op>(layout_.dz.offset) + (tile - first_tile) * depth * chunk.padded, depth};
  }

 private:
  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(memory_ + offset);
  }
  template <typename T>
  T* scratch(const Part& part, int64_t slot) const {
    return at<T>(layout_.scratch.offset + slot * layout_.scratch_stride + part.offset);
  }

  const LinearShape shape_;
  const LinearLayout layout_;
  char* const memory_;
};

}  // namespace minitron
