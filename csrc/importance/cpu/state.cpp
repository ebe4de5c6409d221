// Adds the moments of sequences to an ImportanceState on the CPU, in one pass: what Python does by some
// seventeen calls of torch.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "common/cpu/parallel.h"
#include "common/cpu/tensors.h"
#include "importance/moments.h"

namespace minitron {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kBlock = 512;  // values of a task, whose sums stay in the L1 cache
constexpr int64_t kValuesPerThread = 1 << 16;

// Row-major memory of a state or of moments.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
};

Rows<double> state_rows(const Tensor& x, int64_t rows, int64_t values, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Double && x.size(0) == rows &&
                      x.size(1) == values && (values <= 1 || x.stride(1) == 1),
                  name, " must be float64 [", rows, ", ", values, "] with stride 1 in its last dimension");
  check_memory(x, name);
  return {static_cast<double*>(x.data_ptr()), x.stride(0)};
}

int64_t* counters(const Tensor& x, int64_t groups, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long && x.is_contiguous() && x.numel() == groups, name,
                  " must be ", groups, " contiguous int64 counts");
  check_memory(x, name);
  return static_cast<int64_t*>(x.data_ptr());
}

// Which of the moments an aggregation is made of: they lie in the order of the flags.
int64_t place_of(int64_t aggregation, int64_t flags) {
  STD_TORCH_CHECK(
      (aggregation == kAbs || aggregation == kSquare || aggregation == kCentred) && (aggregation & flags),
      "aggregations must be of the moments ", flags, ", got ", aggregation);
  if (aggregation == kCentred) return num_sums(flags) - 1;
  return aggregation == kSquare && (flags & kAbs) ? 1 : 0;
}

void importance_add_(Tensor sums, Tensor squares, Tensor sequences, Tensor tokens, Tensor values,
                     Tensor counts, std::vector<int64_t> aggregations, int64_t flags) {
  STD_TORCH_CHECK(flags >= 1 && flags <= 7, "flags must be in 1..7, got ", flags);
  STD_TORCH_CHECK(values.dim() == 3 && values.is_contiguous() && values.size(0) == num_sums(flags),
                  "values must be contiguous [", num_sums(flags), ", B, M]");
  check_memory(values, "values");
  const int64_t B = values.size(1), M = values.size(2), K = int64_t(aggregations.size());
  STD_TORCH_CHECK((counts.dim() == 1 || counts.dim() == 2) && counts.size(0) == B &&
                      counts.scalar_type() == ScalarType::Long && counts.is_contiguous(),
                  "counts must be contiguous int64 [B] or [B, G]");
  check_memory(counts, "counts");
  const int64_t groups = counts.dim() == 2 ? counts.size(1) : 1;
  STD_TORCH_CHECK(groups > 0 ? M % groups == 0 : M == 0, groups, " groups must divide ", M, " values");
  const int64_t group_size = groups > 0 ? std::max<int64_t>(1, M / groups) : 1;
  const Rows<double> sum_rows = state_rows(sums, K, M, "sums"),
                     square_rows = state_rows(squares, K, M, "squares");
  int64_t *seen = counters(sequences, groups, "sequences"), *added = counters(tokens, groups, "tokens");
  std::vector<int64_t> places;
  for (int64_t aggregation : aggregations) places.push_back(place_of(aggregation, flags));
  const DType dtype = dtype_of(values, "values");
  STD_TORCH_CHECK(dtype == DType::kFloat32 || dtype == DType::kFloat64, "values must be float32 or float64");

  const int64_t* count = static_cast<const int64_t*>(counts.const_data_ptr());
  const auto add = [&](const auto* moments) {
    const int64_t blocks = ceil_div(M, kBlock), threads = K * B * M / kValuesPerThread + 1;
    parallel_tasks(K * blocks, threads, [&](int64_t task, int64_t) {
      const int64_t k = task / blocks, begin = task % blocks * kBlock, width = std::min(kBlock, M - begin);
      const bool is_norm = aggregations[k] == kSquare;
      double total[kBlock] = {}, squared[kBlock] = {};
      for (int64_t b = 0; b < B; ++b) {
        const auto* from = moments + (places[k] * B + b) * M + begin;
        const int64_t* of_sequence = count + b * groups;
        for (int64_t m = 0; m < width;) {
          // the values up to the next group, which all have the same count
          const int64_t group = (begin + m) / group_size;
          const int64_t end = std::min(width, (group + 1) * group_size - begin);
          const double n = double(std::max<int64_t>(1, of_sequence[group]));
          for (; m < end; ++m) {
            const double a = is_norm ? std::sqrt(double(from[m])) : double(from[m]) / n;
            total[m] += a;
            squared[m] += a * a;
          }
        }
      }
      double* sum = sum_rows.data + k * sum_rows.stride + begin;
      double* square = square_rows.data + k * square_rows.stride + begin;
      for (int64_t m = 0; m < width; ++m) sum[m] += total[m];
      for (int64_t m = 0; m < width; ++m) square[m] += squared[m];
    });
  };
  if (dtype == DType::kFloat64) {
    add(static_cast<const double*>(values.const_data_ptr()));
  } else {
    add(static_cast<const float*>(values.const_data_ptr()));
  }
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t g = 0; g < groups; ++g) {
      seen[g] += count[b * groups + g] > 0;
      added[g] += count[b * groups + g];
    }
  }
}

}  // namespace
}  // namespace minitron

STABLE_TORCH_LIBRARY_IMPL(minitron_kernels, CPU, m) {
  m.impl("importance_add_", TORCH_BOX(&minitron::importance_add_));
}
