// Memory that will be read soon, fetched a line at a time between other work, which then does not wait for
// it. Hardware prefetchers begin anew at each page and each row of a matrix, and prefetches in a burst wait
// for the first of them.
#pragma once

#include "common/cpu/memory_sizes.h"

namespace minitron {

// Rows of so many bytes, `stride` bytes apart.
struct MemoryRows {
  const char* data = nullptr;
  int64_t rows = 0, bytes = 0, stride = 0;

  // `rows` rows of `count` elements that follow each other.
  template <typename T>
  static MemoryRows of(const T* data, int64_t count, int64_t rows = 1) {
    const int64_t bytes = count * int64_t(sizeof(T));
    return {reinterpret_cast<const char*>(data), rows, bytes, bytes};
  }
  [[gnu::always_inline]] int64_t lines() const { return rows * ((bytes + kLineBytes - 1) / kLineBytes); }
  // The i-th of n parts.
  MemoryRows part(int64_t i, int64_t n) const {
    const int64_t first = rows * i / n;
    return {data + first * stride, rows * (i + 1) / n - first, bytes, stride};
  }
};

// What is read after a GEMM: a part of what the next A operand is or is made of, which may come from memory,
// and the B operand of the next GEMM.
struct Ahead {
  MemoryRows a{}, b{};
};

// Goes through the lines of both. next() is for inner loops: a comparison and a prefetch into the L2. All of
// it is always inline: a copy of its own, compiled for one instruction set, could be called on a CPU without
// it.
class Fetcher {
 public:
  [[gnu::always_inline]] explicit Fetcher(const Ahead& ahead) : rows_(ahead.a), then_(ahead.b) {
    begin_row();
  }

  [[gnu::always_inline]] void next() {
    if (line_ >= end_ && !begin_row()) return;
    __builtin_prefetch(line_, 0, 2);
    line_ += kLineBytes;
  }

 private:
  [[gnu::always_inline]] bool begin_row() {
    if (rows_.rows <= 0) {
      rows_ = then_;
      then_ = {};
      if (rows_.rows <= 0) return false;
    }
    line_ = rows_.data;
    end_ = rows_.data + rows_.bytes;
    rows_.data += rows_.stride;
    --rows_.rows;
    return line_ < end_;
  }

  MemoryRows rows_, then_;
  const char *line_ = nullptr, *end_ = nullptr;
};

}  // namespace minitron
