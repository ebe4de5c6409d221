// The workspace of linear_kl_loss on CPU: which parts, how large, where. The planner asks the same function
// before a call that the kernel asks during it, so what explain() says is what is used.
#pragma once

#include <vector>

#include "common/cpu/gemm.h"
#include "common/types.h"
#include "kl_loss/cpu/kernels.h"

namespace minitron {

// store works through the vocabulary for a chunk of rows and keeps the logits of its first stored_tiles (4
// GEMMs; the rest is made twice); recompute keeps none and works through the rows for a stretch of the
// vocabulary (6 GEMMs), so that no head gradient waits for further rows; forward only reduces logits (2
// GEMMs).
enum class Schedule { kStore, kRecompute, kForward };

struct LinearShape {
  int64_t rows, vocab_size, student_width, teacher_width;
  int64_t op_bytes, acc_bytes;  // of a GEMM operand, and of what it accumulates in
  bool grad_hidden, grad_head;  // which gradients are wanted (the bias' needs no space)
  bool head_in_place;  // grad_head grows in the output (of the accumulator's dtype) or in a lent buffer
  Schedule schedule;
  int64_t chunk_rows;    // rows whose operands are packed at a time
  int64_t tile;          // vocabulary rows of one task
  int64_t super_tiles;   // tiles of a stretch, whose dz is made before dX takes it in
  int64_t stored_tiles;  // store: tiles whose logits are kept from the sums to the gradient
  int64_t threads;

  int64_t chunk() const { return std::min(chunk_rows, rows); }
  int64_t padded_chunk() const { return round_up(chunk(), kPanel); }
  int64_t chunks() const { return chunk() ? ceil_div(rows, chunk()) : 0; }
  int64_t tiles() const { return ceil_div(vocab_size, tile); }
  // Tiles whose dz is held at the same time in a place of its own; a stored tile's takes that of its logits.
  int64_t held_tiles() const { return std::min(super_tiles, tiles() - stored_tiles); }
  // K of a GEMM over hidden columns: 16-bit operands come in pairs.
  int64_t depth(int64_t width) const { return op_bytes == 2 ? round_up(width, 2) : width; }
  bool has_grad() const { return schedule != Schedule::kForward; }
};

struct Part {
  int64_t offset, bytes;
};

struct LinearLayout {
  // Per thread, inside `scratch`.
  Part a_block, logits_block, dz_transposed, head_panels, panel, row_sums;
  int64_t scratch_stride = 0;

  // In the order of LinearKLPlan.PARTS.
  Part logits, dz, packed, partials, rows, scratch, hidden_accumulator, head_accumulator;
  int64_t total = 0;

  // Inside `packed`.
  int64_t student_packed = 0, teacher_packed = 0, hidden_packed = 0;

  std::vector<int64_t> bytes() const {
    return {logits.bytes,
            dz.bytes,
            packed.bytes,
            partials.bytes,
            rows.bytes,
            scratch.bytes,
            hidden_accumulator.bytes,
            head_accumulator.bytes,
            total};
  }
};

// Rows for which one pass over a tile of a head is made: each pass widens or fetches the tile again.
constexpr int64_t kRowBlock = 512;
// Columns of dX that one task of the dX pass makes.
constexpr int64_t kHiddenBlock = 2 * kPanel;

inline LinearLayout make_layout(const LinearShape& s) {
  constexpr int64_t kAlign = 256;
  LinearLayout l{};
  int64_t cursor = 0;
  const auto take = [&cursor](int64_t bytes) {
    const Part part{cursor, round_up(bytes, kAlign)};
    cursor += part.bytes;
    return part;
  };
  const int64_t rows = s.padded_chunk(), block = std::min(rows, kRowBlock), tile = s.tile;
  const int64_t padded_width = round_up(s.student_width, kPanel);
  const bool store = s.schedule == Schedule::kStore;

  l.logits = take(2 * s.stored_tiles * tile * rows * s.acc_bytes);
  l.dz = take(s.grad_hidden ? s.held_tiles() * tile * rows * s.op_bytes : 0);

  const int64_t begin = cursor;
  l.student_packed = take(s.depth(s.student_width) * rows * s.op_bytes).offset;
  l.teacher_packed = take(s.depth(s.teacher_width) * rows * s.op_bytes).offset;
  l.hidden_packed = take(s.grad_head ? padded_width * rows * s.op_bytes : 0).offset;
  l.packed = {begin, cursor - begin};

  l.partials = take(s.tiles() * (kPartials + 2) * rows * s.acc_bytes);
  l.rows = take(s.chunks() * rows * ((kStats + 1) * s.acc_bytes + int64_t(sizeof(double))));

  const int64_t shared = cursor;
  cursor = 0;
  l.a_block = take(tile * kMaxChain * s.op_bytes);
  l.logits_block = take(s.stored_tiles < s.tiles() ? 2 * tile * block * s.acc_bytes : 0);
  l.dz_transposed = take(s.grad_head ? tile * rows * s.op_bytes : 0);
  l.head_panels = take(s.grad_hidden ? s.depth(tile) * kHiddenBlock * s.op_bytes : 0);
  l.panel = take(s.has_grad() ? tile * kPanel * s.acc_bytes : 0);
  l.row_sums = take(tile * s.acc_bytes);
  l.scratch_stride = cursor;
  cursor = shared;
  l.scratch = take(l.scratch_stride * s.threads);

  // recompute finishes the head gradient of a stretch before the next one; dX of all rows grows until the end
  l.hidden_accumulator =
      take(s.grad_hidden ? (store ? 1 : s.chunks()) * rows * padded_width * s.acc_bytes : 0);
  l.head_accumulator =
      take(s.grad_head && !s.head_in_place && s.chunks() > 1
               ? (store ? s.vocab_size : s.held_tiles() * tile) * s.student_width * s.acc_bytes
               : 0);
  l.total = cursor;
  return l;
}

}  // namespace minitron
