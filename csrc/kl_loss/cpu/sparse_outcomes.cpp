// What a sparse teacher says of each token, checked and brought into the order of the kernels: what the op in
// Python does by some forty calls of torch.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cmath>
#include <limits>

#include "common/cpu/parallel.h"
#include "common/cpu/tensors.h"

namespace minitron {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kRowsPerTask = 16;
constexpr double kSlack = 0.01;  // of a row's probability; _SLACK of sparse_teacher.py

template <typename A>
struct Outcome {
  int64_t id;
  A logprob;
};

// Rows of k ids; of one that does not count nothing is looked at.
template <typename A>
struct Given {
  const int64_t* ids;
  const A *logprobs, *tail;  // tail null: ids are a sample
  const uint8_t* valid;      // null: all count
  int64_t k, vocab_size;
  bool untempered;  // the probabilities of ids and tail are those at temperature 1, and sum to 1
};

// Writes a row, [k] and [k + 1]. False if what is given is wrong, which the caller says.
template <typename A>
bool write_row(const Given<A>& given, int64_t n, std::vector<Outcome<A>>& row, int64_t* ids, A* outcomes) {
  constexpr A kNothing = -std::numeric_limits<A>::infinity();
  const int64_t k = given.k;
  const bool counts = !given.valid || given.valid[n];
  row.clear();
  for (int64_t i = 0; counts && i < k; ++i) {
    const int64_t id = given.ids[n * k + i];
    if (id == -1) continue;
    if (id < 0 || id >= given.vocab_size) return false;
    row.push_back({id, given.logprobs[n * k + i]});
  }
  const auto before = [](const Outcome<A>& a, const Outcome<A>& b) { return a.id < b.id; };
  if (!std::is_sorted(row.begin(), row.end(), before)) std::sort(row.begin(), row.end(), before);

  const int64_t size = int64_t(row.size());
  const A most = given.tail ? A(std::log1p(A(kSlack))) : std::numeric_limits<A>::max();
  double mass = 0;
  bool any = false;
  for (int64_t i = 0; i < size; ++i) {
    const A logprob = row[i].logprob;
    if (i > 0 && row[i].id == row[i - 1].id) return false;
    if (!(logprob <= most)) return false;  // nor is a NaN
    mass += std::exp(double(logprob));
    any = any || logprob > kNothing;
    ids[i] = row[i].id;
    outcomes[i] = logprob;
  }
  std::fill(ids + size, ids + k, int64_t(-1));
  std::fill(outcomes + size, outcomes + k, kNothing);
  A& rest = outcomes[k];
  rest = A(0);
  if (!counts) return true;
  if (!given.tail) {
    rest = kNothing;
    return any;
  }
  const A tail = given.tail[n];
  // where all tokens are ids there is no other: what is left of 1 is what rounding has left
  rest = size == given.vocab_size ? kNothing : tail;
  if (!given.untempered) return tail <= A(std::log(double(given.vocab_size)) + kSlack);
  return std::abs(mass + std::exp(double(tail)) - 1) <= kSlack;
}

template <typename A>
bool write_rows(const Given<A>& given, int64_t rows, int64_t* ids, A* outcomes) {
  std::atomic<bool> fits{true};
  parallel_tasks(ceil_div(rows, kRowsPerTask), [&](int64_t task, int64_t) {
    std::vector<Outcome<A>> row;
    row.reserve(given.k);
    const int64_t end = std::min(rows, (task + 1) * kRowsPerTask);
    for (int64_t n = task * kRowsPerTask; n < end && fits.load(std::memory_order_relaxed); ++n) {
      if (!write_row(given, n, row, ids + n * given.k, outcomes + n * (given.k + 1))) fits = false;
    }
  });
  return fits;
}

std::tuple<Tensor, Tensor, bool> sparse_outcomes(Tensor ids, Tensor logprobs, std::optional<Tensor> tail,
                                                 std::optional<Tensor> valid, int64_t vocab_size,
                                                 bool untempered) {
  STD_TORCH_CHECK(ids.dim() == 2 && ids.scalar_type() == ScalarType::Long && ids.is_contiguous(),
                  "ids must be a contiguous int64 tensor [N, k]");
  check_memory(ids, "ids");
  const int64_t N = ids.size(0), k = ids.size(1);
  Tensor sorted = torch::stable::new_empty(ids, {N, k}, ScalarType::Long);
  Tensor outcomes = torch::stable::new_empty(logprobs, {N, k + 1}, logprobs.scalar_type());
  const auto run = [&](auto element) {
    using A = decltype(element);
    const Given<A> given{.ids = static_cast<const int64_t*>(ids.const_data_ptr()),
                         .logprobs = vector_of<A>(logprobs, N * k, "logprobs"),
                         .tail = vector_of<A>(tail, N, "tail"),
                         .valid = mask_of(valid, N),
                         .k = k,
                         .vocab_size = vocab_size,
                         .untempered = untempered};
    return write_rows<A>(given, N, static_cast<int64_t*>(sorted.data_ptr()),
                         static_cast<A*>(outcomes.data_ptr()));
  };
  const bool fits = dtype_of(logprobs, "logprobs") == DType::kFloat64 ? run(double{}) : run(float{});
  return {sorted, outcomes, fits};
}

}  // namespace
}  // namespace minitron

STABLE_TORCH_LIBRARY_IMPL(minitron_kernels, CPU, m) {
  m.impl("sparse_outcomes", TORCH_BOX(&minitron::sparse_outcomes));
}
