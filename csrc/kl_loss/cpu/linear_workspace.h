// Where the parts of one linear_kl_loss call lie: chunks of rows, tiles of the vocabulary, and the workspace.
#pragma once

#include <algorithm>

#include "common/cpu/parallel.h"
#include "common/cpu/tensors.h"
#include "kl_loss/cpu/linear_layout.h"

namespace minitron {

// All that one call reads and writes; absent outputs are null. `rows` are the indices of the rows that count.
struct LinearProblem {
  Matrix student_hidden, student_head, teacher_hidden, teacher_head;
  const void *student_bias, *teacher_bias;  // [V], accumulate type, or null
  std::vector<int64_t> rows;
  const void* row_weight;  // [N], accumulate type, or null for 1
  LossOptions options;

  void *loss, *stats;             // [N], [N, kStats], accumulate type
  bool stats_given;               // stats hold the result of an earlier forward: skip to the gradient
  Matrix grad_hidden, grad_head;  // data null where not wanted
  void* grad_bias;                // [V], accumulate type
  Matrix head_accumulator;        // grad_head is added to it, instead of written
};

template <typename Op, typename A>
class LinearBuffers {
 protected:
  LinearBuffers(const LinearProblem& problem, const LinearShape& shape, char* workspace)
      : p_(problem), s_(shape), layout_(make_layout(shape)), base_(workspace) {}

  struct Chunk {
    int64_t index, begin, rows, padded;
  };
  struct Tile {
    int64_t index, begin, rows;
  };

  Chunk chunk(int64_t c) const {
    const int64_t begin = c * s_.chunk(), rows = std::min(s_.chunk(), s_.rows - begin);
    return {c, begin, rows, round_up(rows, kPanel)};
  }
  Tile tile(int64_t t) const {
    const int64_t begin = t * s_.tile;
    return {t, begin, std::min(s_.tile, s_.vocab_size - begin)};
  }

  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }
  template <typename T>
  T* scratch(const Part& part, int64_t slot) const {
    return at<T>(layout_.scratch.offset + slot * layout_.scratch_stride + part.offset);
  }
  bool is_stored(int64_t t) const { return t < s_.stored_tiles; }
  // Panel of a stored tile; teacher panels follow the student's. After `grad`, dz lies in the teacher's.
  A* stored_logits(const Chunk& c, int64_t t, int side) const {
    return at<A>(layout_.logits.offset) + (side * s_.stored_tiles + t) * s_.tile * c.padded;
  }
  A* partials(const Chunk& c, int64_t t) const {
    return at<A>(layout_.partials.offset) + t * (kPartials + 2) * c.padded;
  }
  A* tile_loss(const Chunk& c, int64_t t) const { return partials(c, t) + kPartials * c.padded; }
  A* tile_kl(const Chunk& c, int64_t t) const { return tile_loss(c, t) + c.padded; }
  // [kStats + 1][padded]: the stats of a chunk's rows, then their weights.
  A* row_stats(const Chunk& c) const {
    return at<A>(layout_.rows.offset) + c.index * (kStats + 1) * s_.padded_chunk();
  }
  A* row_weights(const Chunk& c) const { return row_stats(c) + kStats * c.padded; }
  double* row_losses(const Chunk& c) const {
    const int64_t before = s_.chunks() * (kStats + 1) * s_.padded_chunk() * int64_t(sizeof(A));
    return at<double>(layout_.rows.offset + before) + c.index * s_.padded_chunk();
  }

  // dX of a chunk in fp32, 64 columns from h on: [padded][kPanel], so that a GEMM's C lies in one piece.
  A* hidden_panel(const Chunk& c, int64_t h) const {
    const int64_t chunk_size = round_up(s_.student_width, kPanel) * s_.padded_chunk();
    const int64_t index = s_.schedule == Schedule::kStore ? 0 : c.index;
    return at<A>(layout_.hidden_accumulator.offset) + index * chunk_size + h * c.padded;
  }

  // dz of a tile as the A operand of dX: [tokens, ld].
  struct Dz {
    Op* data;
    int64_t ld;
  };
  Dz dz(const Chunk& c, int64_t t, int64_t first_tile) const {
    if (is_stored(t)) {
      return {reinterpret_cast<Op*>(stored_logits(c, t, 1)), s_.tile * int64_t(sizeof(A) / sizeof(Op))};
    }
    const int64_t place = t - std::max(first_tile, s_.stored_tiles);
    return {at<Op>(layout_.dz.offset) + place * s_.tile * c.padded, s_.tile};
  }

  const LinearProblem& p_;
  const LinearShape s_;
  const LinearLayout layout_;
  char* const base_;
};

}  // namespace minitron
