// Copies that go around the caches, for results that are too large to stay there.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "common/cpu/memory_sizes.h"

namespace minitron {

// Copies whole lines to a multiple of kLineBytes. stream_fence() must follow before another thread reads
// them.
inline void stream_lines(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
  for (int64_t i = 0; i < bytes; i += kLineBytes) {  // a line at once, or the CPU writes parts of lines
    __m128i line[4];
    for (int j = 0; j < 4; ++j)
      line[j] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i + 16 * j));
    for (int j = 0; j < 4; ++j) _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + 16 * j), line[j]);
  }
#else
  std::memcpy(to, from, bytes);
#endif
}

// The same from and to any address. Partial lines go through the caches.
inline void stream_copy(char* to, const char* from, int64_t bytes) {
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(to) % kLineBytes);
  const int64_t lines = (bytes - head) / kLineBytes * kLineBytes;
  std::memcpy(to, from, head);
  stream_lines(to + head, from + head, lines);
  std::memcpy(to + head + lines, from + head + lines, bytes - head - lines);
}

inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace minitron
