// gather on CPU. A task is a run of output rows of one matrix, or a tile where columns are not side by side.
#include <torch/csrc/stable/library.h>

#include <memory>

#include "common/cpu/pages.h"
#include "common/cpu/parallel.h"
#include "common/cpu/stream.h"
#include "gather/cpu/plan.h"
#include "gather/tensor_view.h"

namespace minitron {
namespace {

constexpr int64_t kBytesPerTask = 1 << 18;
constexpr int64_t kTile = 64;
// A result this large will not be found in the caches later: streaming stores need not read its lines first.
constexpr int64_t kStreamBytes = 4 << 20;
constexpr int64_t kMaxScratch = 1 << 18;  // a row of this size, made in scratch first, stays in the L2 cache
constexpr int64_t kPlanRows = 4;          // a plan costs as much as a few rows

struct Job : GatherArguments {
  int64_t matrices;
  bool stream;
  bool new_out = false;  // rows that follow each other, in memory that was never written

  int64_t row_bytes() const { return cols.count * element_size; }
  const char* source_row(const char* matrix, int64_t r) const { return matrix + rows[r] * source.row_stride; }
};

char* matrix_of(const View& view, int64_t index) {
  char* at = view.data;
  for (int64_t d = int64_t(view.batch_sizes.size()) - 1; d >= 0; --d) {
    at += index % view.batch_sizes[d] * view.batch_strides[d];
    index /= view.batch_sizes[d];
  }
  return at;
}

void copy(const Job& job, char* to, const char* from, int64_t bytes) {
  job.stream ? stream_copy(to, from, bytes) : void(std::memcpy(to, from, bytes));
}

// Calls f(source matrix, out matrix, first row, past the last row, slot) for runs of all output rows.
template <typename F>
void for_row_runs(const Job& job, F&& f) {
  const int64_t per_task = std::max<int64_t>(1, kBytesPerTask / job.row_bytes());
  const int64_t tasks = ceil_div(job.rows.count, per_task);
  parallel_tasks(job.matrices * tasks, [&](int64_t task, int64_t slot) {
    const int64_t matrix = task / tasks, begin = task % tasks * per_task;
    const int64_t end = std::min(job.rows.count, begin + per_task);
    char* out = matrix_of(job.out, matrix);
    if (job.new_out) map_pages(out + begin * job.row_bytes(), (end - begin) * job.row_bytes());
    f(matrix_of(job.source, matrix), out, begin, end, slot);
    if (job.stream) stream_fence();
  });
}

// Whole rows. Rows that follow each other in both matrices are one copy.
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

// A store around the caches waits for the address of its page, which no prefetcher looks up before: so a line
// of each page of a row to come is prefetched.
void look_up_pages(const char* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kPageBytes) __builtin_prefetch(row + at);
}

void gather_by_plan(const Job& job, const GatherPlan& plan) {
  const GatherKernels& kernels = gather_kernels();
  const int64_t bytes = job.row_bytes();
  const bool aligned = job.out.aligned(kLineBytes);
  const bool direct = aligned || !job.stream || bytes > kMaxScratch;
  const std::unique_ptr<char[]> scratch(direct ? nullptr : new char[max_threads() * bytes]);
  for_row_runs(job, [&](const char* source, char* out, int64_t begin, int64_t end, int64_t slot) {
    const int64_t most = direct ? kGroupRows : 1;
    for (int64_t r = begin; r < end; r += most) {
      RowGroup group{.count = std::min(most, end - r), .stream = job.stream && aligned};
      for (int64_t i = 0; i < group.count; ++i) {
        const int64_t next = std::min(r + i + most, job.rows.count - 1);
        group.source[i] = job.source_row(source, r + i), group.next[i] = job.source_row(source, next);
        group.out[i] = direct ? out + (r + i) * job.out.row_stride : scratch.get() + slot * bytes;
        if (job.stream) look_up_pages(out + next * job.out.row_stride, bytes);
      }
      kernels.rows(plan, group);
      if (!direct) stream_copy(out + r * job.out.row_stride, group.out[0], bytes);
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

// For any strides. In tiles, so that all of a cache line is used while it is in the cache, in either matrix.
template <typename T>
void gather_elements(const Job& job) {
  const int64_t height = std::min(kTile, job.rows.count), wide = kTile * kTile / height;
  const int64_t down = ceil_div(job.rows.count, height), across = ceil_div(job.cols.count, wide);
  parallel_tasks(job.matrices * down * across, [&](int64_t task, int64_t) {
    const int64_t matrix = task / (down * across), r = task / across % down * height,
                  c = task % across * wide;
    gather_tile<T>(job, matrix_of(job.source, matrix), matrix_of(job.out, matrix), r,
                   std::min(job.rows.count, r + height), c, std::min(job.cols.count, c + wide));
  });
}

struct Bytes16 {
  uint64_t halves[2];
};

template <typename F>
void dispatch_element_size(int64_t element_size, F&& f) {
  switch (element_size) {
    case 1:
      return f(uint8_t{});
    case 2:
      return f(uint16_t{});
    case 4:
      return f(uint32_t{});
    case 8:
      return f(uint64_t{});
    case 16:
      return f(Bytes16{});
    default:
      STD_TORCH_CHECK(false, "weight's elements must have 1, 2, 4, 8 or 16 bytes, got ", element_size);
  }
}

void gather_channels(Tensor out, Tensor weight, std::optional<Tensor> rows, std::optional<Tensor> cols) {
  GatherArguments arguments(out, weight, rows, cols);
  arguments.rows.check(arguments.source.rows, "rows");
  arguments.cols.check(arguments.source.cols, "cols");
  if (arguments.empty()) return;
  arguments.prefer_rows();
  Job job{arguments, arguments.out.matrices(), out.numel() * arguments.element_size >= kStreamBytes};
  job.new_out = job.stream && job.out.row_stride == job.row_bytes() &&
                is_new(matrix_of(job.out, job.matrices - 1), job.rows.count * job.row_bytes());
  const int64_t source_bytes = job.source.cols * job.element_size;
  const bool plans = job.matrices * job.rows.count >= kPlanRows && source_bytes <= kMaxRowBytes;
  if (job.side_by_side() && !job.cols.index) {
    // rows side by side keep more loads in flight than one copy after the other
    const bool lines = job.stream && job.out.aligned(kLineBytes) && source_bytes % kLineBytes == 0;
    return plans && lines ? gather_by_plan(job, plan_of_all(source_bytes)) : gather_rows(job);
  }
  if (job.side_by_side() && plans) {
    return gather_by_plan(
        job, make_plan(gather_kernels(), job.cols.index, job.cols.count, job.element_size, source_bytes));
  }
  dispatch_element_size(job.element_size, [&](auto element) { gather_elements<decltype(element)>(job); });
}

}  // namespace
}  // namespace minitron

STABLE_TORCH_LIBRARY_IMPL(minitron_kernels, CPU, m) {
  m.impl("gather_channels_", TORCH_BOX(&minitron::gather_channels));
}
