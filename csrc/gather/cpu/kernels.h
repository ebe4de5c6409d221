// The CPU kernels of gather, one table per SIMD level. A plan says how to make a row.
#pragma once

#include <cstdint>
#include <vector>

#include "common/cpu/memory_sizes.h"
#include "common/cpu/simd.h"
#include "common/types.h"

namespace minitron {

// A plan decides about cache lines one by one, and a streaming store must fill one at once: kLineBytes.
constexpr int64_t kMaxRowBytes = INT32_MAX;

// What a level's shuffle can do: move units of `unit` bytes from anywhere in a `window` of a row to anywhere
// in a line; the sizes are in bytes. window 0: the level has no such shuffle.
struct ShuffleShape {
  int64_t window, unit;
};

// One shuffle, of the window that begins `from` bytes into the row. Units that it does not fill become zero.
struct Step {
  int32_t from;
  uint32_t filled;  // a bit for each unit of the line
};

// Which unit of the window goes where, in the level's own encoding. Aligned to lines, so that no load crosses
// a border.
struct alignas(kLineBytes) Lanes {
  uint8_t byte[kLineBytes];
};

// What packs: the next elements of the row, as many as lie in one window of kPackWindow bytes.
constexpr int64_t kPackWindow = 16;
struct alignas(kPackWindow) Pack {
  uint8_t byte[kPackWindow];  // which byte of the window goes where
  int32_t from;               // where in the source row the window begins
  int32_t bytes;              // how many of the bytes are elements
};

// A part of the output row that is made in one way; whole lines, except at the row's end.
struct Segment {
  enum Kind { kLines, kShuffle, kPack, kElements } kind;
  int64_t to, bytes;  // where in the output row
  int64_t first;      // kLines: of `lines`; kShuffle: of `steps`; kPack: of `packs`
  int64_t steps;      // kShuffle: of each line; kPack: of all of it
};
// The most bytes of a segment that is packed: it is made aside, in the L1 cache, for each row of a group.
constexpr int64_t kPieceBytes = 1024;

// How to make an output row. All rows keep the same columns, so one plan is enough.
struct GatherPlan {
  const int64_t* cols;
  int64_t element_size;  // bytes of an element
  int64_t row_bytes;     // of a row of the source
  std::vector<Segment> segments;
  std::vector<int32_t> lines;  // where in the source row each copied line begins, bytes
  std::vector<Step> steps;
  std::vector<Lanes> lanes;  // those of the steps, one after the other
  std::vector<Pack> packs;
};

// Rows that are made together.
constexpr int64_t kGroupRows = 4;
struct RowGroup {
  int64_t count;  // 1..kGroupRows
  const char* source[kGroupRows];
  const char* next[kGroupRows];  // the sources of the following rows, to be prefetched
  char* out[kGroupRows];
  bool stream;  // with stores that go around the caches; every `out` must then be a multiple of kLineBytes
};

struct GatherKernels {
  ShuffleShape shuffle;  // for elements of at least its unit
  bool packs;            // for elements of any size
  // source_of[i]: the byte of the window that goes to byte i of the line, or kNoByte.
  void (*encode)(const uint8_t* source_of, Step*, uint8_t* lanes);
  void (*rows)(const GatherPlan&, const RowGroup&);
};
constexpr uint8_t kNoByte = 0xff;

MINITRON_TABLE_PER_LEVEL(GatherKernels, gather_kernels)

}  // namespace minitron
