// Launcher of gather: one kernel per element size, on the current stream. It does not wait for the GPU, and
// allocates nothing.
#include "common/cuda/launch_torch.cuh"
#include "gather/cuda/kernels.cuh"
#include "gather/tensor_view.h"

namespace minitron::cuda {
namespace {

struct BatchDim {
  int64_t size, source_stride, out_stride;
};

// The batch dimensions, the last one first. Neighbours are joined where they are one dimension in both
// tensors.
std::vector<BatchDim> batch_dims_of(const GatherArguments& call) {
  std::vector<BatchDim> out;
  for (int64_t d = int64_t(call.out.batch_sizes.size()) - 1; d >= 0; --d) {
    const BatchDim next{call.out.batch_sizes[d], call.source.batch_strides[d], call.out.batch_strides[d]};
    if (next.size == 1) continue;
    if (!out.empty() && next.source_stride == out.back().size * out.back().source_stride &&
        next.out_stride == out.back().size * out.back().out_stride) {
      out.back().size *= next.size;
    } else {
      out.push_back(next);
    }
  }
  STD_TORCH_CHECK(out.size() <= kMaxBatchDims, "weight and out have strides that leave ", out.size(),
                  " dimensions before the last two, at most ", kMaxBatchDims, ": make them contiguous");
  out.resize(kMaxBatchDims, {1, 0, 0});
  return out;
}

GatherSide side_of(const View& view, int64_t element_size) {
  return {view.row_stride / element_size,
          view.col_stride / element_size,
          {},
          view.col_stride == element_size && view.aligned(16)};
}

template <typename T>
void launch(const LaunchScope& scope, const GatherArguments& call) {
  constexpr int64_t kColsPerBlock = kGatherThreads * kGatherVec<T>;
  const int64_t element_size = sizeof(T), matrices = call.out.matrices();
  GatherShape shape{call.rows.index, call.cols.index, call.rows.count, call.cols.count, 0, {}, {}, {}};
  shape.row_runs = (shape.row_count + kGatherRowsPerBlock - 1) / kGatherRowsPerBlock;
  shape.source = side_of(call.source, element_size), shape.out = side_of(call.out, element_size);
  const std::vector<BatchDim> dims = batch_dims_of(call);
  for (int d = 0; d < kMaxBatchDims; ++d) {
    shape.batch_sizes[d] = dims[d].size;
    shape.source.batch_strides[d] = dims[d].source_stride / element_size;
    shape.out.batch_strides[d] = dims[d].out_stride / element_size;
  }
  const int64_t down = matrices * shape.row_runs;
  const int64_t across = (shape.col_count + kColsPerBlock - 1) / kColsPerBlock;
  STD_TORCH_CHECK(down < int64_t{1} << 31 && across < 1 << 16, "out is too large for one launch: ", down,
                  " runs of rows, ", shape.col_count, " columns");
  MINITRON_LAUNCH(gather_kernel<T>, dim3(down, across), dim3(kGatherThreads), scope.stream(), shape,
                  reinterpret_cast<const T*>(call.source.data), reinterpret_cast<T*>(call.out.data));
}

void gather_channels_cuda(Tensor out, Tensor weight, std::optional<Tensor> rows, std::optional<Tensor> cols) {
  GatherArguments call(out, weight, rows, cols);
  for (const std::optional<Tensor>& keep : {rows, cols}) {
    STD_TORCH_CHECK(!keep || keep->device() == weight.device(), "rows and cols must be on weight's device");
  }
  if (call.empty()) return;
  call.prefer_rows();
  const LaunchScope scope(weight);
  switch (call.element_size) {
    case 1:
      launch<uint8_t>(scope, call);
      break;
    case 2:
      launch<uint16_t>(scope, call);
      break;
    case 4:
      launch<uint32_t>(scope, call);
      break;
    case 8:
      launch<uint64_t>(scope, call);
      break;
    case 16:
      launch<uint4>(scope, call);
      break;
    default:
      STD_TORCH_CHECK(false, "weight's elements must have 1, 2, 4, 8 or 16 bytes, got ", call.element_size);
  }
  scope.check("gather_channels_");
}

}  // namespace
}  // namespace minitron::cuda

STABLE_TORCH_LIBRARY_IMPL(MINITRON_CUDA_LIBRARY, MINITRON_CUDA_KEY, m) {
  m.impl("gather_channels_", TORCH_BOX(&minitron::cuda::gather_channels_cuda));
}
