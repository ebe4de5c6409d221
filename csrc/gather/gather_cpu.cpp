// gather on CPU: a task is a run of output rows of one matrix, or a tile where elements are not side by side.
#include <torch/csrc/stable/library.h>

#include <memory>

#include "common/parallel.h"
#include "common/stream.h"
#include "common/tensors.h"
#include "gather/gather_plan.h"

namespace minitron {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kBytesPerTask = 1 << 18;
constexpr int64_t kTile = 64;
// A result this large will not be found in the caches: its stores need not read the lines first.
constexpr int64_t kStreamBytes = 4 << 20;
constexpr int64_t kMaxScratch = 1 << 18;  // a row that is made there first still lies in the L2 cache
constexpr int64_t kPlanRows = 4;          // a plan costs as much as a few rows

// Sizes and byte strides of the last two dimensions, and of those before them.
struct View {
  char* data;
  int64_t rows, cols, row_stride, col_stride;
  std::vector<int64_t> lead_sizes, lead_strides;

  View(const Tensor& x, void* pointer) : data(static_cast<char*>(pointer)) {
    const int64_t width = x.element_size(), dim = x.dim();
    cols = x.size(dim - 1), col_stride = x.stride(dim - 1) * width;
    rows = dim > 1 ? x.size(dim - 2) : 1, row_stride = dim > 1 ? x.stride(dim - 2) * width : 0;
    if (cols <= 1) col_stride = width;
    if (rows <= 1) row_stride = cols * col_stride;
    for (int64_t d = 0; d < dim - 2; ++d) {
      lead_sizes.push_back(x.size(d));
      lead_strides.push_back(x.stride(d) * width);
    }
  }

  char* matrix(int64_t lead) const {
    char* at = data;
    for (int64_t d = int64_t(lead_sizes.size()) - 1; d >= 0; --d) {
      at += lead % lead_sizes[d] * lead_strides[d];
      lead /= lead_sizes[d];
    }
    return at;
  }

  void transpose() {
    std::swap(rows, cols);
    std::swap(row_stride, col_stride);
  }
};

// The indices of one axis; null: all of it.
struct Axis {
  const int64_t* index = nullptr;
  int64_t count = 0;

  Axis(const std::optional<Tensor>& keep, int64_t size, const char* name) : count(size) {
    if (!keep) return;
    STD_TORCH_CHECK(keep->dim() == 1 && keep->is_contiguous() && keep->scalar_type() == ScalarType::Long,
                    name, " must be a contiguous int64 vector");
    index = static_cast<const int64_t*>(keep->const_data_ptr());
    count = keep->numel();
    for (int64_t i = 0; i < count; ++i) {
      STD_TORCH_CHECK(index[i] >= 0 && index[i] < size, name, "[", i, "] is ", index[i],
                      ": indices must be in [0, ", size, ")");
    }
  }

  int64_t operator[](int64_t i) const { return index ? index[i] : i; }
};

struct Job {
  View source, out;
  Axis rows, cols;
  int64_t width, leads;
  bool stream;

  int64_t row_bytes() const { return cols.count * width; }
  const char* source_row(const char* matrix, int64_t r) const { return matrix + rows[r] * source.row_stride; }
};

void copy(const Job& job, char* to, const char* from, int64_t bytes) {
  job.stream ? stream_copy(to, from, bytes) : void(std::memcpy(to, from, bytes));
}

// f(source matrix, out matrix, first row, past the last row, slot) over all output rows.
template <typename F>
void for_row_runs(const Job& job, F&& f) {
  const int64_t per_task = std::max<int64_t>(1, kBytesPerTask / job.row_bytes());
  const int64_t tasks = ceil_div(job.rows.count, per_task);
  parallel_tasks(job.leads * tasks, [&](int64_t task, int64_t slot) {
    const int64_t lead = task / tasks, begin = task % tasks * per_task;
    f(job.source.matrix(lead), job.out.matrix(lead), begin, std::min(job.rows.count, begin + per_task), slot);
    if (job.stream) stream_fence();
  });
}

// Whole rows; those that follow each other in both matrices are one copy.
void gather_rows(const Job& job) {
  const int64_t bytes = job.row_bytes();
  const bool joins = job.source.row_stride == bytes && job.out.row_stride == bytes;
  for_row_runs(job, [&](const char* source, char* out, int64_t begin, int64_t end, int64_t) {
    for (int64_t r = begin, next; r < end; r = next) {
      next = r + 1;
      while (joins && next < end && job.rows[next] == job.rows[next - 1] + 1) ++next;
      copy(job, out + r * job.out.row_stride, job.source_row(source, r), (next - r) * bytes);
    }
  });
}

void gather_by_plan(const Job& job) {
  const GatherKernels& kernels = gather_kernels();
  const GatherPlan plan =
      make_plan(kernels, job.cols.index, job.cols.count, job.width, job.source.cols * job.width);
  const int64_t bytes = job.row_bytes();
  const bool aligned = reinterpret_cast<uintptr_t>(job.out.data) % kLineBytes == 0 &&
                       job.out.row_stride % kLineBytes == 0 &&
                       std::all_of(job.out.lead_strides.begin(), job.out.lead_strides.end(),
                                   [](int64_t stride) { return stride % kLineBytes == 0; });
  const bool direct = aligned || !job.stream || bytes > kMaxScratch;
  const std::unique_ptr<char[]> scratch(direct ? nullptr : new char[max_threads() * bytes]);
  for_row_runs(job, [&](const char* source, char* out, int64_t begin, int64_t end, int64_t slot) {
    for (int64_t r = begin; r < end; ++r) {
      char* to = out + r * job.out.row_stride;
      if (direct) {
        kernels.row(plan, job.source_row(source, r), to, job.stream && aligned);
      } else {
        char* row = scratch.get() + slot * bytes;
        kernels.row(plan, job.source_row(source, r), row, false);
        stream_copy(to, row, bytes);
      }
    }
  });
}

template <typename T>
void gather_tile(const Job& job, const char* source, char* out, int64_t r0, int64_t r1, int64_t c0,
                 int64_t c1) {
  const auto move = [&](int64_t r, int64_t c) {
    std::memcpy(out + r * job.out.row_stride + c * job.out.col_stride,
                job.source_row(source, r) + job.cols[c] * job.source.col_stride, sizeof(T));
  };
  if (job.source.row_stride < job.source.col_stride) {
    for (int64_t c = c0; c < c1; ++c) {
      for (int64_t r = r0; r < r1; ++r) move(r, c);
    }
  } else {
    for (int64_t r = r0; r < r1; ++r) {
      for (int64_t c = c0; c < c1; ++c) move(r, c);
    }
  }
}

// Any strides: tiles, so that lines of either matrix are used whole while they are in the cache.
template <typename T>
void gather_elements(const Job& job) {
  const int64_t height = std::min(kTile, job.rows.count), wide = kTile * kTile / height;
  const int64_t down = ceil_div(job.rows.count, height), across = ceil_div(job.cols.count, wide);
  parallel_tasks(job.leads * down * across, [&](int64_t task, int64_t) {
    const int64_t lead = task / (down * across), r = task / across % down * height, c = task % across * wide;
    gather_tile<T>(job, job.source.matrix(lead), job.out.matrix(lead), r,
                   std::min(job.rows.count, r + height), c, std::min(job.cols.count, c + wide));
  });
}

struct Bytes16 {
  uint64_t halves[2];
};

template <typename F>
void dispatch_width(int64_t width, F&& f) {
  switch (width) {
    case 1:
      return f(uint8_t{});
    case 2:
      return f(uint16_t{});
    case 4:
      return f(uint32_t{});
    case 8:
      return f(uint64_t{});
    default:
      return f(Bytes16{});
  }
}

void gather_channels(Tensor out, Tensor weight, std::optional<Tensor> rows, std::optional<Tensor> cols) {
  const int64_t dim = weight.dim(), width = weight.element_size();
  STD_TORCH_CHECK(dim >= 1 && (dim > 1 || !rows), "rows must be absent for a vector");
  STD_TORCH_CHECK(width <= 16 && (width & (width - 1)) == 0,
                  "weight's elements must have 1, 2, 4, 8 or 16 bytes");
  View source(weight, const_cast<void*>(weight.const_data_ptr())), target(out, out.data_ptr());
  Axis row_axis(rows, source.rows, "rows"), col_axis(cols, source.cols, "cols");
  bool fits = out.dim() == dim && out.element_size() == width && target.lead_sizes == source.lead_sizes &&
              target.rows == row_axis.count && target.cols == col_axis.count;
  STD_TORCH_CHECK(fits, "out must have weight's shape with the kept rows and cols, and its dtype");
  if (out.numel() == 0) return;
  // a matrix that is stored by columns: the same gather of the transposed ones
  if (source.col_stride != width && source.row_stride == width && target.row_stride == width) {
    source.transpose(), target.transpose();
    std::swap(row_axis, col_axis);
  }
  int64_t leads = 1;
  for (int64_t size : source.lead_sizes) leads *= size;
  const Job job{source, target, row_axis, col_axis, width, leads, out.numel() * width >= kStreamBytes};
  const bool side_by_side = source.col_stride == width && target.col_stride == width;
  if (side_by_side && !job.cols.index) return gather_rows(job);
  if (side_by_side && leads * job.rows.count >= kPlanRows && source.cols * width <= kMaxRowBytes) {
    return gather_by_plan(job);
  }
  dispatch_width(width, [&](auto element) { gather_elements<decltype(element)>(job); });
}

}  // namespace
}  // namespace minitron

STABLE_TORCH_LIBRARY_IMPL(minitron_kernels, CPU, m) {
  m.impl("gather_channels_", TORCH_BOX(&minitron::gather_channels));
}
