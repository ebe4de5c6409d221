// Ways to read and to copy memory, one table per SIMD level. No single way is the fastest on every processor,
// so benchmarks compare memory-bound kernels with the best of them.
#pragma once

#include <cstdint>

#include "common/cpu/simd.h"

namespace minitron {

enum class Hint : int64_t { kNone, kKeep, kPass };  // of a prefetch: into all caches, or past them
enum class Store : int64_t { kPlain, kStream, kMemcpy, kMovsb };  // how a copy writes

// `streams` stretches of `apart` bytes are gone through at once, a cache line of each in turn, then the next
// ones. What lies `ahead` <= `apart` bytes further in a stream is prefetched.
struct MemoryWay {
  int64_t streams, apart, ahead;
  Hint hint;

  int64_t piece() const { return streams * apart; }
};

struct MemoryFloorKernels {
  // The exclusive or of all 64-bit words, so that the compiler can leave out no read; bytes beyond the last
  // whole word are not read.
  uint64_t (*read)(const char* data, int64_t bytes, const MemoryWay&);
  // kStream needs `to` at a multiple of 64. kMemcpy and kMovsb take nothing else of the way.
  void (*copy)(char* to, const char* from, int64_t bytes, Store, const MemoryWay&);
};

MINITRON_TABLE_PER_LEVEL(MemoryFloorKernels, memory_floor_kernels)

}  // namespace minitron
