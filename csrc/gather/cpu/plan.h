// Makes a plan from the kept columns. Where these are sorted and random, a block of the output comes from a
// window that is a little wider than the block: one shuffle replaces a load and a store for each element.
#pragma once

#include <algorithm>

#include "gather/cpu/kernels.h"

namespace minitron {

// With fewer elements per step than this on average, a block is made as fast element by element.
constexpr int64_t kElementsPerStep = 2;

struct BlockPlan {
  std::vector<Step> steps;
  std::vector<uint8_t> lanes;

  void add(const ShuffleShape& shape, const GatherKernels& kernels, int64_t from, const uint8_t* source_of) {
    steps.push_back({int32_t(from), 0});
    lanes.resize(lanes.size() + shape.block);
    kernels.encode(shape, source_of, &steps.back(), lanes.data() + lanes.size() - shape.block);
  }
};

// The steps that make a block of `count` elements out of a row; false: too many.
inline bool plan_block(BlockPlan& plan, const ShuffleShape& shape, const GatherKernels& kernels,
                       const int64_t* cols, int64_t count, int64_t element_size, int64_t row_bytes) {
  bool placed[kLineBytes] = {};
  int64_t left = count;
  for (int64_t step = 0; step < count / kElementsPerStep && left > 0; ++step) {
    int64_t lowest = row_bytes;
    for (int64_t i = 0; i < count; ++i) {
      if (!placed[i]) lowest = std::min(lowest, cols[i] * element_size);
    }
    const int64_t from = std::min(lowest, row_bytes - shape.window);
    uint8_t source_of[kLineBytes];
    std::fill_n(source_of, kLineBytes, kNoByte);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = cols[i] * element_size - from;
      if (placed[i] || at < 0 || at + element_size > shape.window) continue;
      for (int64_t byte = 0; byte < element_size; ++byte)
        source_of[i * element_size + byte] = uint8_t(at + byte);
      placed[i] = true, --left;
    }
    plan.add(shape, kernels, from, source_of);
  }
  return left == 0;
}

// Appends the steps of a whole line and returns how many each block has, which is what the longest needs; 0:
// too many.
inline int64_t plan_line(GatherPlan& plan, const ShuffleShape& shape, const GatherKernels& kernels,
                         int64_t begin, int64_t row_bytes) {
  if (shape.window == 0 || shape.window > row_bytes) return 0;
  const int64_t blocks = kLineBytes / shape.block, count = shape.block / plan.element_size;
  BlockPlan own[kLineBytes / 16];
  int64_t longest = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t* cols = plan.cols + begin + b * count;
    if (!plan_block(own[b], shape, kernels, cols, count, plan.element_size, row_bytes)) return 0;
    longest = std::max<int64_t>(longest, own[b].steps.size());
  }
  uint8_t nothing[kLineBytes];
  std::fill_n(nothing, kLineBytes, kNoByte);
  plan.lanes.resize(plan.lanes.size() + longest);  // blocks x longest x the bytes of a block
  uint8_t* lanes = plan.lanes[plan.lanes.size() - longest].byte;
  for (int64_t b = 0; b < blocks; ++b) {
    while (int64_t(own[b].steps.size()) < longest) own[b].add(shape, kernels, own[b].steps[0].from, nothing);
    plan.steps.insert(plan.steps.end(), own[b].steps.begin(), own[b].steps.end());
    lanes = std::copy(own[b].lanes.begin(), own[b].lanes.end(), lanes);
  }
  return longest;
}

inline void add_segment(std::vector<Segment>& segments, const Segment& next) {
  if (!segments.empty() && segments.back().kind == next.kind && segments.back().steps == next.steps) {
    segments.back().bytes += next.bytes;
  } else {
    segments.push_back(next);
  }
}

inline GatherPlan make_plan(const GatherKernels& kernels, const int64_t* cols, int64_t count,
                            int64_t element_size, int64_t row_bytes) {
  GatherPlan plan{cols, element_size, {}, {}, {}, {}};
  const ShuffleShape& shape = element_size >= kernels.wide.unit ? kernels.wide : kernels.bytes;
  const int64_t per_line = kLineBytes / element_size;
  for (int64_t begin = 0; begin < count; begin += per_line) {
    const int64_t n = std::min(per_line, count - begin), to = begin * element_size, bytes = n * element_size;
    const int64_t first_step = plan.steps.size();
    bool is_run = n == per_line;
    for (int64_t i = 1; i < n; ++i) is_run &= cols[begin + i] == cols[begin] + i;
    if (is_run) {
      add_segment(plan.segments, {Segment::kLines, to, bytes, int64_t(plan.lines.size()), 0});
      plan.lines.push_back(int32_t(cols[begin] * element_size));
    } else if (const int64_t steps = n == per_line ? plan_line(plan, shape, kernels, begin, row_bytes) : 0) {
      add_segment(plan.segments, {Segment::kShuffle, to, bytes, first_step, steps});
    } else {
      add_segment(plan.segments, {Segment::kElements, to, bytes, 0, 0});
    }
  }
  return plan;
}

}  // namespace minitron
