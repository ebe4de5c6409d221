// Compiled once per SIMD level: ways to read and to copy memory, for benchmarks.
#include <stdexcept>

#include "common/cpu/memory_floor.h"
#include "common/cpu/stream.h"
#include "common/cpu/vec.h"

namespace minitron::MINITRON_SIMD {
namespace {

using V = Vec<uint64_t>;
constexpr int64_t kVectors = kLineBytes / sizeof(V);

template <Hint kHint>
void prefetch(const char* at) {
  if constexpr (kHint == Hint::kKeep) __builtin_prefetch(at, 0, 3);
  if constexpr (kHint == Hint::kPass) __builtin_prefetch(at, 0, 0);
}

// Calls f(offset, stream) for the lines of all whole pieces, in the way's order; returns their bytes.
template <int64_t kStreams, Hint kHint, typename F>
int64_t each_line(const char* data, int64_t bytes, const MemoryWay& way, F&& f) {
  const int64_t piece = way.piece(), end = bytes / piece * piece, ahead = way.ahead;
  for (int64_t begin = 0; begin < end; begin += piece) {
    const auto lines = [&](int64_t first, int64_t last, int64_t distance) {
      for (int64_t i = begin + first; i < begin + last; i += kLineBytes) {
        for (int64_t s = 0; s < kStreams; ++s) {
          const int64_t at = i + s * way.apart;
          prefetch<kHint>(data + at + distance);
          f(at, s);
        }
      }
    };
    lines(0, way.apart - ahead, ahead);
    lines(way.apart - ahead, way.apart, ahead + piece - way.apart);  // the stream goes on in the next piece
  }
  return end;
}

template <int64_t kStreams, Hint kHint>
uint64_t read(const char* data, int64_t bytes, const MemoryWay& way) {
  V sums[2][kVectors] = {};
  const int64_t done = each_line<kStreams, kHint>(data, bytes, way, [&](int64_t at, int64_t s) {
    for (int64_t j = 0; j < kVectors; ++j) {
      V v;
      std::memcpy(&v, data + at + j * sizeof(V), sizeof(V));
      sums[s % 2][j] ^= v;
    }
  });
  uint64_t all = 0;
  for (int64_t j = 0; j < kVectors; ++j) {
    for (int64_t lane = 0; lane < kLanes<uint64_t>; ++lane) all ^= sums[0][j][lane] ^ sums[1][j][lane];
  }
  for (int64_t i = done; i + 8 <= bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, data + i, 8);
    all ^= word;
  }
  return all;
}

void stream(char* to, V v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bit_cast<__m512i>(v));
#elif defined(__AVX2__) && MINITRON_VECTOR_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bit_cast<__m256i>(v));
#elif defined(__SSE2__)
  __m128i parts[sizeof(V) / 16];
  std::memcpy(parts, &v, sizeof(V));
  for (size_t i = 0; i < sizeof(V) / 16; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, parts[i]);
#else
  std::memcpy(to, &v, sizeof(V));
#endif
}

template <int64_t kStreams, Hint kHint, bool kStream>
void copy_lines(char* to, const char* from, int64_t bytes, const MemoryWay& way) {
  const int64_t done = each_line<kStreams, kHint>(from, bytes, way, [&](int64_t at, int64_t) {
    V line[kVectors];  // all loads of a line, then all its stores, or the CPU writes parts of lines
    std::memcpy(line, from + at, kLineBytes);
    for (int64_t j = 0; j < kVectors; ++j) {
      if constexpr (kStream) {
        stream(to + at + j * sizeof(V), line[j]);
      } else {
        std::memcpy(to + at + j * sizeof(V), &line[j], sizeof(V));
      }
    }
  });
  std::memcpy(to + done, from + done, bytes - done);
  if constexpr (kStream) stream_fence();
}

// Calls f(streams, hint) with the way's as compile-time constants.
template <typename F>
auto dispatch_way(const MemoryWay& way, F&& f) {
  const auto with_hint = [&](auto streams) {
    switch (way.hint) {
      case Hint::kNone:
        return f(streams, std::integral_constant<Hint, Hint::kNone>{});
      case Hint::kKeep:
        return f(streams, std::integral_constant<Hint, Hint::kKeep>{});
      case Hint::kPass:
        return f(streams, std::integral_constant<Hint, Hint::kPass>{});
    }
    throw std::logic_error("no such hint");
  };
  switch (way.streams) {
    case 1:
      return with_hint(std::integral_constant<int64_t, 1>{});
    case 2:
      return with_hint(std::integral_constant<int64_t, 2>{});
    case 4:
      return with_hint(std::integral_constant<int64_t, 4>{});
    case 8:
      return with_hint(std::integral_constant<int64_t, 8>{});
  }
  throw std::logic_error("streams must be 1, 2, 4 or 8");
}

void movsb(char* to, const char* from, int64_t bytes) {
#if defined(__x86_64__)
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
#else
  std::memcpy(to, from, bytes);
#endif
}

}  // namespace

const MemoryFloorKernels& memory_floor_kernels() {
  static const MemoryFloorKernels table{
      [](const char* data, int64_t bytes, const MemoryWay& way) {
        return dispatch_way(
            way, [&](auto streams, auto hint) { return read<streams(), hint()>(data, bytes, way); });
      },
      [](char* to, const char* from, int64_t bytes, Store store, const MemoryWay& way) {
        if (store == Store::kMemcpy) return void(std::memcpy(to, from, bytes));
        if (store == Store::kMovsb) return movsb(to, from, bytes);
        dispatch_way(way, [&](auto streams, auto hint) {
          store == Store::kStream ? copy_lines<streams(), hint(), true>(to, from, bytes, way)
                                  : copy_lines<streams(), hint(), false>(to, from, bytes, way);
        });
      }};
  return table;
}

}  // namespace minitron::MINITRON_SIMD
