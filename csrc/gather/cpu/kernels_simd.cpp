// Makes rows by their plan: runs are copied, lines shuffled out of windows of the row or packed, the rest is
// moved element by element.
#include <stdexcept>

#include "common/cpu/stream.h"
#include "common/cpu/vec.h"
#include "gather/cpu/kernels.h"

namespace minitron::MINITRON_SIMD {
namespace {

#if defined(__AVX512BW__)
// Words of 16 bits, each from any of 64 in two vectors.
struct Words {
  static constexpr ShuffleShape kShape{128, 2};
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
#define MINITRON_WORDS 1
#elif MINITRON_VECTOR_BYTES == 64
// The same word by word, so that such plans can be tested on CPUs without AVX-512.
struct Words {
  static constexpr ShuffleShape kShape{128, 2};
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
#define MINITRON_WORDS 1
#endif

void encode(const uint8_t* source_of, Step* step, uint8_t* lanes) {
  for (int64_t i = 0; i < kLineBytes / 2; ++i) {
    const uint8_t source = source_of[i * 2];
    if (source != kNoByte) step->filled |= uint32_t(1) << i;
    const uint16_t word = source / 2;
    std::memcpy(lanes + 2 * i, &word, 2);
  }
}

template <bool kStream>
void copy_line(char* to, const char* from) {
#if defined(__AVX512F__)
  if constexpr (kStream) {
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
  }
#elif defined(__AVX2__)
  if constexpr (kStream) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + 32), high);
    return;
  }
#endif
  if constexpr (kStream) {
    stream_lines(to, from, kLineBytes);
  } else {
    std::memcpy(to, from, kLineBytes);
  }
}

// What lies this many bytes further in the source is prefetched for every line of the result: the CPU's own
// prefetchers stop at the end of a page, and the work between two loads keeps too few of them in flight.
constexpr int64_t kAhead = 512;

// Rows of a group, side by side: one alone keeps too few loads in flight.
template <int64_t kRows>
struct Side {
  const char *source[kRows], *next[kRows];
  char* out[kRows];
  int64_t row_bytes;

  Side(const GatherPlan& plan, const RowGroup& group, int64_t first, int64_t to) : row_bytes(plan.row_bytes) {
    for (int64_t r = 0; r < kRows; ++r) {
      source[r] = group.source[first + r], next[r] = group.next[first + r];
      out[r] = group.out[first + r] + to;
    }
  }
  // Of each row, what lies at `at`, in its own source or, behind its end, in that of the row after it.
  void prefetch(int64_t at) const {
    const int64_t behind = at - row_bytes;
    for (int64_t r = 0; r < kRows; ++r) __builtin_prefetch(behind < 0 ? source[r] + at : next[r] + behind);
  }
};

template <int64_t kRows, bool kStream>
void copy_lines(const GatherPlan& plan, const Segment& segment, const RowGroup& group, int64_t first) {
  const Side<kRows> side(plan, group, first, segment.to);
  const int32_t* from = plan.lines.data() + segment.first;
  for (int64_t at = 0; at < segment.bytes; at += kLineBytes, ++from) {
    side.prefetch(at + kAhead < segment.bytes ? from[kAhead / kLineBytes] : *from + kAhead);
    for (int64_t r = 0; r < kRows; ++r) copy_line<kStream>(side.out[r] + at, side.source[r] + *from);
  }
}

#if defined(MINITRON_WORDS)
template <int64_t kSteps, int64_t kRows, bool kStream>
void shuffle(const GatherPlan& plan, const Segment& segment, const RowGroup& group, int64_t first) {
  const Side<kRows> side(plan, group, first, segment.to);
  const Step* step = plan.steps.data() + segment.first;
  const Lanes* lanes = plan.lanes.data() + segment.first;
  const int64_t n = kSteps ? kSteps : segment.steps;
  for (int64_t at = 0; at < segment.bytes; at += kLineBytes, step += n, lanes += n) {
    side.prefetch(step->from + kAhead);
    for (int64_t r = 0; r < kRows; ++r) {
      auto line = Words::shuffle(step[0], lanes[0].byte, side.source[r]);
      for (int64_t i = 1; i < n; ++i)
        line = Words::merge(line, Words::shuffle(step[i], lanes[i].byte, side.source[r]));
      if constexpr (kStream) {
        Words::stream(side.out[r] + at, line);
      } else {
        Words::store(side.out[r] + at, line);
      }
    }
  }
}

template <int64_t kRows, bool kStream>
void shuffle(const GatherPlan& plan, const Segment& segment, const RowGroup& group, int64_t first) {
  switch (segment.steps) {
    case 1:
      return shuffle<1, kRows, kStream>(plan, segment, group, first);
    case 2:
      return shuffle<2, kRows, kStream>(plan, segment, group, first);
    case 3:
      return shuffle<3, kRows, kStream>(plan, segment, group, first);
    default:
      return shuffle<0, kRows, kStream>(plan, segment, group, first);
  }
}
#endif

#if defined(__SSSE3__)
constexpr int64_t kPacksPerPrefetch = 4;  // about a line of the source
constexpr int64_t kPackAhead = 1024;

// A segment of kRows rows, made aside first: a step stores a whole vector, of which the next one overwrites
// what is no element, and streaming stores must fill lines.
template <int64_t kRows, bool kStream>
void pack(const GatherPlan& plan, const Segment& segment, const RowGroup& group, int64_t first) {
  alignas(kLineBytes) char made[kRows][kPieceBytes + kLineBytes];
  const Side<kRows> side(plan, group, first, segment.to);
  const Pack *step = plan.packs.data() + segment.first, *const end = step + segment.steps;
  for (int64_t at = 0; step != end;) {
    side.prefetch(step->from + kPackAhead);
    for (const Pack* const stop = step + std::min<int64_t>(kPacksPerPrefetch, end - step); step != stop;
         ++step) {
      const __m128i places = _mm_load_si128(reinterpret_cast<const __m128i*>(step->byte));
      for (int64_t r = 0; r < kRows; ++r) {
        const __m128i window = _mm_loadu_si128(reinterpret_cast<const __m128i*>(side.source[r] + step->from));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(made[r] + at), _mm_shuffle_epi8(window, places));
      }
      at += step->bytes;
    }
  }
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t i = 0; i < segment.bytes; i += kLineBytes) copy_line<kStream>(side.out[r] + i, made[r] + i);
  }
}
#endif

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

template <bool kStream>
void elements(const GatherPlan& plan, const Segment& segment, const char* source, char* out) {
  const int64_t *cols = plan.cols + segment.to / plan.element_size, n = segment.bytes / plan.element_size;
  switch (plan.element_size) {
    case 1:
      return elements<1, kStream>(cols, n, source, out);
    case 2:
      return elements<2, kStream>(cols, n, source, out);
    case 4:
      return elements<4, kStream>(cols, n, source, out);
    case 8:
      return elements<8, kStream>(cols, n, source, out);
    case 16:
      return elements<16, kStream>(cols, n, source, out);
    default:
      throw std::logic_error("elements have 1, 2, 4, 8 or 16 bytes");
  }
}

template <int64_t kRows, bool kStream>
void make(const GatherPlan& plan, const Segment& segment, const RowGroup& group, int64_t first) {
  switch (segment.kind) {
    case Segment::kLines:
      return copy_lines<kRows, kStream>(plan, segment, group, first);
    case Segment::kShuffle:
#if defined(MINITRON_WORDS)
      return shuffle<kRows, kStream>(plan, segment, group, first);
#else
      throw std::logic_error("a plan has shuffles at a SIMD level without any");
#endif
    case Segment::kPack:
#if defined(__SSSE3__)
      return pack<kRows, kStream>(plan, segment, group, first);
#else
      throw std::logic_error("a plan packs at a SIMD level that cannot");
#endif
    case Segment::kElements:
      for (int64_t r = first; r < first + kRows; ++r)
        elements<kStream>(plan, segment, group.source[r], group.out[r] + segment.to);
      return;
  }
  throw std::logic_error("no such kind of segment");
}

template <bool kStream>
void rows(const GatherPlan& plan, const RowGroup& group) {
  for (const Segment& segment : plan.segments) {
    if (group.count == kGroupRows) {
      make<kGroupRows, kStream>(plan, segment, group, 0);
    } else {
      for (int64_t r = 0; r < group.count; ++r) make<1, kStream>(plan, segment, group, r);
    }
  }
}

}  // namespace

const GatherKernels& gather_kernels() {
#if defined(MINITRON_WORDS)
  constexpr ShuffleShape kShuffle = Words::kShape;
#else
  constexpr ShuffleShape kShuffle{0, 0};
#endif
#if defined(__SSSE3__)
  constexpr bool kPacks = true;
#else
  constexpr bool kPacks = false;
#endif
  static const GatherKernels table{kShuffle, kPacks, encode,
                                   [](const GatherPlan& plan, const RowGroup& group) {
                                     group.stream ? rows<true>(plan, group) : rows<false>(plan, group);
                                   }};
  return table;
}

}  // namespace minitron::MINITRON_SIMD
