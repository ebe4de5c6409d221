// importance on CPU. A task is a block of values of one sequence, or a run of rows.
#include <torch/csrc/stable/library.h>

#include <memory>

#include "common/cpu/parallel.h"
#include "common/cpu/tensors.h"
#include "importance/cpu/kernels.h"
#include "importance/cpu/state.h"

namespace minitron {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kElementsPerTask = 1 << 16;
constexpr int64_t kBytesPerThread = 1 << 18;

// How many threads `bytes` of activations are worth: a thread takes as long to wake up as to read
// kBytesPerThread.
int64_t threads_for(int64_t bytes) { return std::clamp<int64_t>(bytes / kBytesPerThread, 1, max_threads()); }

DType narrow_dtype(const Tensor& x, const char* name) {
  const DType dtype = dtype_of(x, name);
  check_memory(x, name);
  STD_TORCH_CHECK(dtype != DType::kFloat64, name, " must be float32, bfloat16 or float16");
  return dtype;
}

// Where sequence b's tokens begin, and how many there are.
struct Sequences {
  int64_t count, length;
  std::vector<int64_t> borders;  // empty: all have that length

  int64_t begin(int64_t b) const { return borders.empty() ? b * length : borders[b]; }
  int64_t tokens(int64_t b) const { return borders.empty() ? length : borders[b + 1] - borders[b]; }
};

Sequences sequences_of(const Tensor& x, const std::optional<Tensor>& cu_seqlens) {
  if (!cu_seqlens) {
    STD_TORCH_CHECK(x.dim() == 3, "x must be [B, S, C] without cu_seqlens");
    return {x.size(0), x.size(1), {}};
  }
  STD_TORCH_CHECK(x.dim() == 2 && cu_seqlens->dim() == 1 && cu_seqlens->is_contiguous() &&
                      cu_seqlens->size(0) >= 1 && cu_seqlens->scalar_type() == ScalarType::Long,
                  "x must be [T, C] and cu_seqlens int64 [B + 1]");
  check_memory(*cu_seqlens, "cu_seqlens");
  const int64_t* data = static_cast<const int64_t*>(cu_seqlens->const_data_ptr());
  Sequences out{cu_seqlens->size(0) - 1, 0, {data, data + cu_seqlens->size(0)}};
  bool rising = out.borders.front() == 0 && out.borders.back() == x.size(0);
  for (int64_t b = 0; b < out.count; ++b) rising &= out.borders[b] <= out.borders[b + 1];
  STD_TORCH_CHECK(rising, "cu_seqlens must rise from 0 to the number of tokens ", x.size(0));
  return out;
}

// The widest blocks that leave at most an eighth of the threads' time idle, since long rows are read faster
// than short ones. Blocks of channels begin at multiples of 64, so that a channel is computed by the same
// instructions whatever block it is in; heads lie in whole vectors anyway. So the number of threads changes
// no bit.
int64_t block_of(int64_t sequences, int64_t values, bool heads, int64_t head_dim, int64_t threads) {
  const int64_t most = heads ? kMaxHeads : kMaxBlock, unit = heads ? 1 : 64;
  const int64_t least = ceil_div(256, std::max<int64_t>(1, head_dim));
  int64_t blocks = std::max<int64_t>(1, ceil_div(values, most));
  const auto busy = [&] {
    const int64_t tasks = sequences * blocks;
    return ceil_div(tasks, threads) * threads * 8 <= tasks * 9;
  };
  while (blocks * least < values && !busy()) ++blocks;
  return std::max<int64_t>(unit, round_up(ceil_div(values, blocks), unit));
}

// The moments of each sequence, from arguments that are checked here.
class MomentsCall {
 public:
  MomentsCall(const Tensor& x, const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens,
              int64_t num_heads, int64_t moments)
      : dtype_(narrow_dtype(x, "x")), sequences_(sequences_of(x, cu_seqlens)), moments_(moments) {
    const int64_t C = x.size(-1), element_size = bytes_of(dtype_);
    STD_TORCH_CHECK(moments >= 1 && moments <= 7, "moments must be in 1..7, got ", moments);
    STD_TORCH_CHECK(C <= 1 || x.stride(-1) == 1, "x must have stride 1 in its last dimension");
    STD_TORCH_CHECK(num_heads >= 0 && (num_heads == 0 || C % num_heads == 0), "num_heads must divide ", C);
    heads_ = num_heads > 0;
    head_dim_ = heads_ ? C / num_heads : 1, values_ = heads_ ? num_heads : C;
    valid_ = mask_of(mask, cu_seqlens ? x.size(0) : sequences_.count * sequences_.length);
    data_ = static_cast<const char*>(x.const_data_ptr());
    token_stride_ = (cu_seqlens ? x.stride(0) : x.stride(1)) * element_size;
    sequence_stride_ = cu_seqlens ? 0 : x.stride(0) * element_size;
    threads_ = threads_for(x.numel() * element_size);
    block_ = block_of(sequences_.count, values_, heads_, head_dim_, threads_);
    scratch_stride_ = round_up(moments_scratch(moments, block_, heads_), 64);
  }

  int64_t sequences() const { return sequences_.count; }
  int64_t values() const { return values_; }
  int64_t scratch_bytes() const { return threads_ * scratch_stride_; }

  // out [num_sums, B, values], count [B].
  void run(float* out, int64_t* count, char* scratch) const {
    // even without values there are tokens to count
    const int64_t B = sequences_.count, blocks = std::max<int64_t>(1, ceil_div(values_, block_));
    const auto kernel = importance_kernels().moments;
    parallel_tasks(B * blocks, threads_, [&](int64_t task, int64_t slot) {
      const int64_t b = task / blocks, m = task % blocks * block_, begin = sequences_.begin(b);
      const char* first = data_ + (sequences_.borders.empty() ? b * sequence_stride_ : begin * token_stride_);
      const int64_t tokens = kernel({.x = first + m * head_dim_ * bytes_of(dtype_),
                                     .stride = token_stride_,
                                     .mask = valid_ ? valid_ + begin : nullptr,
                                     .tokens = sequences_.tokens(b),
                                     .values = std::min(block_, values_ - m),
                                     .heads = heads_,
                                     .head_dim = head_dim_,
                                     .sums = out + b * values_ + m,
                                     .sum_stride = B * values_},
                                    dtype_, moments_, scratch + slot * scratch_stride_);
      if (m == 0) count[b] = tokens;
    });
  }

 private:
  const DType dtype_;
  const Sequences sequences_;
  const int64_t moments_;
  bool heads_;
  int64_t head_dim_, values_;
  const uint8_t* valid_;
  const char* data_;
  int64_t token_stride_, sequence_stride_;  // bytes
  int64_t threads_, block_, scratch_stride_;
};

std::tuple<Tensor, Tensor> importance_moments(Tensor x, std::optional<Tensor> mask,
                                              std::optional<Tensor> cu_seqlens, int64_t num_heads,
                                              int64_t moments) {
  const MomentsCall call(x, mask, cu_seqlens, num_heads, moments);
  const int64_t B = call.sequences();
  Tensor sums = torch::stable::new_empty(x, {num_sums(moments), B, call.values()}, ScalarType::Float);
  Tensor counts = torch::stable::new_empty(x, {B}, ScalarType::Long);
  const auto scratch = std::make_unique_for_overwrite<char[]>(call.scratch_bytes());
  call.run(static_cast<float*>(sums.data_ptr()), static_cast<int64_t*>(counts.data_ptr()), scratch.get());
  return {sums, counts};
}

// importance_moments() and importance_add_() in one.
void importance_accumulate_(Tensor sums, Tensor squares, Tensor sequences, Tensor tokens, Tensor x,
                            std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens, int64_t num_heads,
                            std::vector<int64_t> aggregations, int64_t moments) {
  const MomentsCall call(x, mask, cu_seqlens, num_heads, moments);
  const StateMemory state(sums, squares, sequences, tokens, aggregations, moments, call.values(), 1);
  const int64_t B = call.sequences(), of_sums = num_sums(moments) * B * call.values();
  const auto memory = std::make_unique_for_overwrite<char[]>(
      call.scratch_bytes() + B * int64_t(sizeof(int64_t)) + of_sums * int64_t(sizeof(float)));
  auto* const count = reinterpret_cast<int64_t*>(memory.get() + call.scratch_bytes());
  auto* const out = reinterpret_cast<float*>(count + B);
  call.run(out, count, memory.get());
  state.add(out, count, B);
}

Tensor importance_rows(Tensor x, std::optional<Tensor> y) {
  const int64_t element_size = bytes_of(narrow_dtype(x, "x"));
  const Matrix a = matrix_of(x, "x"), b = y ? matrix_of(*y, "y") : a;
  STD_TORCH_CHECK(a.rows == b.rows && a.cols == b.cols && a.dtype == b.dtype, "y must match x");
  Tensor out = torch::stable::new_empty(x, {a.rows}, ScalarType::Float);
  float* result = static_cast<float*>(out.data_ptr());
  const auto kernel = importance_kernels().rows;
  const int64_t per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, a.cols));
  parallel_tasks(ceil_div(a.rows, per_task), threads_for((y ? 2 : 1) * x.numel() * element_size),
                 [&](int64_t task, int64_t) {
                   const int64_t first = task * per_task;
                   kernel({.pair = y.has_value(),
                           .x = a.row(first),
                           .y = b.row(first),
                           .x_stride = a.ld * element_size,
                           .y_stride = b.ld * element_size,
                           .rows = std::min(a.rows - first, per_task),
                           .n = a.cols,
                           .out = result + first},
                          a.dtype);
                 });
  return out;
}

}  // namespace
}  // namespace minitron

STABLE_TORCH_LIBRARY_IMPL(minitron_kernels, CPU, m) {
  m.impl("importance_moments", TORCH_BOX(&minitron::importance_moments));
  m.impl("importance_accumulate_", TORCH_BOX(&minitron::importance_accumulate_));
  m.impl("importance_rows", TORCH_BOX(&minitron::importance_rows));
}
