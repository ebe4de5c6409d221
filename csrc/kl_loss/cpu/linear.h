// linear_kl_loss on CPU: hidden states and heads in, loss and gradients out; logits exist only in tiles.
//
// Logits are made with the vocabulary down and the tokens across: C[tile of V, tokens] = W[tile, H] X^T[H,
// tokens]. The head W, the only large operand, is then read as it lies in memory (the A of the GEMM), the few
// hidden states are packed once per chunk, and a tile of dz, the gradient to the raw logits, is at once the A
// operand of dW = dz^T X. Phases of a chunk of tokens:
//   logits  one task per tile of V: both logits, their maxima and sums of exp
//   merge   one task per panel of tokens: tiles in order, in double; so any thread count gives the same bits
//   grad    one task per tile of V: dz from logits and row stats, the tile's dW, finished or added up, and
//           the tile of W packed for dX
//   hidden  one task per block of dX: dX += dz W over the tiles of a group, in order
//
// Blocks are sized by the plan to stay in cache: statistics are taken of a panel right after its GEMM. Logits
// that are kept, and are more than the caches hold, are made in scratch memory and then written around the
// caches. dW is gathered in rows before it is written, so that each page is touched once.
//
// What is made of a panel of logits, and how tiles merge, is the Teacher's: HeadTeacher in head_teacher.h,
// SparseTeacher in sparse_teacher.h.
#pragma once

#include "common/cpu/stream.h"
#include "kl_loss/cpu/engine.h"
#include "kl_loss/cpu/head_gradient.h"
#include "kl_loss/cpu/linear_workspace.h"

namespace minitron {

// Both logits of a panel, [entries of the vocabulary, kPanel tokens]; no teacher's with a sparse one.
template <typename A>
struct PanelLogits {
  A *student, *teacher;
  int64_t ahead = 0;  // elements from these to the panels that are looked at next, where these are kept

  PanelLogits at(int64_t offset) const { return {student + offset, teacher ? teacher + offset : nullptr}; }
};

template <typename Op, typename A, typename Teacher>
class LinearKL {
 public:
  template <typename... Args>
  LinearKL(const LinearProblem& problem, const LinearShape& shape, const Engine<Op, A>& engine, char* memory,
           const Args&... of_teacher)
      : problem_(problem),
        shape_(shape),
        workspace_(shape, memory),
        teacher_(problem_, shape_, workspace_, of_teacher...),
        kernels_(cpu_kernels().kl<A>()),
        engine_(engine),
        pack_(*engine.pack),
        gemm_(counted(engine.gemm)),
        operands_(shape.operands()),
        head_gradient_(problem_, shape_, workspace_, pack_, gemm_) {}

  void run() {
    for (int64_t i = 0; i < shape_.chunks(); ++i) teacher_.load_labels(shape_.chunk(i));
    if (shape_.plan.schedule == Schedule::kStore) {
      for (int64_t i = 0; i < shape_.chunks(); ++i) run_stored(shape_.chunk(i));
    } else {
      run_recomputed();
    }
  }

 private:
  void run_stored(const Chunk& chunk) {
    pack(chunk);
    reduce_logits(chunk);
    if (problem_.stats_given) {
      teacher_.load_stats(chunk);
    } else {
      merge_stats(chunk);
    }
    for (int64_t first = 0; first < shape_.tiles(); first += shape_.plan.tile_group) grad(chunk, first);
    write_hidden(chunk);
  }

  void run_recomputed() {
    for (int64_t i = 0; i < shape_.chunks(); ++i) {
      const Chunk chunk = shape_.chunk(i);
      if (problem_.stats_given) {
        teacher_.load_stats(chunk);
        if (!shape_.has_grad() && teacher_.looks_again()) {  // of a shard: the stats are those of all
          pack(chunk);
          look_again(chunk);
        }
        continue;
      }
      pack(chunk);
      reduce_logits(chunk);
      merge_stats(chunk);
    }
    if (!shape_.has_grad()) return;
    for (int64_t first = 0; first < shape_.tiles(); first += shape_.plan.tile_group) {
      for (int64_t i = 0; i < shape_.chunks(); ++i) {
        const Chunk chunk = shape_.chunk(i);
        if (shape_.chunks() > 1 || problem_.stats_given) pack(chunk);
        grad(chunk, first);
      }
    }
    for (int64_t i = 0; i < shape_.chunks(); ++i) write_hidden(shape_.chunk(i));
  }

  // Tasks that multiply.
  template <typename F>
  void gemm_tasks(int64_t n, F&& f) const {
    parallel_tasks(n, shape_.plan.threads, [&](int64_t task, int64_t slot) {
      const EngineTask<Engine<Op, A>> running(engine_);
      f(task, slot);
    });
  }

  // Hidden states as B operands: transposed for the logits, and as they are for dW.
  void pack(const Chunk& chunk) {
    const int64_t* index = problem_.valid_tokens.data() + chunk.begin;
    parallel_tasks(chunk.panels(), [&](int64_t panel, int64_t) {
      const int64_t first = panel * kPanel, tokens = std::min<int64_t>(kPanel, chunk.tokens - first);
      const auto side = [&](const Matrix& x, Op* packed) {
        pack_.transposed(x.data, x.dtype, x.ld, index + first, tokens, x.cols,
                         packed + first * shape_.depth(x.cols));
      };
      side(problem_.student_hidden, workspace_.student_packed());
      if (shape_.sides() == 2) side(problem_.teacher_hidden, workspace_.teacher_packed());
    });
    if (!shape_.grad_head) return;
    const Matrix& x = problem_.student_hidden;
    parallel_tasks(ceil_div(x.cols, kPanel), [&](int64_t panel, int64_t) {
      const int64_t first = panel * kPanel, cols = std::min<int64_t>(kPanel, x.cols - first);
      const char* src = static_cast<const char*>(x.data) + first * bytes_of(x.dtype);
      pack_.rows(src, x.dtype, x.ld, index, chunk.tokens, chunk.padded, cols,
                 workspace_.hidden_packed() + first * chunk.padded);
    });
  }

  // C[tile, panels of tokens] = W[tile, :] X^T for panels [first, last) of the packed hidden states; `done`
  // is called with each panel when it is finished, and in cache. `then`: of the head that is read after this.
  template <typename F>
  void make_logits(const Matrix& head, const Op* packed, const Chunk& chunk, const Tile& tile, int64_t first,
                   int64_t last, A* out, int64_t slot, const MemoryRows& then, F&& done) const {
    const int64_t depth = shape_.depth(head.cols);
    const bool direct = operands_.in_place && head.dtype == kDTypeOf<Op> && depth == head.cols;
    if (depth == 0) {  // of a sum without terms nothing would be written
      for (int64_t panel = first; panel < last; ++panel) {
        std::fill_n(out + (panel - first) * panel_size(), tile.entries * kPanel, A(0));
        done(panel);
      }
    }
    for (int64_t k = 0; k < depth; k += kMaxChain) {
      const int64_t chain = std::min(kMaxChain, depth - k);
      const char* block = head.row(tile.begin) + k * bytes_of(head.dtype);
      const Op* a = reinterpret_cast<const Op*>(block);
      if (!direct) {
        Op* converted = workspace_.a_block(slot);
        pack_.convert(block, head.dtype, head.ld, tile.entries, std::min(chain, head.cols - k), chain,
                      converted);
        a = converted;
      }
      const bool more = k + chain < depth;
      const MemoryRows next = more ? block_of(head, tile, k + chain) : then;
      for (int64_t panel = first; panel < last; ++panel) {
        const Op* b = packed + (panel * depth + k) * kPanel;
        // the next panel, or the first one's next chain
        const bool is_last = panel + 1 == last;
        const Op* next_b = is_last ? packed + (first * depth + k + chain) * kPanel : b + depth * kPanel;
        const Ahead ahead{next.part(panel - first, last - first),
                          MemoryRows::of(next_b, is_last && !more ? 0 : chain * kPanel)};
        gemm_(tile.entries, chunk.width(panel), chain, direct ? head.ld : chain, kPanel, kPanel, k > 0, a, b,
              out + (panel - first) * panel_size(), ahead);
        if (k + chain == depth) done(panel);
      }
    }
  }

  // What make_logits reads of a head as one A operand, from column k on.
  MemoryRows block_of(const Matrix& head, const Tile& tile, int64_t k) const {
    const int64_t element = bytes_of(head.dtype);
    return {head.row(tile.begin) + k * element, tile.entries, std::min(kMaxChain, head.cols - k) * element,
            head.ld * element};
  }
  // That of the tile which this thread is likely to take next.
  MemoryRows block_after(const Matrix& head, const Tile& tile) const {
    const int64_t next = tile.index + std::min(max_threads(), shape_.plan.threads);
    return next < shape_.tiles() ? block_of(head, shape_.tile(next), 0) : MemoryRows{};
  }

  // Makes the logits of a tile and calls f(panel, logits) for each panel, in scratch memory or where they are
  // kept.
  template <typename F>
  void make_panels(const Chunk& chunk, const Tile& tile, int64_t slot, F&& f) const {
    const int64_t block = shape_.plan.token_block / kPanel, panels = chunk.panels();
    for (int64_t first = 0; first < panels; first += block) {
      const int64_t last = std::min(first + block, panels);
      const PanelLogits<A> logits = shape_.is_made_in_scratch(tile.index)
                                        ? scratch_logits(slot)
                                        : kept_logits(chunk, tile).at(first * panel_size());
      if (logits.teacher) {
        make_logits(problem_.teacher_head, workspace_.teacher_packed(), chunk, tile, first, last,
                    logits.teacher, slot, block_of(problem_.student_head, tile, 0), [](int64_t) {});
      }
      make_logits(problem_.student_head, workspace_.student_packed(), chunk, tile, first, last,
                  logits.student, slot,
                  block_after(logits.teacher ? problem_.teacher_head : problem_.student_head, tile),
                  [&](int64_t panel) { f(panel, logits.at((panel - first) * panel_size())); });
    }
  }

  int64_t panel_size() const { return shape_.plan.tile * kPanel; }
  PanelLogits<A> scratch_logits(int64_t slot) const {
    A* block = workspace_.logits_block(slot);
    const int64_t size = shape_.plan.tile * std::min(shape_.padded_chunk(), shape_.plan.token_block);
    return {block, shape_.sides() == 2 ? block + size : nullptr};
  }
  PanelLogits<A> kept_logits(const Chunk& chunk, const Tile& tile) const {
    const bool both = shape_.sides() == 2;
    return {workspace_.stored_logits(chunk, tile.index, false),
            both ? workspace_.stored_logits(chunk, tile.index, true) : nullptr};
  }

  // Calls f(panel, logits) with the transformed logits of each panel of a tile, kept or made again.
  template <typename F>
  void look_at_panels(const Chunk& chunk, const Tile& tile, int64_t slot, F&& f) const {
    if (!shape_.is_stored(tile.index)) {
      make_panels(chunk, tile, slot, [&](int64_t panel, const PanelLogits<A>& logits) {
        teacher_.reduce(chunk, tile, panel, logits, false);
        f(panel, logits);
      });
      return;
    }
    const int64_t panels = chunk.panels();
    for (int64_t panel = 0; panel < panels; ++panel) {
      PanelLogits<A> logits = kept_logits(chunk, tile).at(panel * panel_size());
      logits.ahead = panel + 1 < panels ? panel_size() : 0;
      f(panel, logits);
    }
  }

  void reduce_logits(const Chunk& chunk) const {
    gemm_tasks(shape_.tiles(), [&](int64_t index, int64_t slot) {
      const Tile tile = shape_.tile(index);
      const bool moves = shape_.is_stored(index) && shape_.is_made_in_scratch(index);
      const PanelLogits<A> kept = moves ? kept_logits(chunk, tile) : PanelLogits<A>{};
      make_panels(chunk, tile, slot, [&](int64_t panel, const PanelLogits<A>& logits) {
        teacher_.reduce(chunk, tile, panel, logits, !problem_.stats_given);
        if (!moves) return;
        const PanelLogits<A> to = kept.at(panel * panel_size());
        move_panel(logits.student, to.student, tile.entries);
        if (to.teacher) move_panel(logits.teacher, to.teacher, tile.entries);
      });
      if (moves) stream_fence();
    });
  }

  static void move_panel(const A* from, A* to, int64_t entries) {
    stream_lines(reinterpret_cast<char*>(to), reinterpret_cast<const char*>(from),
                 entries * kPanel * int64_t(sizeof(A)));
  }

  void merge_stats(const Chunk& chunk) const {
    teacher_.merge(chunk);
    if (teacher_.looks_again()) look_again(chunk);
  }

  void look_again(const Chunk& chunk) const {
    gemm_tasks(shape_.tiles(), [&](int64_t index, int64_t slot) {
      const Tile tile = shape_.tile(index);
      look_at_panels(chunk, tile, slot, [&](int64_t panel, const PanelLogits<A>& logits) {
        teacher_.look_again(chunk, tile, panel, logits);
      });
    });
    teacher_.merge_again(chunk);
  }

  // The gradients of a tile group.
  void grad(const Chunk& chunk, int64_t first_tile) const {
    const int64_t last_tile = std::min(shape_.tiles(), first_tile + shape_.plan.tile_group);
    gemm_tasks(last_tile - first_tile, [&](int64_t i, int64_t slot) {
      const Tile tile = shape_.tile(first_tile + i);
      grad_of_tile(chunk, tile, first_tile, slot);
      // one packing serves all chunks of a group, where they follow each other
      const bool packed = chunk.index > 0 && shape_.plan.schedule == Schedule::kRecompute;
      if (shape_.grad_hidden && !packed) pack_head(tile, first_tile);
    });
    teacher_.merge_grads(chunk, first_tile, last_tile);
    if (shape_.grad_hidden) hidden_of_tiles(chunk, first_tile, last_tile);
  }

  void grad_of_tile(const Chunk& chunk, const Tile& tile, int64_t first_tile, int64_t slot) const {
    Op* transposed = workspace_.dz_transposed(slot);
    A* dz_panel = workspace_.panel(slot);
    A* sums = workspace_.entry_sums(slot);
    const auto dz = workspace_.dz(chunk, tile.index, first_tile);
    if (problem_.grad_bias) std::fill_n(sums, tile.entries, A(0));
    look_at_panels(chunk, tile, slot, [&](int64_t panel, const PanelLogits<A>& logits) {
      teacher_.grad(chunk, tile, panel, logits, dz_panel);
      const int64_t n = panel * kPanel;
      const PanelSize size{tile.entries, chunk.width(panel)};
      if (problem_.grad_bias) kernels_.panel_entry_sums(dz_panel, size, sums);
      if (shape_.grad_head)
        pack_.cast_panel(dz_panel, size, transposed + n * operands_.k_stride, chunk.padded);
      if (shape_.grad_hidden) {
        pack_.transpose_panel(dz_panel, size, shape_.depth(tile.entries), dz.data + n * dz.ld, dz.ld);
      }
    });
    if (problem_.grad_bias) {
      A* bias = static_cast<A*>(problem_.grad_bias) + tile.begin;
      for (int64_t v = 0; v < tile.entries; ++v) bias[v] = (chunk.index ? bias[v] : A(0)) + sums[v];
    }
    if (shape_.grad_head) head_gradient_.add_tile(chunk, tile, first_tile, transposed, slot);
  }

  void pack_head(const Tile& tile, int64_t first_tile) const {
    const Matrix& head = problem_.student_head;
    pack_.rows(head.row(tile.begin), head.dtype, head.ld, nullptr, tile.entries, shape_.depth(tile.entries),
               head.cols, workspace_.head_packed(tile.index, first_tile));
  }

  // dX[block of tokens, block of columns] += dz W[tiles, columns], tiles in order: the sum over the
  // vocabulary never depends on the threads.
  void hidden_of_tiles(const Chunk& chunk, int64_t first_tile, int64_t last_tile) const {
    const int64_t width = shape_.plan.hidden_columns, height = shape_.plan.hidden_tokens;
    const int64_t blocks = ceil_div(shape_.student_hidden_size, width);
    gemm_tasks(blocks * ceil_div(chunk.lanes, height), [&](int64_t task, int64_t) {
      const int64_t begin = task % blocks * width, n = task / blocks * height;
      const int64_t end = std::min(begin + width, shape_.student_hidden_size);
      for (int64_t index = first_tile; index < last_tile; ++index) {
        const int64_t depth = shape_.depth(shape_.tile(index).entries);
        const Op* packed = workspace_.head_packed(index, first_tile);
        const auto dz = workspace_.dz(chunk, index, first_tile);
        const int64_t rows = std::min(height, chunk.lanes - n);
        MemoryRows next{};
        if (index + 1 < last_tile) {
          next = MemoryRows::of(workspace_.dz(chunk, index + 1, first_tile).data + n * dz.ld, dz.ld, rows);
        }
        for (int64_t h = begin; h < end; h += kPanel) {
          const int64_t cols = std::min<int64_t>(kPanel, shape_.student_hidden_size - h);
          const Op* b = packed + h * depth;
          const Ahead ahead{next.part((h - begin) / kPanel, ceil_div(end - begin, kPanel)),
                            MemoryRows::of(b + depth * kPanel, h + kPanel < end ? depth * kPanel : 0)};
          gemm_(rows, cols, depth, dz.ld, kPanel, kPanel, index > 0, dz.data + n * dz.ld, b,
                workspace_.hidden_panel(chunk, h) + n * kPanel, ahead);
        }
      }
    });
  }

  void write_hidden(const Chunk& chunk) const {
    if (!shape_.grad_hidden) return;
    const Matrix& out = problem_.grad_hidden;
    for (int64_t h = 0; h < shape_.student_hidden_size; h += kPanel) {
      const int64_t cols = std::min<int64_t>(kPanel, shape_.student_hidden_size - h);
      for (int64_t n = 0; n < chunk.tokens; ++n) {
        const int64_t row = problem_.valid_tokens[chunk.begin + n];
        char* to = const_cast<char*>(out.row(row)) + h * bytes_of(out.dtype);
        pack_.narrow(workspace_.hidden_panel(chunk, h) + n * kPanel, kPanel, 1, cols, to, out.dtype, out.ld);
      }
    }
  }

  const LinearProblem& problem_;
  const LinearShape shape_;
  const Workspace<Op, A> workspace_;
  const Teacher teacher_;
  const KlKernels<A>& kernels_;
  const Engine<Op, A> engine_;
  const PackKernels<A, Op>& pack_;
  const Gemm<Op, A> gemm_;
  const OperandLayout operands_;
  const HeadGradient<Op, A> head_gradient_;
};

}  // namespace minitron
