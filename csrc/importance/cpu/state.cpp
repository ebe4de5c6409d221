// Adds the moments of sequences to an ImportanceState on the CPU.
#include "importance/cpu/state.h"

#include <torch/csrc/stable/library.h>

namespace minitron {
namespace {

void importance_add_(Tensor sums, Tensor squares, Tensor sequences, Tensor tokens, Tensor values,
                     Tensor counts, std::vector<int64_t> aggregations, int64_t flags) {
  STD_TORCH_CHECK(flags >= 1 && flags <= 7, "flags must be in 1..7, got ", flags);
  STD_TORCH_CHECK(values.dim() == 3 && values.is_contiguous() && values.size(0) == num_sums(flags),
                  "values must be contiguous [", num_sums(flags), ", B, M]");
  check_memory(values, "values");
  const int64_t B = values.size(1);
  STD_TORCH_CHECK((counts.dim() == 1 || counts.dim() == 2) && counts.size(0) == B &&
                      counts.scalar_type() == torch::headeronly::ScalarType::Long && counts.is_contiguous(),
                  "counts must be contiguous int64 [B] or [B, G]");
  check_memory(counts, "counts");
  const int64_t groups = counts.dim() == 2 ? counts.size(1) : 1;
  const StateMemory state(sums, squares, sequences, tokens, aggregations, flags, values.size(2), groups);
  const DType dtype = dtype_of(values, "values");
  STD_TORCH_CHECK(dtype == DType::kFloat32 || dtype == DType::kFloat64, "values must be float32 or float64");
  const auto* count = static_cast<const int64_t*>(counts.const_data_ptr());
  if (dtype == DType::kFloat64) {
    state.add(static_cast<const double*>(values.const_data_ptr()), count, B);
  } else {
    state.add(static_cast<const float*>(values.const_data_ptr()), count, B);
  }
}

}  // namespace
}  // namespace minitron

STABLE_TORCH_LIBRARY_IMPL(minitron_kernels, CPU, m) {
  m.impl("importance_add_", TORCH_BOX(&minitron::importance_add_));
}
