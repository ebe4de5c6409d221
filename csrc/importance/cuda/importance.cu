// Launchers of the importance kernels. They do not wait for the GPU; besides the outputs they allocate only
// the partial sums and the norms of heads.
#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "common/cuda/launch_torch.cuh"
#include "importance/cuda/kernels.cuh"

namespace minitron::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostBlocks = std::numeric_limits<int>::max();
// Less what a block of channels reaches beyond the last one: Lane counts in int.
constexpr int64_t kMostChannels = kMostBlocks - kPieceThreads * 16;
constexpr int64_t kLeastTokens = 32;     // of a piece
constexpr int64_t kEnoughBlocks = 1024;  // about two waves of an H100: pieces are as long as this allows

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t power_of_two(int64_t least) {
  int64_t n = 1;
  while (n < least) n *= 2;
  return n;
}

int blocks_of(int64_t blocks, const char* op) {
  STD_TORCH_CHECK(blocks <= kMostBlocks, op, ": more than 2^31 - 1 blocks");
  return static_cast<int>(blocks);
}

template <typename T>
T* data_of(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <typename T>
const T* const_data_of(const std::optional<Tensor>& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

// The stride of a dimension with one element may be anything.
int64_t stride_of(const Tensor& x, int64_t dim) { return x.size(dim) > 1 ? x.stride(dim) : 0; }

// x as (B, S, heads, D), out (B, S, heads).
void launch_rows(const Tensor& x, const std::optional<Tensor>& y, const std::optional<Tensor>& mask,
                 int64_t heads, const Tensor& out, const LaunchScope& scope) {
  const int64_t rows = out.numel(), width = x.size(-1) / heads;
  if (rows == 0) return;
  STD_TORCH_CHECK(rows <= kMostBlocks && width <= kMostBlocks,
                  "x has more than 2^31 - 1 rows, or a row more than 2^31 - 1 elements");
  const bool batched = x.dim() == 3;
  dispatch_float(x.scalar_type(), "x", [&](auto element) {
    using T = decltype(element);
    const int64_t lanes = std::min<int64_t>(kWarpSize, power_of_two(ceil_div(width * sizeof(T), 16)));
    const Rows<T> arguments = {const_data_of<T>(x),           const_data_of<T>(y),
                               const_data_of<bool>(mask),     batched ? stride_of(x, 0) : 0,
                               stride_of(x, batched ? 1 : 0), y ? stride_of(*y, 0) : 0,
                               static_cast<unsigned>(rows),   static_cast<unsigned>(x.size(-2)),
                               static_cast<unsigned>(heads),  static_cast<int>(width)};
    const auto kernel = y ? &importance_rows_kernel<true, T> : &importance_rows_kernel<false, T>;
    MINITRON_LAUNCH(kernel, dim3(ceil_div(rows, kRowThreads / lanes)), dim3(kRowThreads), scope.stream(),
                    arguments, static_cast<int>(lanes), data_of<float>(out));
  });
  scope.check("importance_rows");
}

// The longest pieces that make kEnoughBlocks blocks.
Pieces pieces_of(int64_t sequences, int64_t length, const int64_t* cu_seqlens, int64_t channel_blocks) {
  const int64_t wanted = ceil_div((cu_seqlens ? 1 : sequences) * length * channel_blocks, kEnoughBlocks);
  const int64_t tokens = std::clamp<int64_t>(power_of_two(wanted), kLeastTokens, kMostTokens);
  const int64_t pieces = ceil_div(length, tokens);
  return {sequences,  length,
          pieces,     cu_seqlens ? pieces + sequences : pieces * sequences,
          cu_seqlens, static_cast<int>(tokens)};
}

std::tuple<Tensor, Tensor> importance_moments_cuda(Tensor x, const std::optional<Tensor>& mask,
                                                   const std::optional<Tensor>& cu_seqlens, int64_t num_heads,
                                                   int64_t moments) {
  if (cu_seqlens) {
    STD_TORCH_CHECK(x.dim() == 2 && cu_seqlens->dim() == 1 && cu_seqlens->is_contiguous() &&
                        cu_seqlens->size(0) >= 1 && cu_seqlens->scalar_type() == ScalarType::Long &&
                        cu_seqlens->device() == x.device(),
                    "x must be [T, C] and cu_seqlens int64 [B + 1] on its device");
  } else {
    STD_TORCH_CHECK(x.dim() == 3, "x must be [B, S, C] without cu_seqlens");
  }
  const int64_t C = x.size(-1), S = x.size(-2), B = cu_seqlens ? cu_seqlens->size(0) - 1 : x.size(0);
  STD_TORCH_CHECK(moments >= 1 && moments <= 7, "moments must be in 1..7, got ", moments);
  STD_TORCH_CHECK(C <= 1 || x.stride(-1) == 1, "x must have stride 1 in its last dimension");
  STD_TORCH_CHECK(C <= kMostChannels, "x must have at most ", kMostChannels, " channels, got ", C);
  STD_TORCH_CHECK(num_heads >= 0 && (num_heads == 0 || C % num_heads == 0), "num_heads must divide ", C);
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() &&
                        mask->numel() == (cu_seqlens ? S : B * S) && mask->device() == x.device(),
                    "mask must be a contiguous bool tensor of an entry per token, on the device of x");
  }
  const LaunchScope scope(x);
  if (num_heads > 0) {
    Tensor norms = cu_seqlens ? torch::stable::new_empty(x, {S, num_heads}, ScalarType::Float)
                              : torch::stable::new_empty(x, {B, S, num_heads}, ScalarType::Float);
    launch_rows(x, std::nullopt, mask, num_heads, norms, scope);
    x = norms;
  }
  const int64_t M = x.size(-1), count = num_sums(moments);
  Tensor sums = torch::stable::new_empty(x, {count, B, M}, ScalarType::Float);
  Tensor counts = torch::stable::new_empty(x, {B}, ScalarType::Long);
  if (B == 0) return {sums, counts};

  dispatch_float(x.scalar_type(), "x", [&](auto element) {
    using T = decltype(element);
    constexpr int64_t kRun = 16 / sizeof(T);
    // even without channels there are tokens to count
    const int64_t channel_blocks = std::max<int64_t>(1, ceil_div(M, kPieceThreads * kRun));
    const Pieces pieces = pieces_of(B, S, const_data_of<int64_t>(cu_seqlens), channel_blocks);
    const Tensor partial = torch::stable::new_empty(x, {count, pieces.slots, M}, ScalarType::Float);
    const Tensor piece_counts = torch::stable::new_empty(x, {pieces.slots}, ScalarType::Int);
    const int64_t batch_stride = cu_seqlens ? 0 : stride_of(x, 0);
    const int64_t token_stride = stride_of(x, x.dim() - 2);
    const Tokens<T> tokens = {const_data_of<T>(x),
                              const_data_of<bool>(mask),
                              batch_stride,
                              token_stride,
                              static_cast<int>(M),
                              M % kRun == 0 && batch_stride % kRun == 0 && token_stride % kRun == 0 &&
                                  reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0};
    const int64_t blocks = pieces.per_sequence * (cu_seqlens ? 1 : B) * channel_blocks;
    if (blocks > 0) {
      dispatch_moments(moments, [&](auto constant) {
        const auto kernel = &importance_pieces_kernel<decltype(constant)::value, T>;
        MINITRON_LAUNCH(kernel, dim3(blocks_of(blocks, "importance_moments")), dim3(kPieceThreads),
                        scope.stream(), tokens, pieces, static_cast<int>(channel_blocks),
                        data_of<float>(partial), data_of<int>(piece_counts));
      });
      scope.check("importance_moments");
    }
    const int64_t value_blocks = std::max<int64_t>(1, ceil_div(M, kWarpSize));
    const auto kernel = &importance_finish_kernel;
    MINITRON_LAUNCH(kernel, dim3(blocks_of(B * value_blocks, "importance_moments")), dim3(kFinishThreads),
                    scope.stream(), const_data_of<float>(partial), const_data_of<int>(piece_counts), pieces,
                    moments, M, static_cast<int>(value_blocks), data_of<float>(sums),
                    data_of<int64_t>(counts));
    scope.check("importance_moments");
  });
  return {sums, counts};
}

Tensor importance_rows_cuda(const Tensor& x, const std::optional<Tensor>& y) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions, got ", x.dim());
  STD_TORCH_CHECK(x.size(1) <= 1 || x.stride(1) == 1, "x must have stride 1 in its last dimension");
  if (y) {
    STD_TORCH_CHECK(y->dim() == 2 && y->size(0) == x.size(0) && y->size(1) == x.size(1) &&
                        y->scalar_type() == x.scalar_type() && y->device() == x.device(),
                    "y must match x");
    STD_TORCH_CHECK(y->size(1) <= 1 || y->stride(1) == 1, "y must have stride 1 in its last dimension");
  }
  const LaunchScope scope(x);
  Tensor out = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float);
  launch_rows(x, y, std::nullopt, 1, out, scope);
  return out;
}

}  // namespace
}  // namespace minitron::cuda

STABLE_TORCH_LIBRARY_IMPL(MINITRON_CUDA_LIBRARY, MINITRON_CUDA_KEY, m) {
  m.impl("importance_moments", TORCH_BOX(&minitron::cuda::importance_moments_cuda));
  m.impl("importance_rows", TORCH_BOX(&minitron::cuda::importance_rows_cuda));
}
