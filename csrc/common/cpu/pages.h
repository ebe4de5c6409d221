// What the operating system is told of memory, where it listens (Linux); else nothing happens.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/cpu/memory_sizes.h"

namespace minitron {

// For memory that is kept and used again: pages of 2 MiB cause fewer TLB misses. Not for outputs, which are
// new in every call: on virtual machines that return free huge pages to the host, a new one can cost ten
// times as much as a small one.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2u << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Whether memory is new: its last page has never been written, or read. False where nobody can tell.
inline bool is_new(const void* data, int64_t bytes) {
#if defined(__linux__)
  if (bytes <= 0) return false;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes - 1) / kPageBytes * kPageBytes;
  unsigned char resident = 1;
  return mincore(reinterpret_cast<void*>(last), 1, &resident) == 0 && !(resident & 1);
#else
  return false;
#endif
}

// Makes the pages of new memory that is about to be written, in pieces that stay in the cache: one call for
// all of them, where each would be a fault. Linux before 5.14 refuses, and nothing happens.
inline void map_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers lack
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / kPageBytes * kPageBytes;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + bytes;
  if (bytes > 0) madvise(reinterpret_cast<void*>(begin), end - begin, kPopulateWrite);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace minitron
