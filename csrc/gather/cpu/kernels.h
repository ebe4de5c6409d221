// The CPU kernels of gather, one table per SIMD level; a plan tells them how to make a row.
#pragma once

#include <cstdint>
#include <vector>

#include "common/cpu/simd.h"
#include "common/types.h"

namespace minitron {

// What a plan decides about, and what a store around the caches must fill at once.
constexpr int64_t kLineBytes = 64;
constexpr int64_t kMaxRowBytes = INT32_MAX;

// What a level's shuffle can do: from any `window` bytes of a row to any places of a `block` of a line, in
// units of `unit` bytes. window 0: the level has none.
struct ShuffleShape {
  int64_t block, window, unit;
};

// One shuffle: of the window that begins `from` bytes into the row. Units that it does not fill are zero.
struct Step {
  int32_t from;
  uint32_t filled;  // a bit for each unit of the block
};

// A block's bytes for each step of it, in the level's own encoding; at lines, so that no load straddles two.
struct alignas(kLineBytes) Lanes {
  uint8_t byte[kLineBytes];
};

// A stretch of the output row, whole lines but for its end.
struct Segment {
  enum Kind { kLines, kShuffle, kElements } kind;
  int64_t to, bytes;  // of the output row
  int64_t first;      // kLines: of `lines`; kShuffle: of `steps`
  int64_t steps;      // kShuffle: of each block
};

// How to make one output row; the same for all rows, since all keep the same columns.
struct GatherPlan {
  const int64_t* cols;
  int64_t width;  // bytes of an element
  std::vector<Segment> segments;
  std::vector<int32_t> lines;  // where in the source row each copied line begins, bytes
  std::vector<Step> steps;
  std::vector<Lanes> lanes;  // of the steps, one after the other
};

struct GatherKernels {
  ShuffleShape wide;   // for elements of at least its unit
  ShuffleShape bytes;  // for elements of one byte
  // source_of[i]: the byte of the window that goes to byte i of the block, or kNoByte.
  void (*encode)(const ShuffleShape&, const uint8_t* source_of, Step*, uint8_t* lanes);
  // stream: the stores go around the caches; `out` must then be a multiple of kLineBytes.
  void (*row)(const GatherPlan&, const char* source, char* out, bool stream);
};
constexpr uint8_t kNoByte = 0xff;

MINITRON_TABLE_PER_LEVEL(GatherKernels, gather_kernels)

}  // namespace minitron
