// The CPU kernels of gather, one table per SIMD level. A plan says how to make a row.
#pragma once

#include <cstdint>
#include <vector>

#include "common/cpu/simd.h"
#include "common/types.h"

namespace minitron {

// A cache line: what a plan decides about one by one, and what a streaming store must fill at once.
constexpr int64_t kLineBytes = 64;
constexpr int64_t kMaxRowBytes = INT32_MAX;

// What a level's shuffle can do: move units of `unit` bytes from anywhere in a `window` of a row to anywhere
// in a `block` of a line; the sizes are in bytes. window 0: the level has no shuffle.
struct ShuffleShape {
  int64_t block, window, unit;
};

// One shuffle, of the window that begins `from` bytes into the row. Units that it does not fill become zero.
struct Step {
  int32_t from;
  uint32_t filled;  // a bit for each unit of the block
};

// Which byte of the window goes where, in the level's own encoding. Aligned to lines, so that no load crosses
// a border.
struct alignas(kLineBytes) Lanes {
  uint8_t byte[kLineBytes];
};

// A part of the output row that is made in one way; whole lines, except at the row's end.
struct Segment {
  enum Kind { kLines, kShuffle, kElements } kind;
  int64_t to, bytes;  // where in the output row
  int64_t first;      // kLines: of `lines`; kShuffle: of `steps`
  int64_t steps;      // kShuffle: of each block
};

// How to make an output row. All rows keep the same columns, so one plan is enough.
struct GatherPlan {
  const int64_t* cols;
  int64_t element_size;  // bytes of an element
  std::vector<Segment> segments;
  std::vector<int32_t> lines;  // where in the source row each copied line begins, bytes
  std::vector<Step> steps;
  std::vector<Lanes> lanes;  // those of the steps, one after the other
};

struct GatherKernels {
  ShuffleShape wide;   // for elements of at least its unit
  ShuffleShape bytes;  // for elements of one byte
  // source_of[i]: the byte of the window that goes to byte i of the block, or kNoByte.
  void (*encode)(const ShuffleShape&, const uint8_t* source_of, Step*, uint8_t* lanes);
  // stream: with stores that go around the caches; `out` must then be a multiple of kLineBytes.
  void (*row)(const GatherPlan&, const char* source, char* out, bool stream);
};
constexpr uint8_t kNoByte = 0xff;

MINITRON_TABLE_PER_LEVEL(GatherKernels, gather_kernels)

}  // namespace minitron
