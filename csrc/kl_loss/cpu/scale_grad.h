// grad *= factor, the product in the factor's precision and rounded once.
#pragma once

#include <cstdint>

#include "common/cpu/simd.h"
#include "common/types.h"

namespace minitron {

struct ScaleKernels {
  // n elements of the dtype: float64 by a double, others by a float.
  void (*by_double)(void* grad, DType dtype, int64_t n, double factor);
  void (*by_float)(void* grad, DType dtype, int64_t n, float factor);

  void scale(void* grad, DType dtype, int64_t n, double factor) const { by_double(grad, dtype, n, factor); }
  void scale(void* grad, DType dtype, int64_t n, float factor) const { by_float(grad, dtype, n, factor); }
};

MINITRON_TABLE_PER_LEVEL(ScaleKernels, scale_kernels)

}  // namespace minitron
