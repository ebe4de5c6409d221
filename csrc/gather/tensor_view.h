// What the launchers of gather see of a tensor: its last two dimensions, rows and columns, and the batch
// dimensions before them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/memory.h"

namespace minitron {

using torch::stable::Tensor;

// Strides in bytes.
struct View {
  char* data;
  int64_t rows, cols, row_stride, col_stride;
  std::vector<int64_t> batch_sizes, batch_strides;

  View(const Tensor& x, void* pointer) : data(static_cast<char*>(pointer)) {
    const int64_t element_size = x.element_size(), dim = x.dim();
    cols = x.size(dim - 1), col_stride = x.stride(dim - 1) * element_size;
    rows = dim > 1 ? x.size(dim - 2) : 1, row_stride = dim > 1 ? x.stride(dim - 2) * element_size : 0;
    if (cols <= 1) col_stride = element_size;
    if (rows <= 1) row_stride = cols * col_stride;
    for (int64_t d = 0; d < dim - 2; ++d) {
      batch_sizes.push_back(x.size(d));
      batch_strides.push_back(x.stride(d) * element_size);
    }
  }

  // How many matrices: the product of the batch dimensions.
  int64_t matrices() const {
    int64_t count = 1;
    for (int64_t size : batch_sizes) count *= size;
    return count;
  }

  void transpose() {
    std::swap(rows, cols);
    std::swap(row_stride, col_stride);
  }

  // Whether every row begins at a multiple of `bytes`.
  bool aligned(int64_t bytes) const {
    const auto fits = [&](int64_t stride) { return stride % bytes == 0; };
    return reinterpret_cast<uintptr_t>(data) % bytes == 0 && fits(row_stride) &&
           std::all_of(batch_strides.begin(), batch_strides.end(), fits);
  }
};

// The kept indices of one axis; null: all of it.
struct Axis {
  const int64_t* index = nullptr;
  int64_t count = 0;

  Axis(const std::optional<Tensor>& keep, int64_t size, const char* name) : count(size) {
    if (!keep) return;
    STD_TORCH_CHECK(keep->dim() == 1 && keep->is_contiguous() &&
                        keep->scalar_type() == torch::headeronly::ScalarType::Long,
                    name, " must be a contiguous int64 vector");
    check_memory(*keep, name);
    index = static_cast<const int64_t*>(keep->const_data_ptr());
    count = keep->numel();
  }

  // For indices in the host's memory.
  void check(int64_t size, const char* name) const {
    for (int64_t i = 0; index && i < count; ++i) {
      STD_TORCH_CHECK(index[i] >= 0 && index[i] < size, name, "[", i, "] is ", index[i],
                      ": indices must be in [0, ", size, ")");
    }
  }

  int64_t operator[](int64_t i) const { return index ? index[i] : i; }
};

// A call's views and indices.
struct GatherArguments {
  View source, out;
  Axis rows, cols;
  int64_t element_size;  // bytes of an element

  GatherArguments(const Tensor& out_tensor, const Tensor& weight, const std::optional<Tensor>& keep_rows,
                  const std::optional<Tensor>& keep_cols)
      : source(checked(weight, keep_rows), const_cast<void*>(weight.const_data_ptr())),
        out(out_tensor, out_tensor.data_ptr()),
        rows(keep_rows, source.rows, "rows"),
        cols(keep_cols, source.cols, "cols"),
        element_size(weight.element_size()) {
    const bool fits = out_tensor.dim() == weight.dim() && out_tensor.scalar_type() == weight.scalar_type() &&
                      out.batch_sizes == source.batch_sizes && out.rows == rows.count &&
                      out.cols == cols.count;
    STD_TORCH_CHECK(fits, "out must have weight's shape with the kept rows and cols, and its dtype");
    check_memory(weight, "weight");
    check_memory(out_tensor, "out");
  }

  bool empty() const { return out.rows == 0 || out.cols == 0 || out.matrices() == 0; }

  // Where both are stored by columns: makes it the same gather of the transposed matrices.
  void prefer_rows() {
    if (source.col_stride == element_size || source.row_stride != element_size ||
        out.row_stride != element_size)
      return;
    source.transpose(), out.transpose();
    std::swap(rows, cols);
  }

  bool side_by_side() const { return source.col_stride == element_size && out.col_stride == element_size; }

 private:
  static const Tensor& checked(const Tensor& weight, const std::optional<Tensor>& keep_rows) {
    STD_TORCH_CHECK(weight.dim() > 1 || (weight.dim() == 1 && !keep_rows),
                    "weight must be a vector without rows, or have more dimensions");
    const int64_t element_size = weight.element_size();
    STD_TORCH_CHECK(element_size <= 16 && (element_size & (element_size - 1)) == 0,
                    "weight's elements must have 1, 2, 4, 8 or 16 bytes");
    return weight;
  }
};

}  // namespace minitron
