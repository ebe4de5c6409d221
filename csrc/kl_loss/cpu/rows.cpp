// kl_loss on CPU. Rows are independent: a task is a run of them.
#include <torch/csrc/stable/library.h>

#include "common/cpu/parallel.h"
#include "common/cpu/tensors.h"
#include "kl_loss/cpu/kernels.h"

namespace minitron {
namespace {

constexpr int64_t kLogitsPerTask = 1 << 16;

struct Rows {
  Matrix student, teacher;
  const uint8_t* mask;
  const int64_t* labels;
  int64_t vocab_size;
  LossOptions options;

  LogitsRow at(int64_t n) const {
    return {student.row(n), teacher.row(n), student.dtype, teacher.dtype, vocab_size};
  }
  template <typename F>
  void each(F&& f) const {
    const int64_t per_task = std::max<int64_t>(1, kLogitsPerTask / std::max<int64_t>(1, vocab_size));
    parallel_tasks(ceil_div(student.rows, per_task), [&](int64_t task, int64_t) {
      const int64_t end = std::min(student.rows, (task + 1) * per_task);
      for (int64_t n = task * per_task; n < end; ++n) f(n);
    });
  }
};

Rows rows_of(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
             const std::optional<Tensor>& labels, int64_t vocab_size, const std::vector<double>& options) {
  const Rows rows{matrix_of(student, "student_logits"),
                  matrix_of(teacher, "teacher_logits"),
                  mask_of(mask, student.size(0)),
                  labels_of(labels, student.size(0)),
                  vocab_size,
                  LossOptions::of(options)};
  STD_TORCH_CHECK(rows.student.rows == rows.teacher.rows,
                  "student_logits and teacher_logits must have as many rows");
  STD_TORCH_CHECK(vocab_size >= 0 && vocab_size <= std::min(rows.student.cols, rows.teacher.cols),
                  "vocab_size must fit both logits");
  STD_TORCH_CHECK((rows.student.dtype == DType::kFloat64) == (rows.teacher.dtype == DType::kFloat64),
                  "float64 logits need float64 logits on the other side");
  return rows;
}

template <typename A>
void forward_rows(const Rows& rows, A* loss, A* stats, A* metrics) {
  const auto kernel = cpu_kernels().kl<A>().row_forward;
  rows.each([&](int64_t n) {
    A* of_row = metrics ? metrics + n * kNumMetrics : nullptr;
    if (rows.mask && !rows.mask[n]) {
      loss[n] = 0;
      std::fill_n(stats + n * kNumStats, int(kNumStats), A(0));
      if (metrics) std::fill_n(of_row, int(kNumMetrics), A(0));
    } else {
      kernel(rows.at(n), rows.options, loss + n, stats + n * kNumStats,
             rows.labels ? rows.labels + n : nullptr, of_row);
    }
  });
}

// Loss, stats, and with `has_metrics` the metrics.
std::tuple<Tensor, Tensor, std::optional<Tensor>> forward(const Rows& rows, const Tensor& like,
                                                          bool has_metrics) {
  const bool wide = rows.student.dtype == DType::kFloat64;
  const auto dtype = wide ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;
  const int64_t N = rows.student.rows;
  Tensor loss = torch::stable::new_empty(like, {N}, dtype);
  Tensor stats = torch::stable::new_empty(like, {N, int64_t(kNumStats)}, dtype);
  std::optional<Tensor> metrics;
  if (has_metrics) metrics = torch::stable::new_empty(like, {N, int64_t(kNumMetrics)}, dtype);
  const auto run = [&](auto element) {
    using A = decltype(element);
    forward_rows(rows, static_cast<A*>(loss.data_ptr()), static_cast<A*>(stats.data_ptr()),
                 metrics ? static_cast<A*>(metrics->data_ptr()) : nullptr);
  };
  if (wide) {
    run(double{});
  } else {
    run(float{});
  }
  return {loss, stats, metrics};
}

std::tuple<Tensor, Tensor> kl_loss_forward(Tensor student, Tensor teacher, std::optional<Tensor> mask,
                                           int64_t vocab_size, const std::vector<double>& options) {
  const Rows rows = rows_of(student, teacher, mask, std::nullopt, vocab_size, options);
  const auto [loss, stats, metrics] = forward(rows, student, false);
  return {loss, stats};
}

std::tuple<Tensor, Tensor, Tensor> kl_loss_forward_metrics(Tensor student, Tensor teacher,
                                                           std::optional<Tensor> mask,
                                                           std::optional<Tensor> labels, int64_t vocab_size,
                                                           const std::vector<double>& options) {
  const Rows rows = rows_of(student, teacher, mask, labels, vocab_size, options);
  const auto [loss, stats, metrics] = forward(rows, student, true);
  return {loss, stats, *metrics};
}

// The numbers of a gradient, one a row but for stats and metrics; without cross-entropy the last two are
// null.
template <typename A>
struct GradRows {
  const A *grad_loss, *stats, *metrics, *ce_weight;
};

template <typename A>
void backward_rows(const Rows& rows, const GradRows<A>& given, char* grad) {
  const auto kernel = cpu_kernels().kl<A>().row_backward;
  const int64_t element_size = bytes_of(rows.student.dtype);
  const int64_t row_bytes = rows.student.cols * element_size, used_bytes = rows.vocab_size * element_size;
  rows.each([&](int64_t n) {
    char* out = grad + n * row_bytes;
    if (rows.mask && !rows.mask[n]) {
      std::fill_n(out, row_bytes, char(0));
    } else {
      RowCrossEntropy<A> ce{};
      if (given.ce_weight) {
        ce = {rows.labels[n], given.metrics[n * kNumMetrics + kInvSumY], given.ce_weight[n]};
      }
      kernel(rows.at(n), rows.options, given.stats + n * kNumStats, given.grad_loss[n],
             given.ce_weight ? &ce : nullptr, out);
      std::fill_n(out + used_bytes, row_bytes - used_bytes, char(0));
    }
  });
}

Tensor kl_loss_backward(Tensor grad_loss, Tensor stats, Tensor student, Tensor teacher,
                        std::optional<Tensor> mask, int64_t vocab_size, const std::vector<double>& options,
                        std::optional<Tensor> labels, std::optional<Tensor> metrics,
                        std::optional<Tensor> ce_weight) {
  const Rows rows = rows_of(student, teacher, mask, labels, vocab_size, options);
  STD_TORCH_CHECK(!ce_weight || (labels && metrics), "ce_weight needs labels and metrics");
  const int64_t N = rows.student.rows;
  Tensor grad = torch::stable::new_empty(student, {N, rows.student.cols});
  const auto run = [&](auto element) {
    using A = decltype(element);
    backward_rows<A>(
        rows,
        {vector_of<A>(grad_loss, N, "grad_loss"), vector_of<A>(stats, N * kNumStats, "stats"),
         vector_of<A>(metrics, N * kNumMetrics, "metrics"), vector_of<A>(ce_weight, N, "ce_weight")},
        static_cast<char*>(grad.data_ptr()));
  };
  if (rows.student.dtype == DType::kFloat64) {
    run(double{});
  } else {
    run(float{});
  }
  return grad;
}

}  // namespace
}  // namespace minitron

STABLE_TORCH_LIBRARY_IMPL(minitron_kernels, CPU, m) {
  m.impl("kl_loss_forward", TORCH_BOX(&minitron::kl_loss_forward));
  m.impl("kl_loss_forward_metrics", TORCH_BOX(&minitron::kl_loss_forward_metrics));
  m.impl("kl_loss_backward", TORCH_BOX(&minitron::kl_loss_backward));
}
