// What memory comes in.
#pragma once

#include <cstdint>

namespace minitron {

constexpr int64_t kLineBytes = 64;    // of a cache
constexpr int64_t kPageBytes = 4096;  // of the smallest pages

}  // namespace minitron
