// Makes a plan from the kept columns. Where these are sorted and random, a line of the output comes from a
// window that is a little wider than the line: one shuffle replaces a load and a store for each element.
// Where a level can only shuffle 16 bytes, the elements of one such window after the other are packed.
#pragma once

#include <algorithm>

#include "gather/cpu/kernels.h"

namespace minitron {

// With fewer elements per shuffle than this on average, a line is made as fast element by element.
constexpr int64_t kElementsPerStep = 2;
// The same for packing, of which a step does less: in fifths.
constexpr int64_t kFifthsPerPack = 8;

struct LinePlan {
  std::vector<Step> steps;
  std::vector<Lanes> lanes;
};

// The shuffles that make a whole line of the elements `cols`; none: too many.
inline LinePlan plan_line(const GatherKernels& kernels, const int64_t* cols, int64_t element_size,
                          int64_t row_bytes) {
  const int64_t window = kernels.shuffle.window, count = kLineBytes / element_size;
  if (window == 0 || window > row_bytes || element_size < kernels.shuffle.unit) return {};
  LinePlan plan;
  bool placed[kLineBytes] = {};
  int64_t left = count;
  for (int64_t step = 0; step < count / kElementsPerStep && left > 0; ++step) {
    int64_t lowest = row_bytes;
    for (int64_t i = 0; i < count; ++i) {
      if (!placed[i]) lowest = std::min(lowest, cols[i] * element_size);
    }
    const int64_t from = std::min(lowest, row_bytes - window);
    uint8_t source_of[kLineBytes];
    std::fill_n(source_of, kLineBytes, kNoByte);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = cols[i] * element_size - from;
      if (placed[i] || at < 0 || at + element_size > window) continue;
      for (int64_t byte = 0; byte < element_size; ++byte)
        source_of[i * element_size + byte] = uint8_t(at + byte);
      placed[i] = true, --left;
    }
    plan.steps.push_back({int32_t(from), 0});
    plan.lanes.emplace_back();
    kernels.encode(source_of, &plan.steps.back(), plan.lanes.back().byte);
  }
  return left == 0 ? plan : LinePlan{};
}

// How many of the next elements, at least one, lie in one window of kPackWindow bytes; where it begins.
struct Window {
  int64_t count, from;
};

inline Window next_window(const int64_t* cols, int64_t count, int64_t element_size, int64_t row_bytes) {
  int64_t low = cols[0], high = cols[0], n = 1;
  for (; n < count && (n + 1) * element_size <= kPackWindow; ++n) {
    const int64_t lower = std::min(low, cols[n]), higher = std::max(high, cols[n]);
    if ((higher - lower + 1) * element_size > kPackWindow) break;
    low = lower, high = higher;
  }
  return {n, std::min(low * element_size, row_bytes - kPackWindow)};
}

// Whether a line of the elements `cols` is made faster by packing.
inline bool packs_well(const int64_t* cols, int64_t element_size, int64_t row_bytes) {
  if (row_bytes < kPackWindow) return false;
  const int64_t count = kLineBytes / element_size;
  int64_t packs = 0;
  for (int64_t i = 0; i < count; i += next_window(cols + i, count - i, element_size, row_bytes).count)
    ++packs;
  return packs * kFifthsPerPack <= count * 5;
}

inline void add_packs(GatherPlan& plan, Segment& segment) {
  const int64_t size = plan.element_size, begin = segment.to / size, end = begin + segment.bytes / size;
  segment.first = int64_t(plan.packs.size());
  for (int64_t i = begin; i < end;) {
    const Window window = next_window(plan.cols + i, end - i, size, plan.row_bytes);
    Pack pack{{}, int32_t(window.from), int32_t(window.count * size)};
    for (int64_t byte = 0; byte < pack.bytes; ++byte) {
      pack.byte[byte] = uint8_t(plan.cols[i + byte / size] * size + byte % size - window.from);
    }
    plan.packs.push_back(pack);
    i += window.count;
  }
  segment.steps = int64_t(plan.packs.size()) - segment.first;
}

// Appends a segment, or makes the last one longer. Those to be packed stay within kPieceBytes.
inline void add_segment(std::vector<Segment>& segments, const Segment& next) {
  if (!segments.empty()) {
    Segment& last = segments.back();
    if (last.kind == next.kind && last.steps == next.steps &&
        (next.kind != Segment::kPack || last.bytes + next.bytes <= kPieceBytes)) {
      last.bytes += next.bytes;
      return;
    }
  }
  segments.push_back(next);
}

inline GatherPlan make_plan(const GatherKernels& kernels, const int64_t* cols, int64_t count,
                            int64_t element_size, int64_t row_bytes) {
  GatherPlan plan{cols, element_size, row_bytes, {}, {}, {}, {}, {}};
  const int64_t per_line = kLineBytes / element_size;
  for (int64_t begin = 0; begin < count; begin += per_line) {
    const int64_t n = std::min(per_line, count - begin), to = begin * element_size, bytes = n * element_size;
    const int64_t* here = cols + begin;
    bool is_run = n == per_line;
    for (int64_t i = 1; i < n; ++i) is_run &= here[i] == here[0] + i;
    if (is_run) {
      add_segment(plan.segments, {Segment::kLines, to, bytes, int64_t(plan.lines.size()), 0});
      plan.lines.push_back(int32_t(here[0] * element_size));
      continue;
    }
    const LinePlan line = n == per_line ? plan_line(kernels, here, element_size, row_bytes) : LinePlan{};
    if (!line.steps.empty()) {
      add_segment(plan.segments,
                  {Segment::kShuffle, to, bytes, int64_t(plan.steps.size()), int64_t(line.steps.size())});
      plan.steps.insert(plan.steps.end(), line.steps.begin(), line.steps.end());
      plan.lanes.insert(plan.lanes.end(), line.lanes.begin(), line.lanes.end());
    } else if (n == per_line && kernels.packs && packs_well(here, element_size, row_bytes)) {
      add_segment(plan.segments, {Segment::kPack, to, bytes, 0, 0});
    } else {
      add_segment(plan.segments, {Segment::kElements, to, bytes, 0, 0});
    }
  }
  for (Segment& segment : plan.segments) {
    if (segment.kind == Segment::kPack) add_packs(plan, segment);
  }
  return plan;
}

// All of a row that is whole lines.
inline GatherPlan plan_of_all(int64_t row_bytes) {
  GatherPlan plan{nullptr, 1, row_bytes, {}, {}, {}, {}, {}};
  plan.segments.push_back({Segment::kLines, 0, row_bytes, 0, 0});
  for (int64_t at = 0; at < row_bytes; at += kLineBytes) plan.lines.push_back(int32_t(at));
  return plan;
}

}  // namespace minitron
