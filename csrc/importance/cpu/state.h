// The memory of an ImportanceState, and how moments of sequences are added to it: in one pass what Python
// does by some seventeen calls of torch.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/cpu/parallel.h"
#include "common/cpu/tensors.h"
#include "importance/moments.h"

namespace minitron {

class StateMemory {
 public:
  // Of `values` values in `groups` groups of equal size, which have a count each; aggregations: of the
  // moments `flags`, which each sequence has. Throws where the tensors are not so.
  StateMemory(const Tensor& sums, const Tensor& squares, const Tensor& sequences, const Tensor& tokens,
              const std::vector<int64_t>& aggregations, int64_t flags, int64_t values, int64_t groups)
      : values_(values), groups_(groups) {
    STD_TORCH_CHECK(groups > 0 ? values % groups == 0 : values == 0, groups, " groups must divide ", values,
                    " values");
    group_size_ = groups > 0 ? std::max<int64_t>(1, values / groups) : 1;
    for (int64_t aggregation : aggregations) {
      terms_.push_back({place_of(aggregation, flags), aggregation == kSquare});
    }
    sums_ = rows_of(sums, "sums"), squares_ = rows_of(squares, "squares");
    sequences_ = counters(sequences, "sequences"), tokens_ = counters(tokens, "tokens");
  }

  // Adds B sequences: moments [num_sums, B, values], counts [B, groups] of their tokens.
  template <typename T>
  void add(const T* moments, const int64_t* counts, int64_t B) const {
    const int64_t blocks = ceil_div(values_, kBlock), K = int64_t(terms_.size());
    parallel_tasks(K * blocks, K * B * values_ / kValuesPerThread + 1, [&](int64_t task, int64_t) {
      const int64_t k = task / blocks, begin = task % blocks * kBlock;
      const int64_t width = std::min(kBlock, values_ - begin);
      double total[kBlock] = {}, squared[kBlock] = {};
      for (int64_t b = 0; b < B; ++b) {
        const T* from = moments + (terms_[k].place * B + b) * values_ + begin;
        const int64_t* of_sequence = counts + b * groups_;
        for (int64_t m = 0; m < width;) {
          // the values up to the next group, which all have the same count
          const int64_t group = (begin + m) / group_size_;
          const int64_t end = std::min(width, (group + 1) * group_size_ - begin);
          const double n = double(std::max<int64_t>(1, of_sequence[group]));
          for (; m < end; ++m) {
            const double a = terms_[k].is_norm ? std::sqrt(double(from[m])) : double(from[m]) / n;
            total[m] += a;
            squared[m] += a * a;
          }
        }
      }
      double* sum = sums_.data + k * sums_.stride + begin;
      double* square = squares_.data + k * squares_.stride + begin;
      for (int64_t m = 0; m < width; ++m) sum[m] += total[m];
      for (int64_t m = 0; m < width; ++m) square[m] += squared[m];
    });
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t g = 0; g < groups_; ++g) {
        sequences_[g] += counts[b * groups_ + g] > 0;
        tokens_[g] += counts[b * groups_ + g];
      }
    }
  }

 private:
  static constexpr int64_t kBlock = 512;  // values of a task, whose sums stay in the L1 cache
  static constexpr int64_t kValuesPerThread = 1 << 16;

  struct Rows {
    double* data;
    int64_t stride;
  };
  struct Term {
    int64_t place;  // of its moments, which lie in the order of the flags
    bool is_norm;
  };

  static int64_t place_of(int64_t aggregation, int64_t flags) {
    STD_TORCH_CHECK(
        (aggregation == kAbs || aggregation == kSquare || aggregation == kCentred) && (aggregation & flags),
        "aggregations must be of the moments ", flags, ", got ", aggregation);
    if (aggregation == kCentred) return num_sums(flags) - 1;
    return aggregation == kSquare && (flags & kAbs) ? 1 : 0;
  }

  Rows rows_of(const Tensor& x, const char* name) const {
    const int64_t K = int64_t(terms_.size());
    STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == torch::headeronly::ScalarType::Double &&
                        x.size(0) == K && x.size(1) == values_ && (values_ <= 1 || x.stride(1) == 1),
                    name, " must be float64 [", K, ", ", values_, "] with stride 1 in its last dimension");
    check_memory(x, name);
    return {static_cast<double*>(x.data_ptr()), x.stride(0)};
  }

  int64_t* counters(const Tensor& x, const char* name) const {
    STD_TORCH_CHECK(
        x.scalar_type() == torch::headeronly::ScalarType::Long && x.is_contiguous() && x.numel() == groups_,
        name, " must be ", groups_, " contiguous int64 counts");
    check_memory(x, name);
    return static_cast<int64_t*>(x.data_ptr());
  }

  int64_t values_, groups_, group_size_;
  std::vector<Term> terms_;
  Rows sums_, squares_;
  int64_t *sequences_, *tokens_;
};

}  // namespace minitron
