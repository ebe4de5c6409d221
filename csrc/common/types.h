// Storage types of tensors, and a run-time code for them. No torch header: kernels see only these.
#pragma once

#include <cstdint>
#include <cstring>

namespace minitron {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class DType { kFloat64, kFloat32, kBFloat16, kFloat16 };

// Calls f with a value-initialised element of the dtype: dispatch(dtype, [&](auto e) { using T = decltype(e);
// }).
template <typename F>
decltype(auto) dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(bf16{});
    default:
      return f(f16{});
  }
}

constexpr int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace minitron
