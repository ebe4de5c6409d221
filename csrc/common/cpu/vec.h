// Vectors of this SIMD level as GCC/Clang vector types: plain operators, one source for every level. Only for
// *_simd.cpp files, which are compiled once per level.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/types.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// A build may ask for longer vectors than the level's registers: the compiler uses several registers for one.
#if defined(MINITRON_VECTOR_BYTES)
#elif defined(__AVX512F__)
#define MINITRON_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define MINITRON_VECTOR_BYTES 32
#else
#define MINITRON_VECTOR_BYTES 16
#endif

namespace minitron::MINITRON_SIMD {

template <typename T>
struct VecOf {
  typedef T type __attribute__((vector_size(MINITRON_VECTOR_BYTES)));
};
template <typename T>
using Vec = typename VecOf<T>::type;
template <typename T>
constexpr int kLanes = MINITRON_VECTOR_BYTES / sizeof(T);

template <typename T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <typename T>
using Mask = Vec<typename IntOf<T>::type>;

template <typename T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Half-width integer vectors, for 16-bit storage of as many elements as a Vec<float> has lanes.
typedef uint16_t U16 __attribute__((vector_size(MINITRON_VECTOR_BYTES / 2)));
typedef uint32_t U32 __attribute__((vector_size(MINITRON_VECTOR_BYTES)));

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  float value;
  if (magnitude >= 0x7c00) {  // inf, nan
    value = bit_cast<float>(uint32_t(0x7f800000 | (magnitude & 0x3ff) << 13));
  } else {  // 2^112 moves the exponent bias from 15 to 127, subnormals included
    value = bit_cast<float>(uint32_t(magnitude) << 13) * 0x1p112f;
  }
  return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);   // nan
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds past 65504
  if (magnitude < 0x38800000) {                                 // below 2^-14: let the adder round
    return uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000));
  }
  return uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

// load<A>(p): kLanes<A> elements of any storage type as accumulate type A (float, or double).
template <typename A>
inline Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <typename A>
inline Vec<A> load(const bf16* p) {
  static_assert(std::is_same_v<A, float>);
  U16 raw;
  std::memcpy(&raw, p, sizeof(raw));
  return bit_cast<Vec<float>>(__builtin_convertvector(raw, U32) << 16);
}

template <typename A>
inline Vec<A> load(const f16* p) {
  static_assert(std::is_same_v<A, float>);
#if defined(__AVX512F__)
  // with a full mask, which costs nothing: GCC 12 warns about its own unmasked one
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return bit_cast<Vec<float>>(_mm512_maskz_cvtph_ps(0xffff, raw));
#elif defined(__F16C__)
  __m256 parts[kLanes<float> / 8];
  for (int i = 0; i < kLanes<float> / 8; ++i) {
    parts[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i)));
  }
  return bit_cast<Vec<float>>(parts);
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = half_to_float(p[i].bits);
  return v;
#endif
}

template <typename A>
inline void store(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof(v));
}

// fp32 as bf16 in the low half of each lane: rounded to nearest even; a NaN keeps its sign and becomes quiet.
inline U32 bf16_bits(Vec<float> v) {
  const U32 bits = bit_cast<U32>(v);
  const U32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const U32 quiet = bits >> 16 | 0x40;
  return v == v ? rounded : quiet;
}

inline void store(bf16* p, Vec<float> v) {
#if defined(__AVX512BF16__)
  const __m256bh raw = _mm512_cvtneps_pbh(bit_cast<__m512>(v));  // denormals become zero
#else
  const U16 raw = __builtin_convertvector(bf16_bits(v), U16);
#endif
  std::memcpy(p, &raw, sizeof(raw));
}

inline void store(f16* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  __m256 parts[kLanes<float> / 8];
  std::memcpy(parts, &v, sizeof(v));
  for (int i = 0; i < kLanes<float> / 8; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * i),
                     _mm256_cvtps_ph(parts[i], _MM_FROUND_TO_NEAREST_INT));
  }
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

// The first n lanes. On load the others are `fill`; on store their memory is not written.
template <typename A, typename T>
inline Vec<A> load_partial(const T* p, int64_t n, A fill) {
  Vec<A> v = splat(fill);
  T buffer[kLanes<A>];
  std::memset(buffer, 0, sizeof(buffer));
  std::memcpy(buffer, p, n * sizeof(T));
  const Vec<A> loaded = load<A>(buffer);
  for (int i = 0; i < n; ++i) v[i] = loaded[i];
  return v;
}

template <typename V, typename T>
inline void store_partial(T* p, V v, int64_t n) {
  T buffer[sizeof(V) / sizeof(v[0])];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

// Written so that the compiler cannot use an instruction that drops a NaN.
template <typename V>
inline V max_of(V a, V b) {
  return a > b ? a : b;
}

template <typename A>
inline A sum_lanes(Vec<A> v) {
  // pairwise, in a fixed order
  A lane[kLanes<A>];
  std::memcpy(lane, &v, sizeof(v));
  for (int width = kLanes<A> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

template <typename A>
inline A max_lanes(Vec<A> v) {
  A top = v[0];
  for (int i = 1; i < kLanes<A>; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

}  // namespace minitron::MINITRON_SIMD
