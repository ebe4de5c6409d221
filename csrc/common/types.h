// The element types of tensors, and a run-time code for them. No torch header: kernels see this file.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace minitron {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class DType { kFloat64, kFloat32, kBFloat16, kFloat16 };

const char* dtype_name(DType dtype);
// Throws std::invalid_argument: no kernel reads elements of `dtype` as numbers of `as`.
[[noreturn]] void throw_unreadable(DType dtype, DType as);

// Calls f with a value-initialised element of the dtype: dispatch(dtype, [&](auto element) { ... }).
template <typename F>
decltype(auto) dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(bf16{});
    case DType::kFloat16:
      return f(f16{});
  }
  __builtin_unreachable();
}

template <typename T>
constexpr DType kDTypeOf = std::is_same_v<T, double>  ? DType::kFloat64
                           : std::is_same_v<T, float> ? DType::kFloat32
                           : std::is_same_v<T, bf16>  ? DType::kBFloat16
                                                      : DType::kFloat16;

// Whether elements of type T can be read as type As without loss: as themselves, or 16 bits as fp32.
template <typename T, typename As>
constexpr bool kReadableAs = std::is_same_v<T, As> || (std::is_same_v<As, float> && sizeof(T) == 2);

// dispatch() over the dtypes that can be read as As. Others throw: a kernel that did nothing for them would
// leave its output uninitialised.
template <typename As, typename F>
void dispatch_readable(DType dtype, F&& f) {
  dispatch(dtype, [&](auto element) {
    if constexpr (kReadableAs<decltype(element), As>) {
      f(element);
    } else {
      throw_unreadable(kDTypeOf<decltype(element)>, kDTypeOf<As>);
    }
  });
}

constexpr int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace minitron
