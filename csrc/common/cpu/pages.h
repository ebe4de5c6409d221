// What the operating system is told of memory, where it listens (Linux); else nothing happens.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

// For new memory that is about to be written, in pieces that stay in the cache: its pages are made by one
// call, where each would be a fault. Linux before 5.14 refuses, and pages that are there stay as they are.
inline void map_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers lack
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / kPage * kPage;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + bytes;
  if (bytes >= int64_t(4 * kPage)) madvise(reinterpret_cast<void*>(begin), end - begin, kPopulateWrite);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace minitron
