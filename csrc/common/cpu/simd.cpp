#include "common/cpu/simd.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <stdexcept>

namespace minitron {
namespace {

bool usable(SimdLevel level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (level == SimdLevel::kAvx512) {
#ifdef MINITRON_HAVE_AVX512
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
#else
    return false;
#endif
  }
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (level == SimdLevel::kAvx2) {
#ifdef MINITRON_HAVE_AVX2
    return avx2;
#else
    return false;
#endif
  }
  if (level == SimdLevel::kWide) {
#ifdef MINITRON_HAVE_WIDE
    return avx2;
#else
    return false;
#endif
  }
#endif
  return level == SimdLevel::kBaseline;
}

SimdLevel best() {
  if (usable(SimdLevel::kAvx512)) return SimdLevel::kAvx512;
  if (usable(SimdLevel::kAvx2)) return SimdLevel::kAvx2;
  return SimdLevel::kBaseline;
}

std::atomic<SimdLevel>& current() {
  static std::atomic<SimdLevel> level{best()};
  return level;
}

const char* name_of(SimdLevel level) {
  switch (level) {
    case SimdLevel::kAvx512:
      return "avx512";
    case SimdLevel::kAvx2:
      return "avx2";
    case SimdLevel::kWide:
      return "wide";
    default:
      return "baseline";
  }
}

std::string set_simd_level(std::string name) {
  force_simd_level(name);
  return simd_level_name();
}

}  // namespace

SimdLevel simd_level() { return current().load(std::memory_order_relaxed); }

const char* simd_level_name() { return name_of(simd_level()); }

const char* simd_levels_compiled() {
  return MINITRON_IF_AVX512("avx512,") MINITRON_IF_AVX2("avx2,") MINITRON_IF_WIDE("wide,") "baseline";
}

void force_simd_level(const std::string& name) {
  if (name.empty()) {
    current() = best();
    return;
  }
  for (SimdLevel level : {SimdLevel::kBaseline, SimdLevel::kWide, SimdLevel::kAvx2, SimdLevel::kAvx512}) {
    if (name != name_of(level)) continue;
    if (!usable(level)) {
      throw std::invalid_argument("SIMD level '" + name + "' is not compiled in, or this CPU lacks it");
    }
    current() = level;
    return;
  }
  throw std::invalid_argument("SIMD level must be one of " + std::string(simd_levels_compiled()) + ", got '" +
                              name + "'");
}

}  // namespace minitron

STABLE_TORCH_LIBRARY_FRAGMENT(minitron_kernels, m) {
  // For tests: force a SIMD level; "" goes back to the best one. Returns the level in use.
  m.def("set_simd_level(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(minitron_kernels, CompositeExplicitAutograd, m) {
  m.impl("set_simd_level", TORCH_BOX(&minitron::set_simd_level));
}
