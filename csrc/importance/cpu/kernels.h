// The CPU kernels of importance, one table per SIMD level.
#pragma once

#include <cstdint>

#include "common/cpu/simd.h"
#include "common/types.h"
#include "importance/moments.h"

namespace minitron {

// Tokens are added up eight at a time in registers, 512 at a time in fp32, then in double: sums are exact to
// about 1e-6 however long the sequence is, and the order of additions depends only on the sequence.
constexpr int64_t kGroup = 8;
constexpr int64_t kChain = 512;
constexpr int64_t kMaxBlock = 16384;  // values
constexpr int64_t kMaxHeads = 2048;

// A block of values of one sequence's tokens.
struct MomentsTask {
  const char* x;        // token 0's first element of the block
  int64_t stride;       // bytes from a token to the next
  const uint8_t* mask;  // of token 0, or nullptr
  int64_t tokens;       // to look at
  int64_t values;       // M of this block, at most kMaxBlock, of heads kMaxHeads
  bool heads;           // a value is the norm of a head, otherwise a channel
  int64_t head_dim;     // elements of a head; 1 for channels
  float* sums;          // out: the block's first sums
  int64_t sum_stride;   // elements from those to the next
};

// Bytes of scratch memory that moments() takes: less than 1 MiB.
inline int64_t moments_scratch(int64_t moments, int64_t values, bool heads) {
  const int64_t padded = round_up(values, 16);
  return padded *
         (num_sums(moments) * (sizeof(double) + sizeof(float)) + (heads ? kGroup * sizeof(float) : 0));
}

// ||x|| of each row, or of a pair 1 - cos(x, y).
struct RowsTask {
  bool pair;  // y alone does not say it: an empty tensor has no address
  const char *x, *y;
  int64_t x_stride, y_stride;  // bytes from a row to the next
  int64_t rows, n;             // n elements each
  float* out;                  // [rows]
};

struct ImportanceKernels {
  // Fills the block's sums; returns the number of valid tokens.
  int64_t (*moments)(const MomentsTask&, DType, int64_t moments, void* scratch);
  void (*rows)(const RowsTask&, DType);
};

MINITRON_TABLE_PER_LEVEL(ImportanceKernels, importance_kernels)

}  // namespace minitron
