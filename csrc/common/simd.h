// Which copy of the *_simd.cpp files serves this CPU. One source file is compiled once per level, each copy
// in a namespace named by MINITRON_SIMD; the choice is made once, at run time.
#pragma once

#include <string>

namespace minitron {

enum class SimdLevel { kBaseline, kAvx2, kAvx512 };

// The level in use: the best that was compiled and that the CPU has, unless a test forced another.
SimdLevel simd_level();
const char* simd_level_name();
// Comma-separated, best first.
const char* simd_levels_compiled();
// For tests. Throws std::invalid_argument if the level was not compiled or the CPU lacks it; "" restores.
void force_simd_level(const std::string& name);

}  // namespace minitron
