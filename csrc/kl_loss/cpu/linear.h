// linear_kl_loss on CPU: hidden states and heads in, loss and gradients out, logits only ever in tiles.
//
// Logits are made with the vocabulary down and the tokens across: C[tile of V, tokens] = W[tile, H] X^T[H,
// tokens]. The head W, the only large operand, is then read as it lies in memory (the A of the GEMM), the few
// hidden states are packed once per chunk, and the tile of dz is at once the A operand of dW = dz^T X. Phases
// of a chunk of rows:
//   logits  one task per tile of V: both logits, their maxima and sums of exp
//   merge   one task per run of rows: tiles in order, in double; so any thread count gives the same bits
//   grad    one task per tile of V: dz from logits and row stats, dW of the tile (done, or added to fp32)
//   hidden  one task per block of columns: dX += dz W over the tiles in order
#pragma once

#include "kl_loss/cpu/linear_rows.h"

namespace minitron {

template <typename Op, typename A>
class LinearKl : private LinearRows<Op, A> {
  using Base = LinearRows<Op, A>;
  using Base::p_, Base::s_, Base::layout_, Base::base_, Base::chunk, Base::tile, Base::is_stored, Base::at,
      Base::partials, Base::tile_loss, Base::tile_kl, Base::row_stats, Base::row_weights, Base::stored_logits,
      Base::dz, Base::hidden_panel, Base::merge_stats, Base::merge_loss, Base::merge_mixture_kl,
      Base::load_stats, Base::wants_tile_kl;
  using typename Base::Chunk, typename Base::Tile, typename Base::Dz;

 public:
  LinearKl(const LinearProblem& problem, const LinearShape& shape, Gemm<Op, A> gemm, char* workspace)
      : Base(problem, shape, workspace),
        kl_(cpu_kernels().kl<A>()),
        pack_(cpu_kernels().pack<Op>()),
        gemm_(gemm) {}

  void run() {
    if (p_.head_accumulator.data) {
      head_target_ = {const_cast<void*>(p_.head_accumulator.data), p_.head_accumulator.ld, true};
    } else if (s_.head_in_place) {
      head_target_ = {const_cast<void*>(p_.grad_head.data), p_.grad_head.ld, false};
    } else if (layout_.head_accumulator.bytes) {
      head_target_ = {base_ + layout_.head_accumulator.offset, s_.student_width, false};
    }
    if (s_.schedule == Schedule::kStore) {
      for (int64_t c = 0; c < s_.chunks(); ++c) run_stored_chunk(c);
    } else {
      run_recomputed();
    }
  }

 private:
  // Where the fp32 gradient of the head grows; data null: a tile is finished at once, in scratch.
  struct HeadTarget {
    void* data = nullptr;
    int64_t ld = 0;
    bool has_value = false;  // holds something to add to before the first chunk
  };
  void run_stored_chunk(int64_t index) {
    const Chunk c = chunk(index);
    pack(c);
    reduce_logits(c);
    if (p_.stats_given) {
      load_stats(c);
    } else {
      merge_stats(c);
      if (p_.options.kind() == Divergence::kJsd) sum_kl(c);
    }
    for (int64_t first = 0; first < s_.tiles(); first += s_.super_tiles) {
      grad(c, first, std::min(s_.tiles(), first + s_.super_tiles));
    }
    write_hidden(c);
  }

  void run_recomputed() {
    for (int64_t i = 0; i < s_.chunks(); ++i) {
      const Chunk c = chunk(i);
      if (p_.stats_given) {
        load_stats(c);
        continue;
      }
      pack(c);
      reduce_logits(c);
      merge_stats(c);
      if (p_.options.kind() == Divergence::kJsd) sum_kl(c);
    }
    if (s_.schedule == Schedule::kForward) return;
    for (int64_t first = 0; first < s_.tiles(); first += s_.super_tiles) {
      for (int64_t i = 0; i < s_.chunks(); ++i) {
        const Chunk c = chunk(i);
        if (s_.chunks() > 1 || p_.stats_given) pack(c);
        grad(c, first, std::min(s_.tiles(), first + s_.super_tiles));
      }
    }
    for (int64_t i = 0; i < s_.chunks(); ++i) write_hidden(chunk(i));
  }

  // Hidden states as B operands: transposed for the logits, and as they are for dW.
  void pack(const Chunk& c) {
    const int64_t* index = p_.rows.data() + c.begin;
    const int64_t panels = c.padded / kPanel;
    parallel_tasks(panels, [&](int64_t panel, int64_t) {
      const int64_t first = panel * kPanel, rows = std::min<int64_t>(kPanel, c.rows - first);
      const auto side = [&](const Matrix& x, int64_t offset) {
        pack_.transposed(x.data, x.dtype, x.ld, index + first, rows, x.cols,
                         this->template at<Op>(offset) + first * s_.depth(x.cols));
      };
      side(p_.student_hidden, layout_.student_packed);
      side(p_.teacher_hidden, layout_.teacher_packed);
    });
    if (!s_.grad_head) return;
    const Matrix& x = p_.student_hidden;
    parallel_tasks(ceil_div(s_.student_width, kPanel), [&](int64_t panel, int64_t) {
      const int64_t first = panel * kPanel, cols = std::min<int64_t>(kPanel, s_.student_width - first);
      const char* src = static_cast<const char*>(x.data) + first * bytes_of(x.dtype);
      pack_.rows(src, x.dtype, x.ld, index, c.rows, c.padded, cols,
                 this->template at<Op>(layout_.hidden_packed) + first * c.padded);
    });
  }

  // C[tile, panels of tokens] = W[tile, :] X^T for panels [first, last) of the packed hidden states.
  void make_logits(const Matrix& head, int64_t packed, const Tile& t, int64_t first, int64_t last, A* out,
                   int64_t slot) const {
    const int64_t depth = s_.depth(head.cols);
    const bool direct = head.dtype == kDTypeOf<Op> && depth == head.cols;
    for (int64_t k = 0; k < depth; k += kMaxChain) {
      const int64_t chain = std::min(kMaxChain, depth - k);
      const char* block = head.row(t.begin) + k * bytes_of(head.dtype);
      const Op* a = reinterpret_cast<const Op*>(block);
      if (!direct) {
        Op* converted = this->template scratch<Op>(layout_.a_block, slot);
        pack_.convert(block, head.dtype, head.ld, t.rows, std::min(chain, head.cols - k), chain, converted);
        a = converted;
      }
      for (int64_t panel = first; panel < last; ++panel) {
        gemm_(t.rows, kPanel, chain, direct ? head.ld : chain, kPanel, kPanel, k > 0, a,
              this->template at<Op>(packed) + (panel * depth + k) * kPanel,
              out + (panel - first) * s_.tile * kPanel);
      }
    }
  }

  // Both logits of panels [first, last), either where the chunk stores them or in this thread's scratch.
  struct Logits {
    A *student, *teacher;
  };
  Logits place_of_logits(const Chunk& c, const Tile& t, int64_t first, int64_t slot) const {
    if (is_stored(t.index)) {
      const int64_t offset = first * s_.tile * kPanel;
      return {stored_logits(c, t.index, 0) + offset, stored_logits(c, t.index, 1) + offset};
    }
    A* block = this->template scratch<A>(layout_.logits_block, slot);
    return {block, block + s_.tile * std::min(s_.padded_chunk(), kRowBlock)};
  }

  // Calls f(panel, student, teacher) for each panel of a tile; `make` says whether the logits must be made.
  template <typename F>
  void each_panel(const Chunk& c, const Tile& t, int64_t slot, bool make, F&& f) const {
    constexpr int64_t kBlockPanels = kRowBlock / kPanel;
    for (int64_t first = 0; first < c.padded / kPanel; first += kBlockPanels) {
      const int64_t last = std::min(first + kBlockPanels, c.padded / kPanel);
      const Logits z = place_of_logits(c, t, first, slot);
      if (make) {
        make_logits(p_.student_head, layout_.student_packed, t, first, last, z.student, slot);
        make_logits(p_.teacher_head, layout_.teacher_packed, t, first, last, z.teacher, slot);
      }
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t offset = (panel - first) * s_.tile * kPanel;
        f(panel, z.student + offset, z.teacher + offset);
      }
    }
  }

  void transform_and_reduce(const Chunk& c, const Tile& t, int64_t panel, A* student, A* teacher) const {
    const auto bias = [&](const void* b) { return b ? static_cast<const A*>(b) + t.begin : nullptr; };
    kl_.panel_stats(student, teacher, t.rows, bias(p_.student_bias), bias(p_.teacher_bias), p_.options,
                    wants_tile_kl(), partials(c, t.index) + panel * kPanel, c.padded);
  }

  void reduce_logits(const Chunk& c) const {
    parallel_tasks(s_.tiles(), [&](int64_t index, int64_t slot) {
      const Tile t = tile(index);
      each_panel(c, t, slot, true, [&](int64_t panel, A* student, A* teacher) {
        transform_and_reduce(c, t, panel, student, teacher);
      });
      brgemm_release();
    });
  }

  // JSD: its gradient needs KL(S || M) of the row, which only a second look at the logits can give; so does
  // its loss.
  void sum_kl(const Chunk& c) const {
    parallel_tasks(s_.tiles(), [&](int64_t index, int64_t slot) {
      const Tile t = tile(index);
      const bool make = !is_stored(index);
      each_panel(c, t, slot, make, [&](int64_t panel, A* student, A* teacher) {
        if (make) transform_and_reduce(c, t, panel, student, teacher);
        const int64_t n = panel * kPanel;
        kl_.panel_kl(student, teacher, t.rows, p_.options, row_stats(c) + n, c.padded, tile_kl(c, index) + n,
                     tile_loss(c, index) + n);
      });
      brgemm_release();
    });
    merge_mixture_kl(c);
  }

  void grad(const Chunk& c, int64_t first_tile, int64_t last_tile) const {
    parallel_tasks(last_tile - first_tile, [&](int64_t i, int64_t slot) {
      grad_of_tile(c, tile(first_tile + i), first_tile, slot);
      brgemm_release();
    });
    merge_loss(c, first_tile, last_tile);
    if (s_.grad_hidden) hidden_of_tiles(c, first_tile, last_tile);
  }

  void grad_of_tile(const Chunk& c, const Tile& t, int64_t first_tile, int64_t slot) const {
    const bool make = !is_stored(t.index);
    Op* transposed = this->template scratch<Op>(layout_.dz_transposed, slot);
    A* dz_panel = this->template scratch<A>(layout_.panel, slot);
    A* sums = this->template scratch<A>(layout_.row_sums, slot);
    const Dz out = dz(c, t.index, first_tile);
    if (p_.grad_bias) std::fill_n(sums, t.rows, A(0));
    each_panel(c, t, slot, make, [&](int64_t panel, A* student, A* teacher) {
      if (make) transform_and_reduce(c, t, panel, student, teacher);
      const int64_t n = panel * kPanel;
      kl_.panel_grad(student, teacher, t.rows, p_.options, row_stats(c) + n, c.padded, row_weights(c) + n,
                     dz_panel, tile_loss(c, t.index) + n);
      if (p_.grad_bias) kl_.panel_row_sums(dz_panel, t.rows, sums);
      if (s_.grad_head) pack_.cast_panel(dz_panel, t.rows, transposed + n, c.padded);
      if (s_.grad_hidden) {
        pack_.transpose_panel(dz_panel, t.rows, out.data + n * out.ld, out.ld);
        for (int64_t i = 0; i < kPanel && t.rows < s_.depth(t.rows); ++i)
          out.data[(n + i) * out.ld + t.rows] = Op{};
      }
    });
    if (p_.grad_bias) {
      A* bias = static_cast<A*>(p_.grad_bias) + t.begin;
      for (int64_t v = 0; v < t.rows; ++v) bias[v] = (c.index ? bias[v] : A(0)) + sums[v];
    }
    if (s_.grad_head) head_of_tile(c, t, first_tile, transposed, slot);
  }

  // dW of a tile = dz^T X, over the rows of the chunk in chains of kMaxChain.
  void head_of_tile(const Chunk& c, const Tile& t, int64_t first_tile, const Op* dz_transposed,
                    int64_t slot) const {
    const bool last = c.index + 1 == s_.chunks(), accumulates = head_target_.data != nullptr;
    const bool own = accumulates && layout_.head_accumulator.bytes && s_.schedule == Schedule::kRecompute;
    const int64_t row =
        own ? t.begin - first_tile * s_.tile : t.begin;  // recompute's accumulator is one stretch
    const int64_t ld = accumulates ? head_target_.ld : kPanel;
    for (int64_t h = 0; h < s_.student_width; h += kPanel) {
      const int64_t cols = std::min<int64_t>(kPanel, s_.student_width - h);
      A* out = accumulates ? static_cast<A*>(head_target_.data) + row * ld + h
                           : this->template scratch<A>(layout_.panel, slot);
      for (int64_t n = 0; n < c.padded; n += kMaxChain) {
        gemm_(t.rows, cols, std::min(kMaxChain, c.padded - n), c.padded, kPanel, ld,
              n > 0 || (accumulates && (c.index > 0 || head_target_.has_value)), dz_transposed + n,
              this->template at<Op>(layout_.hidden_packed) + h * c.padded + n * kPanel, out);
      }
      if (last && p_.grad_head.data && !s_.head_in_place) {
        char* to = const_cast<char*>(p_.grad_head.row(t.begin)) + h * bytes_of(p_.grad_head.dtype);
        pack_.narrow(out, ld, t.rows, cols, to, p_.grad_head.dtype, p_.grad_head.ld);
      }
    }
  }

  // dX[:, block] += dz W[tiles, block], tiles in order: the sum over the vocabulary never depends on the
  // threads.
  void hidden_of_tiles(const Chunk& c, int64_t first_tile, int64_t last_tile) const {
    const int64_t blocks = ceil_div(s_.student_width, kHiddenBlock),
                  row_blocks = ceil_div(c.padded, kRowBlock);
    parallel_tasks(blocks * row_blocks, [&](int64_t task, int64_t slot) {
      const int64_t h = task % blocks * kHiddenBlock, n = task / blocks * kRowBlock;
      const int64_t cols = std::min(kHiddenBlock, s_.student_width - h);
      const int64_t rows = std::min(kRowBlock, c.padded - n);
      Op* panels = this->template scratch<Op>(layout_.head_panels, slot);
      for (int64_t index = first_tile; index < last_tile; ++index) {
        const Tile t = tile(index);
        const int64_t depth = s_.depth(t.rows);
        const char* head = p_.student_head.row(t.begin) + h * bytes_of(p_.student_head.dtype);
        pack_.rows(head, p_.student_head.dtype, p_.student_head.ld, nullptr, t.rows, depth, cols, panels);
        const Dz a = dz(c, index, first_tile);
        for (int64_t panel = 0; panel < cols; panel += kPanel) {
          gemm_(rows, kPanel, depth, a.ld, kPanel, kPanel, index > 0, a.data + n * a.ld,
                panels + panel * depth, hidden_panel(c, h + panel) + n * kPanel);
        }
      }
      brgemm_release();
    });
  }

  void write_hidden(const Chunk& c) const {
    if (!s_.grad_hidden) return;
    const Matrix& out = p_.grad_hidden;
    for (int64_t h = 0; h < s_.student_width; h += kPanel) {
      const int64_t cols = std::min<int64_t>(kPanel, s_.student_width - h);
      for (int64_t n = 0; n < c.rows; ++n) {
        char* to = const_cast<char*>(out.row(p_.rows[c.begin + n])) + h * bytes_of(out.dtype);
        pack_.narrow(hidden_panel(c, h) + n * kPanel, kPanel, 1, cols, to, out.dtype, out.ld);
      }
    }
  }

  const KlKernels<A>& kl_;
  const PackKernels<A, Op>& pack_;
  const Gemm<Op, A> gemm_;
  HeadTarget head_target_;
};

}  // namespace minitron
