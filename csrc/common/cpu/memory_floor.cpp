// What benchmarks compare memory-bound kernels with: reading memory and copying memory, on the same threads.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "common/cpu/parallel.h"
#include "common/cpu/stream.h"
#include "common/cpu/tensors.h"

namespace minitron {
namespace {

constexpr int64_t kChunk = 1 << 20;

int64_t bytes_in(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
  return x.numel() * x.element_size();
}

// The exclusive or of all 64-bit words, so that the compiler can leave out no read.
int64_t read_floor(Tensor x) {
  const int64_t bytes = bytes_in(x, "x");
  const char* data = static_cast<const char*>(x.const_data_ptr());
  std::atomic<uint64_t> all{0};
  parallel_tasks(ceil_div(bytes, kChunk), [&](int64_t task, int64_t) {
    const char* begin = data + task * kChunk;
    const int64_t words = std::min(kChunk, bytes - task * kChunk) / 8;
    uint64_t lanes[8] = {};
    int64_t i = 0;
    for (; i + 8 <= words; i += 8) {
      uint64_t line[8];
      std::memcpy(line, begin + i * 8, sizeof(line));
      for (int j = 0; j < 8; ++j) lanes[j] ^= line[j];
    }
    uint64_t part = 0;
    for (; i < words; ++i) {
      uint64_t word;
      std::memcpy(&word, begin + i * 8, 8);
      part ^= word;
    }
    for (uint64_t lane : lanes) part ^= lane;
    all ^= part;
  });
  return static_cast<int64_t>(all.load());
}

// Copies with stores that go around the caches, as a large memcpy does.
void copy_floor(Tensor out, Tensor x) {
  const int64_t bytes = bytes_in(x, "x");
  STD_TORCH_CHECK(bytes_in(out, "out") == bytes, "out must have as many bytes as x");
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.data_ptr());
  parallel_tasks(ceil_div(bytes, kChunk), [&](int64_t task, int64_t) {
    const int64_t begin = task * kChunk;
    stream_copy(to + begin, from + begin, std::min(kChunk, bytes - begin));
    stream_fence();
  });
}

}  // namespace
}  // namespace minitron

STABLE_TORCH_LIBRARY_FRAGMENT(minitron_kernels, m) {
  m.def("read_floor(Tensor x) -> int");
  m.def("copy_floor_(Tensor(a!) out, Tensor x) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(minitron_kernels, CPU, m) {
  m.impl("read_floor", TORCH_BOX(&minitron::read_floor));
  m.impl("copy_floor_", TORCH_BOX(&minitron::copy_floor));
}
