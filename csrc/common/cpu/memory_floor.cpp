// What benchmarks compare memory-bound kernels with: reading memory and copying memory, on the same threads.
#include "common/cpu/memory_floor.h"

#include <torch/csrc/stable/library.h>

#include "common/cpu/parallel.h"
#include "common/cpu/stream.h"
#include "common/cpu/tensors.h"

namespace minitron {
namespace {

constexpr int64_t kTask = 1 << 20;  // bytes of a task, where threads take tasks as they get free

int64_t bytes_in(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
  return x.numel() * x.element_size();
}

MemoryWay way_of(int64_t streams, int64_t apart, int64_t ahead, int64_t hint) {
  STD_TORCH_CHECK(streams == 1 || streams == 2 || streams == 4 || streams == 8,
                  "streams must be 1, 2, 4 or 8, got ", streams);
  STD_TORCH_CHECK(apart >= kLineBytes && apart % kLineBytes == 0 && apart <= kTask,
                  "apart must be a multiple of 64 up to 1 MiB, got ", apart);
  STD_TORCH_CHECK(ahead >= 0 && ahead % kLineBytes == 0 && ahead <= apart,
                  "ahead must be a multiple of 64 from 0 to apart, got ", ahead);
  STD_TORCH_CHECK(hint >= 0 && hint <= int64_t(Hint::kPass), "hint must be 0, 1 or 2, got ", hint);
  return {streams, apart, ahead, Hint(hint)};
}

// Calls f(first byte, bytes) for all of `bytes`: one stretch a thread, or tasks in turn.
template <typename F>
void divide(int64_t bytes, int64_t piece, bool stretches, F&& f) {
  const int64_t wanted = stretches ? ceil_div(bytes, max_threads()) : kTask;
  const int64_t task = round_up(std::max<int64_t>(1, wanted), piece);
  parallel_tasks(ceil_div(bytes, task),
                 [&](int64_t i, int64_t) { f(i * task, std::min(task, bytes - i * task)); });
}

int64_t read_floor(Tensor x, int64_t streams, int64_t apart, int64_t ahead, int64_t hint, bool stretches) {
  const MemoryWay way = way_of(streams, apart, ahead, hint);
  const int64_t bytes = bytes_in(x, "x");
  const char* data = static_cast<const char*>(x.const_data_ptr());
  const auto read = memory_floor_kernels().read;
  std::atomic<uint64_t> all{0};
  divide(bytes, way.piece(), stretches,
         [&](int64_t begin, int64_t count) { all ^= read(data + begin, count, way); });
  return static_cast<int64_t>(all.load());
}

void copy_floor(Tensor out, Tensor x, int64_t store, int64_t streams, int64_t apart, int64_t ahead,
                int64_t hint, bool stretches) {
  const MemoryWay way = way_of(streams, apart, ahead, hint);
  const int64_t bytes = bytes_in(x, "x");
  STD_TORCH_CHECK(bytes_in(out, "out") == bytes, "out must have as many bytes as x");
  STD_TORCH_CHECK(store >= 0 && store <= int64_t(Store::kMovsb), "store must be in 0..3, got ", store);
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.data_ptr());
  STD_TORCH_CHECK(Store(store) != Store::kStream || reinterpret_cast<uintptr_t>(to) % kLineBytes == 0,
                  "out must begin at a multiple of 64 bytes for streaming stores");
  const auto copy = memory_floor_kernels().copy;
  divide(bytes, way.piece(), stretches,
         [&](int64_t begin, int64_t count) { copy(to + begin, from + begin, count, Store(store), way); });
}

}  // namespace
}  // namespace minitron

STABLE_TORCH_LIBRARY_FRAGMENT(minitron_kernels, m) {
  m.def("read_floor(Tensor x, int streams, int apart, int ahead, int hint, bool stretches) -> int");
  m.def(
      "copy_floor_(Tensor(a!) out, Tensor x, int store, int streams, int apart, int ahead, int hint, "
      "bool stretches) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(minitron_kernels, CPU, m) {
  m.impl("read_floor", TORCH_BOX(&minitron::read_floor));
  m.impl("copy_floor_", TORCH_BOX(&minitron::copy_floor));
}
