// The workspace of linear_kl_loss on CPU: which parts, how large, where. The planner asks the same function
// before a call that the kernel asks during it, so what explain() says is what is used.
#pragma once

#include <algorithm>
#include <vector>

#include "kl_loss/cpu/engine.h"

namespace minitron {

// Some of the valid tokens, worked on together, in panels. There is memory for whole panels, `padded`; what
// is computed are the first `lanes` of them: of a last panel no more than its tokens fill.
struct Chunk {
  int64_t index, begin, tokens, lanes, padded;

  int64_t panels() const { return padded / kPanel; }
  // Lanes of a panel.
  int64_t width(int64_t panel) const { return std::min<int64_t>(kPanel, lanes - panel * kPanel); }
};
// Some entries of the vocabulary, the work of one task.
struct Tile {
  int64_t index, begin, entries;
};

// The sizes of a call, and how its plan divides them.
struct LinearShape {
  int64_t tokens;  // valid ones: masked tokens are left out before anything is computed
  int64_t vocab_size, student_hidden_size, teacher_hidden_size;
  int64_t accumulate_bytes;     // of a number that a GEMM adds up in
  bool grad_hidden, grad_head;  // which gradients are needed (the bias' takes no space)
  bool head_in_place;  // the head's gradient adds up in the output or in the caller's grad_head_accumulator
  bool metrics;        // whether more is known of a row than the divergence
  int64_t outcomes;    // of a sparse teacher; 0 for one with a head, whose logits are made too
  LinearPlan plan;

  // Values of type A that a tile, and a chunk, hold of each token.
  int64_t partial_columns() const {
    return (outcomes ? 2 : kNumPartials + 2) + (metrics ? int64_t(kNumMetricState) : 0);
  }
  int64_t row_columns() const { return kNumStats + 1 + (metrics ? 2 : 0); }
  int64_t operand_bytes() const { return bytes_of(plan.operands); }
  int64_t chunk_size() const { return std::min(plan.chunk_tokens, tokens); }
  int64_t padded_chunk() const { return round_up(chunk_size(), kPanel); }
  int64_t chunks() const { return chunk_size() ? ceil_div(tokens, chunk_size()) : 0; }
  int64_t sides() const { return outcomes ? 1 : 2; }  // models whose logits are made
  int64_t tiles() const { return ceil_div(vocab_size, plan.tile); }
  // Tiles whose dz, and whose packed head, are held at the same time.
  int64_t held_tiles() const { return std::min(plan.tile_group, tiles()); }
  bool is_stored(int64_t tile) const { return tile < plan.stored_tiles; }
  // Whether the logits of a tile are made in a thread's scratch memory; else where they are kept.
  bool is_made_in_scratch(int64_t tile) const { return plan.stream_logits || !is_stored(tile); }
  OperandLayout operands() const { return operand_layout(plan.operands, plan.implementation); }
  // Lanes are the K of dW: whole steps of it.
  int64_t lane_step() const { return std::max(kLaneStep, operands().depth); }
  // K of a GEMM over so many columns or entries.
  int64_t depth(int64_t columns) const { return round_up(columns, operands().depth); }
  // Whether each row of the head's gradient is written once, from scratch memory; else it adds up in place.
  bool gathers_head() const { return grad_head && chunks() == 1; }
  bool has_grad() const { return plan.schedule != Schedule::kForward; }

  Chunk chunk(int64_t index) const {
    const int64_t begin = index * chunk_size(), size = std::min(chunk_size(), tokens - begin);
    return {index, begin, size, round_up(size, lane_step()), round_up(size, kPanel)};
  }
  Tile tile(int64_t index) const {
    const int64_t begin = index * plan.tile;
    return {index, begin, std::min(plan.tile, vocab_size - begin)};
  }
};

struct Part {
  int64_t offset, bytes;
};

struct LinearLayout {
  // One of each per thread, inside `scratch`.
  Part a_block, logits_block, dz_transposed, panel, head_rows, entry_sums;
  int64_t scratch_stride = 0;

  // In the order of LinearKLPlan.PARTS.
  Part logits, dz, packed, partials, row_stats, scratch, hidden_accumulator, head_accumulator;
  int64_t total = 0;

  // Offsets inside `packed`.
  int64_t student_packed = 0, teacher_packed = 0, hidden_packed = 0, head_packed = 0;

  std::vector<int64_t> bytes() const {
    return {logits.bytes,
            dz.bytes,
            packed.bytes,
            partials.bytes,
            row_stats.bytes,
            scratch.bytes,
            hidden_accumulator.bytes,
            head_accumulator.bytes,
            total};
  }
};

inline LinearLayout make_layout(const LinearShape& shape) {
  constexpr int64_t kAlign = 256;
  LinearLayout layout{};
  int64_t cursor = 0;
  const auto take = [&cursor](int64_t bytes) {
    const Part part{cursor, round_up(bytes, kAlign)};
    cursor += part.bytes;
    return part;
  };
  const LinearPlan& plan = shape.plan;
  const int64_t tokens = shape.padded_chunk(), tile = plan.tile;
  const int64_t block = std::min(tokens, plan.token_block);
  const int64_t padded_hidden = round_up(shape.student_hidden_size, kPanel);
  const int64_t operand = shape.operand_bytes(), accumulate = shape.accumulate_bytes;
  const int64_t tile_rows = round_up(tile, shape.operands().rows), tile_depth = shape.depth(tile);
  const bool store = plan.schedule == Schedule::kStore;

  layout.logits = take(shape.sides() * plan.stored_tiles * tile * tokens * accumulate);
  layout.dz = take(shape.grad_hidden ? shape.held_tiles() * tile_depth * tokens * operand : 0);

  const int64_t begin = cursor;
  layout.student_packed = take(shape.depth(shape.student_hidden_size) * tokens * operand).offset;
  layout.teacher_packed = take(shape.depth(shape.teacher_hidden_size) * tokens * operand).offset;
  layout.hidden_packed = take(shape.grad_head ? padded_hidden * tokens * operand : 0).offset;
  layout.head_packed =
      take(shape.grad_hidden ? shape.held_tiles() * tile_depth * padded_hidden * operand : 0).offset;
  layout.packed = {begin, cursor - begin};

  layout.partials = take(shape.tiles() * shape.partial_columns() * tokens * accumulate);
  const int64_t of_row = (shape.row_columns() + shape.outcomes) * accumulate + int64_t(sizeof(double));
  layout.row_stats =
      take(shape.chunks() * tokens * (of_row + (shape.metrics ? int64_t(sizeof(int64_t)) : 0)));

  const int64_t shared = cursor;
  cursor = 0;
  layout.a_block = take(tile_rows * kMaxChain * operand);
  const bool scratch = shape.tiles() && shape.is_made_in_scratch(shape.tiles() - 1);
  layout.logits_block = take(scratch ? shape.sides() * tile * block * accumulate : 0);
  layout.dz_transposed = take(shape.grad_head ? tile_rows * tokens * operand : 0);
  layout.panel = take(shape.has_grad() ? tile * kPanel * accumulate : 0);
  const int64_t gathered = std::min(plan.head_rows, tile) * shape.student_hidden_size;
  layout.head_rows = take(shape.gathers_head() ? gathered * (shape.head_in_place ? accumulate : 2) : 0);
  layout.entry_sums = take(tile * accumulate);
  layout.scratch_stride = cursor;
  cursor = shared;
  layout.scratch = take(layout.scratch_stride * plan.threads);

  // recompute finishes the head gradient of a tile group before the next one; dX of all tokens grows until
  // the end
  layout.hidden_accumulator =
      take(shape.grad_hidden ? (store ? 1 : shape.chunks()) * tokens * padded_hidden * accumulate : 0);
  layout.head_accumulator = take(shape.grad_head && !shape.head_in_place && shape.chunks() > 1
                                     ? (store ? shape.vocab_size : shape.held_tiles() * tile) *
                                           shape.student_hidden_size * accumulate
                                     : 0);
  layout.total = cursor;
  return layout;
}

}  // namespace minitron
