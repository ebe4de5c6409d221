// What the CPU launchers need of a tensor: typed pointers, dtype codes, checks with messages.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "common/memory.h"
#include "common/types.h"

namespace minitron {

using torch::stable::Tensor;

inline DType dtype_of(const Tensor& x, const char* name) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, bfloat16 or float16");
  }
}

// A matrix with stride 1 along its rows.
struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0, cols = 0, ld = 0;

  const char* row(int64_t n) const { return static_cast<const char*>(data) + n * ld * bytes_of(dtype); }
};

inline Matrix matrix_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2, name, " must have 2 dimensions, got ", x.dim());
  STD_TORCH_CHECK(x.size(1) <= 1 || x.stride(1) == 1, name, " must have stride 1 in its last dimension, got ",
                  x.stride(1));
  check_memory(x, name);
  return {x.const_data_ptr(), dtype_of(x, name), x.size(0), x.size(1), x.stride(0)};
}

// The elements of a contiguous tensor of type T (float or double) and known length; nullptr for an absent
// one.
template <typename T>
T* vector_of(const std::optional<Tensor>& x, int64_t length, const char* name) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(dtype_of(*x, name) == kDTypeOf<T> && x->is_contiguous() && x->numel() == length, name,
                  " must be a contiguous float", 8 * sizeof(T), " tensor of ", length, " elements");
  check_memory(*x, name);
  return static_cast<T*>(x->data_ptr());
}

inline const uint8_t* mask_of(const std::optional<Tensor>& x, int64_t length) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(
      x->scalar_type() == torch::headeronly::ScalarType::Bool && x->is_contiguous() && x->numel() == length,
      "mask must be a contiguous bool tensor of ", length, " elements");
  check_memory(*x, "mask");
  return static_cast<const uint8_t*>(x->const_data_ptr());
}

inline const int64_t* labels_of(const std::optional<Tensor>& x, int64_t length) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(
      x->scalar_type() == torch::headeronly::ScalarType::Long && x->is_contiguous() && x->numel() == length,
      "labels must be a contiguous int64 tensor of ", length, " elements");
  check_memory(*x, "labels");
  return static_cast<const int64_t*>(x->const_data_ptr());
}

}  // namespace minitron
