// dW = dz^T X of the linear losses, a tile of the vocabulary at a time: added up where there are several
// chunks of tokens or a caller's accumulator, else gathered in cache and written once, by whole rows.
#pragma once

#include "common/cpu/pages.h"
#include "common/cpu/stream.h"
#include "kl_loss/cpu/engine.h"
#include "kl_loss/cpu/linear_workspace.h"

namespace minitron {

template <typename Op, typename A>
class HeadGradient {
 public:
  HeadGradient(const LinearProblem& problem, const LinearShape& shape, const Workspace<Op, A>& workspace,
               const PackKernels<A, Op>& pack, const Gemm<Op, A>& gemm)
      : problem_(problem),
        shape_(shape),
        workspace_(workspace),
        pack_(pack),
        gemm_(gemm),
        operands_(shape.operands()) {
    const Matrix& given = problem_.grad_head_accumulator;
    if (given.data) {
      target_ = {static_cast<A*>(const_cast<void*>(given.data)), given.ld, true};
    } else if (shape_.gathers_head()) {
      target_ = {};
    } else if (shape_.head_in_place) {
      target_ = {static_cast<A*>(const_cast<void*>(problem_.grad_head.data)), problem_.grad_head.ld, false};
    } else {
      target_ = {workspace_.head_accumulator(), shape_.student_hidden_size, false};
    }
    const Matrix& out = problem_.grad_head;
    if (out.data && out.ld == out.cols) {  // padding behind the vocabulary has been zeroed, in its last page
      is_new_ = is_new(out.data, shape_.vocab_size * out.cols * bytes_of(out.dtype) - kPageBytes);
    }
  }

  // A tile's part, from the tokens of a chunk. dz_transposed: the A operand [entries, tokens].
  void add_tile(const Chunk& chunk, const Tile& tile, int64_t first_tile, const Op* dz_transposed,
                int64_t slot) const {
    if (!target_.data) return write_tile(chunk, tile, dz_transposed, slot);
    // recompute's own accumulator holds one tile group
    const bool one_group = workspace_.head_accumulator() && shape_.plan.schedule == Schedule::kRecompute;
    const int64_t row = one_group ? tile.begin - first_tile * shape_.plan.tile : tile.begin;
    A* rows = target_.data + row * target_.ld;
    const bool add = chunk.index > 0 || target_.has_value;
    const Matrix& out = problem_.grad_head;
    const bool is_output = out.data && shape_.head_in_place;
    if (!add && is_output) map_rows(tile);
    for (int64_t h = 0; h < shape_.student_hidden_size; h += kPanel) {
      multiply(chunk, tile.entries, dz_transposed, h, add, rows + h, target_.ld);
    }
    if (chunk.index + 1 == shape_.chunks() && out.data && !is_output) {
      map_rows(tile);
      pack_.narrow(rows, target_.ld, tile.entries, shape_.student_hidden_size, row_of(out, tile.begin),
                   out.dtype, out.ld);
    }
  }

 private:
  // Where the gradient adds up; data null: a tile's is finished at once.
  struct Target {
    A* data = nullptr;
    int64_t ld = 0;
    bool has_value = false;  // to which the first chunk adds, too
  };

  // The rows of a tile are written next.
  void map_rows(const Tile& tile) const {
    const Matrix& out = problem_.grad_head;
    if (is_new_) map_pages(row_of(out, tile.begin), tile.entries * out.cols * bytes_of(out.dtype));
  }
  static char* row_of(const Matrix& out, int64_t row) { return const_cast<char*>(out.row(row)); }

  // kPanel columns from h on, in chains of kMaxChain.
  void multiply(const Chunk& chunk, int64_t rows, const Op* dz_transposed, int64_t h, bool add, A* out,
                int64_t ld) const {
    const int64_t cols = std::min<int64_t>(kPanel, shape_.student_hidden_size - h);
    const Op* hidden = workspace_.hidden_packed() + h * chunk.padded;
    for (int64_t n = 0; n < chunk.lanes; n += kMaxChain) {
      const int64_t chain = std::min(kMaxChain, chunk.lanes - n);
      // panels follow each other: behind the last chain the next panel begins
      const Op* next = hidden + (n + chain < chunk.lanes ? n + chain : chunk.padded) * kPanel;
      const bool is_last = n + chain >= chunk.lanes && h + kPanel >= shape_.student_hidden_size;
      const Ahead ahead{{}, MemoryRows::of(next, is_last ? 0 : chain * kPanel)};
      gemm_(rows, cols, chain, chunk.padded, kPanel, ld, add || n > 0, dz_transposed + n * operands_.k_stride,
            hidden + n * kPanel, out, ahead);
    }
  }

  void write_tile(const Chunk& chunk, const Tile& tile, const Op* dz_transposed, int64_t slot) const {
    const Matrix& out = problem_.grad_head;
    const int64_t width = shape_.student_hidden_size, element = bytes_of(out.dtype);
    A* panel = workspace_.panel(slot);
    char* gathered = workspace_.head_rows(slot);
    for (int64_t v = 0; v < tile.entries; v += shape_.plan.head_rows) {
      const int64_t rows = std::min(shape_.plan.head_rows, tile.entries - v);
      for (int64_t h = 0; h < width; h += kPanel) {
        multiply(chunk, rows, dz_transposed + v * chunk.padded, h, false, panel, kPanel);
        pack_.narrow(panel, kPanel, rows, std::min<int64_t>(kPanel, width - h), gathered + h * element,
                     out.dtype, width);
      }
      const int64_t pieces = out.ld == width ? 1 : rows, bytes = rows / pieces * width * element;
      for (int64_t i = 0; i < pieces; ++i) {
        write(row_of(out, tile.begin + v + i), gathered + i * width * element, bytes);
      }
    }
    if (shape_.plan.stream_head) stream_fence();
  }

  void write(char* to, const char* from, int64_t bytes) const {
    if (shape_.plan.stream_head) {
      stream_copy(to, from, bytes);
    } else {
      if (is_new_) map_pages(to, bytes);
      std::memcpy(to, from, bytes);
    }
  }

  const LinearProblem& problem_;
  const LinearShape& shape_;
  const Workspace<Op, A>& workspace_;
  const PackKernels<A, Op>& pack_;
  const Gemm<Op, A>& gemm_;
  const OperandLayout operands_;
  Target target_;
  bool is_new_ = false;  // the output: rows that follow each other, in memory that was never written
};

}  // namespace minitron
