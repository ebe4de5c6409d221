// What the ops linear_kl_loss_cpu_ and linear_sparse_kl_loss_cpu_ do alike as torch sees them: checks of what
// is said of the student, the choice of the operands' type, and the call.
#pragma once

#include <string>

#include "common/cpu/pages.h"
#include "kl_loss/cpu/linear.h"

namespace minitron {

inline Matrix output_of(const std::optional<Tensor>& x, int64_t rows, int64_t cols, const char* name) {
  if (!x) return {};
  const Matrix m = matrix_of(*x, name);
  STD_TORCH_CHECK(m.rows >= rows && m.cols == cols, name, " has a wrong shape");
  return m;
}

inline void zero_rows(const Matrix& m, int64_t first, int64_t last) {
  for (int64_t r = first; m.data && r < last; ++r) {
    std::memset(const_cast<char*>(m.row(r)), 0, m.cols * bytes_of(m.dtype));
  }
}

inline std::vector<int64_t> valid_tokens_of(const uint8_t* mask, int64_t n) {
  std::vector<int64_t> tokens;
  tokens.reserve(n);
  for (int64_t i = 0; i < n; ++i) {
    if (!mask || mask[i]) tokens.push_back(i);
  }
  return tokens;
}

// Operands of a type that cannot hold the tensor's values would be rounded, or not be there at all.
inline void check_readable(const Matrix& x, DType operands, const char* name) {
  bool readable = false;
  dispatch(x.dtype, [&](auto storage) {
    dispatch(operands, [&](auto operand) { readable = kReadableAs<decltype(storage), decltype(operand)>; });
  });
  STD_TORCH_CHECK(readable, dtype_name(operands), " operands cannot take ", name, ", which is ",
                  dtype_name(x.dtype));
}

// Arguments of both ops, in their order but for what is of the teacher.
struct StudentArguments {
  const Tensor &hidden, &head;
  const std::optional<Tensor>&bias, &mask, &row_weight;
  const Tensor& loss;
  bool stats_given;
  const std::optional<Tensor>&grad_hidden, &grad_head, &grad_bias, &grad_head_accumulator;
  const Tensor& workspace;
  int64_t vocab_size;
  const std::vector<double>& options;
  const std::vector<int64_t>& plan;
  const std::optional<Tensor>&labels, &metrics, &ce_weight;
  int64_t total_vocab;
};

class LinearCall {
 public:
  explicit LinearCall(const StudentArguments& x) : plan(LinearPlan::of(x.plan)), arguments_(x) {
    LinearProblem& p = problem;
    p.student_hidden = matrix_of(x.hidden, "student_hidden");
    p.student_head = matrix_of(x.head, "student_head");
    N = p.student_hidden.rows, H = p.student_hidden.cols, V = x.vocab_size;
    STD_TORCH_CHECK(p.student_head.cols == H && V >= 0 && V <= p.student_head.rows,
                    "shapes of student_hidden, student_head and vocab_size do not fit each other");
    STD_TORCH_CHECK(plan.stored_tiles <= ceil_div(V, plan.tile), "plan out of range");
    p.options = LossOptions::of(x.options);
    p.stats_given = x.stats_given;
    p.labels = labels_of(x.labels, N);
    p.total_vocab = x.total_vocab > 0 ? x.total_vocab : V;
    STD_TORCH_CHECK(!x.ce_weight || (x.labels && x.metrics), "ce_weight needs labels and metrics");
    p.valid_tokens = valid_tokens_of(mask_of(x.mask, N), N);
    p.grad_hidden = output_of(x.grad_hidden, N, H, "grad_hidden");
    p.grad_head = output_of(x.grad_head, V, H, "grad_head");
    p.grad_head_accumulator = output_of(x.grad_head_accumulator, V, H, "grad_head_accumulator");
    check_readable(p.student_hidden, plan.operands, "student_hidden");
    check_readable(p.student_head, plan.operands, "student_head");
    STD_TORCH_CHECK(!p.grad_head_accumulator.data || p.grad_head_accumulator.dtype == accumulate(),
                    "grad_head_accumulator must be ", dtype_name(accumulate()), ", got ",
                    dtype_name(p.grad_head_accumulator.dtype));
    if (!all_tokens()) zero_rows(p.grad_hidden, 0, N);
    zero_rows(p.grad_head, any_token() ? V : 0, p.grad_head.rows);  // those beyond vocab_size are padding
    with_accumulate([&](auto element) {
      using A = decltype(element);
      p.student_bias = vector_of<A>(x.bias, V, "student_bias");
      p.row_weight = vector_of<A>(x.row_weight, N, "row_weight");
      p.loss = zeroed<A>(x.loss, N, "loss");
      p.metrics = p.stats_given ? vector_of<A>(x.metrics, N * kNumMetrics, "metrics")
                                : zeroed<A>(x.metrics, N * kNumMetrics, "metrics");
      p.ce_weight = vector_of<A>(x.ce_weight, N, "ce_weight");
      A* bias = vector_of<A>(x.grad_bias, V, "grad_bias");
      p.grad_bias = bias;
      if (bias && !any_token()) std::fill_n(bias, V, A(0));
    });
  }

  // A vector per token, which is 0 where a token does not count.
  template <typename A>
  A* zeroed(const std::optional<Tensor>& x, int64_t length, const char* name) const {
    A* data = vector_of<A>(x, length, name);
    if (data && !all_tokens()) std::fill_n(data, length, A(0));
    return data;
  }

  // Calls f with a number of the accumulate type.
  template <typename F>
  void with_accumulate(F&& f) const {
    if (accumulate() == DType::kFloat64) {
      f(double{});
    } else {
      f(float{});
    }
  }
  DType accumulate() const { return plan.operands == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }
  bool any_token() const { return !problem.valid_tokens.empty() && V > 0; }
  bool all_tokens() const { return int64_t(problem.valid_tokens.size()) == N && V > 0; }

  // Runs LinearKL with a Teacher, which takes `of_teacher`. outcomes: see LinearShape.
  template <template <typename, typename> class Teacher, typename... Args>
  void run(int64_t outcomes, const Args&... of_teacher) const {
    if (!any_token()) return;
    const bool accumulator_given = problem.grad_head_accumulator.data != nullptr;
    const LinearShape shape{.tokens = int64_t(problem.valid_tokens.size()),
                            .vocab_size = V,
                            .student_hidden_size = H,
                            .teacher_hidden_size = problem.teacher_hidden.cols,
                            .accumulate_bytes = bytes_of(accumulate()),
                            .grad_hidden = problem.grad_hidden.data != nullptr,
                            .grad_head = problem.grad_head.data != nullptr || accumulator_given,
                            .head_in_place = accumulator_given || problem.grad_head.dtype == accumulate(),
                            .metrics = problem.metrics != nullptr,
                            .outcomes = outcomes,
                            .plan = plan};
    const Tensor& workspace = arguments_.workspace;
    const int64_t bytes = make_layout(shape).total;
    STD_TORCH_CHECK(workspace.numel() >= bytes, "workspace must have at least ", bytes, " bytes, got ",
                    workspace.numel());
    char* memory = static_cast<char*>(workspace.data_ptr());
    advise_huge_pages(memory, bytes);
    with_engine(plan, [&](const auto& engine) {
      using E = std::decay_t<decltype(engine)>;
      using Op = typename E::Op;
      using A = typename E::A;
      LinearKL<Op, A, Teacher<Op, A>>(problem, shape, engine, memory, of_teacher...).run();
    });
  }

  LinearProblem problem{};
  const LinearPlan plan;
  int64_t N = 0, H = 0, V = 0;

 private:
  const StudentArguments& arguments_;
};

}  // namespace minitron
