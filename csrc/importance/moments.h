// What importance_moments adds up of a value v, by the bits of its argument `moments`: |v|; v^2; v, and
// (v - mean)^2.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>

namespace minitron {

enum Moment : int64_t { kAbs = 1, kSquare = 2, kCentred = 4 };

// How many sums that makes for each value.
constexpr int64_t num_sums(int64_t moments) {
  return (moments & kAbs ? 1 : 0) + (moments & kSquare ? 1 : 0) + (moments & kCentred ? 2 : 0);
}

// Calls f with moments, in 1..7, as a compile-time constant.
template <typename F>
auto dispatch_moments(int64_t moments, F&& f) {
  switch (moments) {
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
      throw std::logic_error("moments must be in 1..7");
  }
}

}  // namespace minitron
