// Tasks on torch's own threads, so that torch.set_num_threads() decides.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace minitron {

inline int64_t max_threads() { return torch::stable::get_num_threads(); }

// Calls f(task, slot) for each task in [0, n). At most `most` threads take the tasks in order, whichever is
// free. slot < most is the number of the thread's scratch memory; a result must not depend on it.
template <typename F>
void parallel_tasks(int64_t n, int64_t most, F&& f) {
  const int64_t threads = std::min({n, max_threads(), most});
  if (threads <= 0) return;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      for (int64_t task = next++; task < n; task = next++) f(task, slot);
    }
  });
}

template <typename F>
void parallel_tasks(int64_t n, F&& f) {
  parallel_tasks(n, max_threads(), f);
}

}  // namespace minitron
