// What importance_moments adds up, by the bits of its argument `kinds`.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>

namespace minitron {

enum Kind : int64_t { kAbs = 1, kSquare = 2, kCentred = 4 };

constexpr int64_t planes_of(int64_t kinds) {
  return (kinds & kAbs ? 1 : 0) + (kinds & kSquare ? 1 : 0) + (kinds & kCentred ? 2 : 0);
}

// f(kinds as a compile-time constant), for kinds in 1..7.
template <typename F>
auto dispatch_kinds(int64_t kinds, F&& f) {
  switch (kinds) {
    case 1:
      return f(std::integral_constant<int64_t, 1>{});
    case 2:
      return f(std::integral_constant<int64_t, 2>{});
    case 3:
      return f(std::integral_constant<int64_t, 3>{});
    case 4:
      return f(std::integral_constant<int64_t, 4>{});
    case 5:
      return f(std::integral_constant<int64_t, 5>{});
    case 6:
      return f(std::integral_constant<int64_t, 6>{});
    case 7:
      return f(std::integral_constant<int64_t, 7>{});
    default:
      throw std::logic_error("kinds must be in 1..7");
  }
}

}  // namespace minitron
