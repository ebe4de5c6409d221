// linear_kl_loss on CPU as torch sees it: checks, the choice of the operands' type, and the call.
#include "kl_loss/cpu/linear.h"

#include <torch/csrc/stable/library.h>

#include <string>

namespace minitron {
namespace {

std::vector<int64_t> linear_kl_loss_layout(int64_t tokens, int64_t vocab_size, int64_t student_hidden_size,
                                           int64_t teacher_hidden_size, int64_t accumulate_bytes,
                                           bool grad_hidden, bool grad_head, bool head_in_place,
                                           std::vector<int64_t> plan, int64_t threads, bool metrics,
                                           int64_t outcomes) {
  return make_layout({.tokens = tokens,
                      .vocab_size = vocab_size,
                      .student_hidden_size = student_hidden_size,
                      .teacher_hidden_size = teacher_hidden_size,
                      .accumulate_bytes = accumulate_bytes,
                      .grad_hidden = grad_hidden,
                      .grad_head = grad_head,
                      .head_in_place = head_in_place,
                      .metrics = metrics,
                      .plan = LinearPlan::of(plan),
                      .threads = threads})
      .bytes();
}

int64_t kl_loss_constant(std::string name) {
  if (name == "num_stats") return kNumStats;
  if (name == "stat_kl") return kKL;
  if (name == "num_metrics") return kNumMetrics;
  if (name == "metric_ce") return kCE;
  if (name == "num_metric_state") return kNumMetricState;
  if (name == "panel") return kPanel;
  if (name == "store") return int64_t(Schedule::kStore);
  if (name == "recompute") return int64_t(Schedule::kRecompute);
  if (name == "forward") return int64_t(Schedule::kForward);
  if (name == "forward_kl") return int64_t(Divergence::kForwardKL);
  if (name == "reverse_kl") return int64_t(Divergence::kReverseKL);
  if (name == "jsd") return int64_t(Divergence::kJSD);
  for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16}) {
    if (name == dtype_name(dtype)) return int64_t(dtype);
  }
  STD_TORCH_CHECK(false, "kl_loss has no constant ", name);
}

std::string bf16_operands() { return bf16_operand_type(); }

Matrix output_of(const std::optional<Tensor>& x, int64_t rows, int64_t cols, const char* name) {
  if (!x) return {};
  const Matrix m = matrix_of(*x, name);
  STD_TORCH_CHECK(m.rows >= rows && m.cols == cols, name, " has a wrong shape");
  return m;
}

void zero_rows(const Matrix& m, int64_t first, int64_t last) {
  for (int64_t r = first; m.data && r < last; ++r) {
    std::memset(const_cast<char*>(m.row(r)), 0, m.cols * bytes_of(m.dtype));
  }
}

std::vector<int64_t> valid_tokens_of(const uint8_t* mask, int64_t n) {
  std::vector<int64_t> tokens;
  tokens.reserve(n);
  for (int64_t i = 0; i < n; ++i) {
    if (!mask || mask[i]) tokens.push_back(i);
  }
  return tokens;
}

// Operands of a type that cannot hold the tensor's values would be rounded, or not be there at all.
void check_readable(const Matrix& x, DType operands, const char* name) {
  bool readable = false;
  dispatch(x.dtype, [&](auto storage) {
    dispatch(operands, [&](auto operand) { readable = kReadableAs<decltype(storage), decltype(operand)>; });
  });
  STD_TORCH_CHECK(readable, dtype_name(operands), " operands cannot take ", name, ", which is ",
                  dtype_name(x.dtype));
}

template <typename Op, typename A>
void run(const LinearProblem& problem, const LinearShape& shape, Gemm<Op, A> gemm, const Tensor& workspace) {
  const int64_t bytes = make_layout(shape).total;
  STD_TORCH_CHECK(workspace.numel() >= bytes, "workspace must have at least ", bytes, " bytes, got ",
                  workspace.numel());
  advise_huge_pages(workspace.data_ptr(), bytes);
  LinearKL<Op, A>(problem, shape, counted(gemm), static_cast<char*>(workspace.data_ptr())).run();
}

void linear_kl_loss_cpu_(Tensor student_hidden, Tensor student_head, Tensor teacher_hidden,
                         Tensor teacher_head, std::optional<Tensor> student_bias,
                         std::optional<Tensor> teacher_bias, std::optional<Tensor> mask,
                         std::optional<Tensor> row_weight, Tensor loss, Tensor stats, bool stats_given,
                         std::optional<Tensor> grad_hidden, std::optional<Tensor> grad_head,
                         std::optional<Tensor> grad_bias, std::optional<Tensor> grad_head_accumulator,
                         Tensor workspace, int64_t vocab_size, std::vector<double> options,
                         std::vector<int64_t> plan_numbers, std::optional<Tensor> labels,
                         std::optional<Tensor> metrics, std::optional<Tensor> ce_weight,
                         int64_t total_vocab) {
  LinearProblem p{};
  p.student_hidden = matrix_of(student_hidden, "student_hidden");
  p.student_head = matrix_of(student_head, "student_head");
  p.teacher_hidden = matrix_of(teacher_hidden, "teacher_hidden");
  p.teacher_head = matrix_of(teacher_head, "teacher_head");
  const int64_t N = p.student_hidden.rows, H = p.student_hidden.cols, V = vocab_size;
  STD_TORCH_CHECK(p.teacher_hidden.rows == N && p.student_head.cols == H &&
                      p.teacher_head.cols == p.teacher_hidden.cols && V <= p.student_head.rows &&
                      V <= p.teacher_head.rows,
                  "shapes of hidden states, heads and vocab_size do not fit each other");
  const LinearPlan plan = LinearPlan::of(plan_numbers);
  STD_TORCH_CHECK(plan.stored_tiles <= ceil_div(V, plan.tile), "plan out of range");
  p.options = LossOptions::of(options);
  p.stats_given = stats_given;
  p.labels = labels_of(labels, N);
  p.total_vocab = total_vocab > 0 ? total_vocab : V;
  STD_TORCH_CHECK(!ce_weight || (labels && metrics), "ce_weight needs labels and metrics");
  p.valid_tokens = valid_tokens_of(mask_of(mask, N), N);
  p.grad_hidden = output_of(grad_hidden, N, H, "grad_hidden");
  p.grad_head = output_of(grad_head, V, H, "grad_head");
  p.grad_head_accumulator = output_of(grad_head_accumulator, V, H, "grad_head_accumulator");

  check_readable(p.student_hidden, plan.operands, "student_hidden");
  check_readable(p.student_head, plan.operands, "student_head");
  check_readable(p.teacher_hidden, plan.operands, "teacher_hidden");
  check_readable(p.teacher_head, plan.operands, "teacher_head");
  const bool wide = plan.operands == DType::kFloat64;
  const DType accumulate = wide ? DType::kFloat64 : DType::kFloat32;
  STD_TORCH_CHECK(!p.grad_head_accumulator.data || p.grad_head_accumulator.dtype == accumulate,
                  "grad_head_accumulator must be ", dtype_name(accumulate), ", got ",
                  dtype_name(p.grad_head_accumulator.dtype));
  const bool any_token = !p.valid_tokens.empty() && V > 0;
  if (int64_t(p.valid_tokens.size()) < N || !any_token) zero_rows(p.grad_hidden, 0, N);
  zero_rows(p.grad_head, any_token ? V : 0, p.grad_head.rows);  // those beyond vocab_size are padding

  const auto vectors = [&](auto element) {
    using A = decltype(element);
    p.student_bias = vector_of<A>(student_bias, V, "student_bias");
    p.teacher_bias = vector_of<A>(teacher_bias, V, "teacher_bias");
    p.row_weight = vector_of<A>(row_weight, N, "row_weight");
    p.loss = vector_of<A>(loss, N, "loss");
    p.stats = vector_of<A>(stats, N * kNumStats, "stats");
    p.metrics = vector_of<A>(metrics, N * kNumMetrics, "metrics");
    p.ce_weight = vector_of<A>(ce_weight, N, "ce_weight");
    A* bias = vector_of<A>(grad_bias, V, "grad_bias");
    p.grad_bias = bias;
    if (bias && !any_token) std::fill_n(bias, V, A(0));
    if (int64_t(p.valid_tokens.size()) < N || !any_token) {
      std::fill_n(static_cast<A*>(p.loss), N, A(0));
      if (!stats_given) {
        std::fill_n(static_cast<A*>(p.stats), N * kNumStats, A(0));
        if (p.metrics) std::fill_n(static_cast<A*>(p.metrics), N * kNumMetrics, A(0));
      }
    }
  };
  if (wide) {
    vectors(double{});
  } else {
    vectors(float{});
  }
  if (!any_token) return;

  const bool accumulator_given = p.grad_head_accumulator.data != nullptr;
  const LinearShape shape{.tokens = int64_t(p.valid_tokens.size()),
                          .vocab_size = V,
                          .student_hidden_size = H,
                          .teacher_hidden_size = p.teacher_hidden.cols,
                          .accumulate_bytes = bytes_of(accumulate),
                          .grad_hidden = p.grad_hidden.data != nullptr,
                          .grad_head = p.grad_head.data != nullptr || accumulator_given,
                          .head_in_place = accumulator_given || p.grad_head.dtype == accumulate,
                          .metrics = p.metrics != nullptr,
                          .plan = plan,
                          .threads = max_threads()};
  const CpuKernels& kernels = cpu_kernels();
  if (wide) {
    run<double, double>(p, shape, kernels.f64.gemm, workspace);
  } else if (plan.operands == DType::kBFloat16) {
    STD_TORCH_CHECK(plan.portable || brgemm_bf16(), "this CPU or this libtorch has no bf16 microkernel");
    run<bf16, float>(p, shape, plan.portable ? kernels.gemm_bf16 : brgemm_bf16(), workspace);
  } else {
    const bool portable = plan.portable || !brgemm_f32();
    run<float, float>(p, shape, portable ? kernels.f32.gemm : brgemm_f32(), workspace);
  }
}

}  // namespace
}  // namespace minitron

STABLE_TORCH_LIBRARY_IMPL(minitron_kernels, CPU, m) {
  m.impl("linear_kl_loss_cpu_", TORCH_BOX(&minitron::linear_kl_loss_cpu_));
}

STABLE_TORCH_LIBRARY_IMPL(minitron_kernels, CompositeExplicitAutograd, m) {
  m.impl("linear_kl_loss_layout", TORCH_BOX(&minitron::linear_kl_loss_layout));
  m.impl("kl_loss_constant", TORCH_BOX(&minitron::kl_loss_constant));
  m.impl("bf16_operands", TORCH_BOX(&minitron::bf16_operands));
}
