// Makes a row by its plan: runs are copied, blocks shuffled out of windows of the row, the rest is moved
// element by element.
#include <stdexcept>

#include "common/cpu/stream.h"
#include "common/cpu/vec.h"
#include "gather/cpu/kernels.h"

namespace minitron::MINITRON_SIMD {
namespace {

#if defined(__AVX512BW__)
// Words of 16 bits, each from any of 64 in two vectors.
struct Words {
  static constexpr ShuffleShape kShape{64, 128, 2};
  using V = __m512i;
  static V load(const char* p) { return _mm512_loadu_si512(p); }
  static V shuffle(const Step& step, const uint8_t* lanes, const char* row) {
    const char* window = row + step.from;
    return _mm512_maskz_permutex2var_epi16(__mmask32(step.filled), load(window), _mm512_loadu_si512(lanes),
                                           load(window + 64));
  }
  static V merge(V a, V b) { return _mm512_or_si512(a, b); }
  static void store(char* p, V v) { _mm512_storeu_si512(p, v); }
  static void stream(char* p, V v) { _mm512_stream_si512(reinterpret_cast<V*>(p), v); }
};
using Wide = Words;
#elif MINITRON_VECTOR_BYTES == 64
// The same word by word, so that such plans can be tested on CPUs without AVX-512.
struct Words {
  static constexpr ShuffleShape kShape{64, 128, 2};
  struct V {
    uint16_t word[32];
  };
  static V shuffle(const Step& step, const uint8_t* lanes, const char* row) {
    V out = {};
    for (int i = 0; i < 32; ++i) {
      uint16_t lane;
      std::memcpy(&lane, lanes + 2 * i, 2);
      if (step.filled >> i & 1) std::memcpy(&out.word[i], row + step.from + 2 * (lane % 64), 2);
    }
    return out;
  }
  static V merge(V a, const V& b) {
    for (int i = 0; i < 32; ++i) a.word[i] |= b.word[i];
    return a;
  }
  static void store(char* p, const V& v) { std::memcpy(p, v.word, sizeof(v)); }
  static void stream(char* p, const V& v) {
    stream_lines(p, reinterpret_cast<const char*>(v.word), sizeof(v));
  }
};
using Wide = Words;
#else
struct Bytes;
using Wide = Bytes;
#endif

#if defined(__SSSE3__)
// Bytes, each from any of 16; a lane of kNoByte becomes zero.
struct Bytes {
  static constexpr ShuffleShape kShape{16, 16, 1};
  using V = __m128i;
  static V load(const char* p) { return _mm_loadu_si128(reinterpret_cast<const V*>(p)); }
  static V shuffle(const Step& step, const uint8_t* lanes, const char* row) {
    return _mm_shuffle_epi8(load(row + step.from), _mm_loadu_si128(reinterpret_cast<const V*>(lanes)));
  }
  static V merge(V a, V b) { return _mm_or_si128(a, b); }
  static void store(char* p, V v) { _mm_storeu_si128(reinterpret_cast<V*>(p), v); }
  static void stream(char* p, V v) { _mm_stream_si128(reinterpret_cast<V*>(p), v); }
};
#else
// Without a shuffle: runs and elements only.
struct Bytes {
  static constexpr ShuffleShape kShape{16, 0, 1};
};
#endif

void encode(const ShuffleShape& shape, const uint8_t* source_of, Step* step, uint8_t* lanes) {
  for (int64_t i = 0; i < shape.block / shape.unit; ++i) {
    const uint8_t source = source_of[i * shape.unit];
    if (source != kNoByte) step->filled |= uint32_t(1) << i;
    if (shape.unit == 2) {
      const uint16_t word = source / 2;
      std::memcpy(lanes + 2 * i, &word, 2);
    } else {
      lanes[i] = source;
    }
  }
}

template <bool kStream>
void copy_line(char* to, const char* from) {
  if constexpr (kStream) {
    stream_lines(to, from, kLineBytes);
  } else {
    std::memcpy(to, from, kLineBytes);
  }
}

// What lies this many bytes further in the source is prefetched for every line of the result: the CPU's own
// prefetchers stop at the end of a page, and the work between two loads keeps too few of them in flight.
constexpr int64_t kAhead = 512;

template <typename Isa, int64_t kSteps, bool kStream>
void shuffle(const Step* step, const uint8_t* lanes, int64_t steps, const char* source, char* out,
             char* end) {
  constexpr int64_t kBlock = Isa::kShape.block;
  const int64_t n = kSteps ? kSteps : steps;
  for (; out != end; out += kBlock, step += n, lanes += n * kBlock) {
    if ((end - out) % kLineBytes == 0) __builtin_prefetch(source + step->from + kAhead);
    auto block = Isa::shuffle(step[0], lanes, source);
    for (int64_t i = 1; i < n; ++i) {
      block = Isa::merge(block, Isa::shuffle(step[i], lanes + i * kBlock, source));
    }
    if constexpr (kStream) {
      Isa::stream(out, block);
    } else {
      Isa::store(out, block);
    }
  }
}

template <int64_t kElementSize, bool kStream>
void elements(const int64_t* cols, int64_t n, const char* source, char* out) {
  constexpr int64_t kPerLine = kLineBytes / kElementSize;
  alignas(kLineBytes) char line[kLineBytes];
  for (; n >= kPerLine; n -= kPerLine, cols += kPerLine, out += kLineBytes) {
    for (int64_t i = 0; i < kPerLine; ++i) {
      std::memcpy(line + i * kElementSize, source + cols[i] * kElementSize, kElementSize);
    }
    copy_line<kStream>(out, line);
  }
  for (int64_t i = 0; i < n; ++i)
    std::memcpy(out + i * kElementSize, source + cols[i] * kElementSize, kElementSize);
}

template <typename Isa, bool kStream>
void make_row(const GatherPlan& plan, const char* source, char* out) {
  for (const Segment& segment : plan.segments) {
    char* to = out + segment.to;
    if (segment.kind == Segment::kLines) {
      const int32_t* from = plan.lines.data() + segment.first;
      for (char* end = to + segment.bytes; to != end; to += kLineBytes, ++from) {
        __builtin_prefetch(source + *from + kAhead);
        copy_line<kStream>(to, source + *from);
      }
    } else if (segment.kind == Segment::kElements) {
      const int64_t *cols = plan.cols + segment.to / plan.element_size, n = segment.bytes / plan.element_size;
      switch (plan.element_size) {
        case 1:
          elements<1, kStream>(cols, n, source, to);
          break;
        case 2:
          elements<2, kStream>(cols, n, source, to);
          break;
        case 4:
          elements<4, kStream>(cols, n, source, to);
          break;
        case 8:
          elements<8, kStream>(cols, n, source, to);
          break;
        case 16:
          elements<16, kStream>(cols, n, source, to);
          break;
        default:
          throw std::logic_error("elements have 1, 2, 4, 8 or 16 bytes");
      }
    } else if constexpr (Isa::kShape.window > 0) {
      const Step* step = plan.steps.data() + segment.first;
      const uint8_t* lanes = plan.lanes.data()->byte + segment.first * Isa::kShape.block;
      char* end = to + segment.bytes;
      switch (segment.steps) {
        case 1:
          shuffle<Isa, 1, kStream>(step, lanes, 1, source, to, end);
          break;
        case 2:
          shuffle<Isa, 2, kStream>(step, lanes, 2, source, to, end);
          break;
        case 3:
          shuffle<Isa, 3, kStream>(step, lanes, 3, source, to, end);
          break;
        default:
          shuffle<Isa, 0, kStream>(step, lanes, segment.steps, source, to, end);
      }
    } else {
      throw std::logic_error("a plan has shuffles at a SIMD level without any");
    }
  }
}

template <bool kStream>
void row(const GatherPlan& plan, const char* source, char* out) {
  if (plan.element_size >= Wide::kShape.unit) {
    make_row<Wide, kStream>(plan, source, out);
  } else {
    make_row<Bytes, kStream>(plan, source, out);
  }
}

}  // namespace

const GatherKernels& gather_kernels() {
  static const GatherKernels table{Wide::kShape, Bytes::kShape, encode,
                                   [](const GatherPlan& plan, const char* source, char* out, bool stream) {
                                     stream ? row<true>(plan, source, out) : row<false>(plan, source, out);
                                   }};
  return table;
}

}  // namespace minitron::MINITRON_SIMD
