// Which copy of the *_simd.cpp files is used on this CPU. Each such file is compiled once per level, in the
// namespace that MINITRON_SIMD names; the choice is made once, at run time.
#pragma once

#include <string>

namespace minitron {

// kWide is for tests only: AVX2 code with vectors of 64 bytes, which computes what AVX-512 code does.
enum class SimdLevel { kBaseline, kWide, kAvx2, kAvx512 };

// The level in use: the best that was compiled and that the CPU has, unless a test forced another.
SimdLevel simd_level();
const char* simd_level_name();
// Comma-separated, best first.
const char* simd_levels_compiled();
// For tests. Throws std::invalid_argument if the level was not compiled or the CPU lacks it; "" restores.
void force_simd_level(const std::string& name);

}  // namespace minitron

#ifdef MINITRON_HAVE_AVX512
#define MINITRON_IF_AVX512(...) __VA_ARGS__
#else
#define MINITRON_IF_AVX512(...)
#endif
#ifdef MINITRON_HAVE_WIDE
#define MINITRON_IF_WIDE(...) __VA_ARGS__
#else
#define MINITRON_IF_WIDE(...)
#endif
#ifdef MINITRON_HAVE_AVX2
#define MINITRON_IF_AVX2(...) __VA_ARGS__
#else
#define MINITRON_IF_AVX2(...)
#endif

// Inside namespace minitron: declares `const Table& name()` of each level, which a *_simd.cpp defines, and
// the one to call, which picks among them.
#define MINITRON_TABLE_PER_LEVEL(Table, name)                                          \
  MINITRON_IF_AVX512(namespace avx512 { const Table& name(); })                        \
  MINITRON_IF_AVX2(namespace avx2 { const Table& name(); })                            \
  MINITRON_IF_WIDE(namespace wide { const Table& name(); })                            \
  namespace baseline {                                                                 \
  const Table& name();                                                                 \
  }                                                                                    \
  inline const Table& name() {                                                         \
    MINITRON_IF_AVX512(if (simd_level() == SimdLevel::kAvx512) return avx512::name();) \
    MINITRON_IF_AVX2(if (simd_level() == SimdLevel::kAvx2) return avx2::name();)       \
    MINITRON_IF_WIDE(if (simd_level() == SimdLevel::kWide) return wide::name();)       \
    return baseline::name();                                                           \
  }
