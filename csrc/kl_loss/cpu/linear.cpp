// linear_kl_loss on CPU as torch sees it; see linear_call.h.
#include <torch/csrc/stable/library.h>

#include <string>

#include "kl_loss/cpu/head_teacher.h"
#include "kl_loss/cpu/linear_call.h"

namespace minitron {
namespace {

std::vector<int64_t> linear_kl_loss_layout(int64_t tokens, int64_t vocab_size, int64_t student_hidden_size,
                                           int64_t teacher_hidden_size, int64_t accumulate_bytes,
                                           bool grad_hidden, bool grad_head, bool head_in_place,
                                           std::vector<int64_t> plan, bool metrics, int64_t outcomes) {
  return make_layout({.tokens = tokens,
                      .vocab_size = vocab_size,
                      .student_hidden_size = student_hidden_size,
                      .teacher_hidden_size = teacher_hidden_size,
                      .accumulate_bytes = accumulate_bytes,
                      .grad_hidden = grad_hidden,
                      .grad_head = grad_head,
                      .head_in_place = head_in_place,
                      .metrics = metrics,
                      .outcomes = outcomes,
                      .plan = LinearPlan::of(plan)})
      .bytes();
}

int64_t kl_loss_constant(std::string name) {
  if (name == "num_stats") return kNumStats;
  if (name == "stat_kl") return kKL;
  if (name == "num_metrics") return kNumMetrics;
  if (name == "metric_ce") return kCE;
  if (name == "num_metric_state") return kNumMetricState;
  if (name == "panel") return kPanel;
  if (name == "max_chain") return kMaxChain;
  if (name == "store") return int64_t(Schedule::kStore);
  if (name == "recompute") return int64_t(Schedule::kRecompute);
  if (name == "forward") return int64_t(Schedule::kForward);
  if (name == "libtorch") return int64_t(Implementation::kLibtorch);
  if (name == "portable") return int64_t(Implementation::kPortable);
  if (name == "amx") return int64_t(Implementation::kAmx);
  if (name == "avx512_bf16") return int64_t(Implementation::kAvx512Bf16);
  if (name == "portable_amx") return int64_t(Implementation::kPortableAmx);
  if (name == "portable_avx512_bf16") return int64_t(Implementation::kPortableAvx512Bf16);
  if (name == "forward_kl") return int64_t(Divergence::kForwardKL);
  if (name == "reverse_kl") return int64_t(Divergence::kReverseKL);
  if (name == "jsd") return int64_t(Divergence::kJSD);
  for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16}) {
    if (name == dtype_name(dtype)) return int64_t(dtype);
  }
  STD_TORCH_CHECK(false, "kl_loss has no constant ", name);
}

// Why bf16 operands cannot be multiplied by an engine of this library here; "" where they can.
std::string why_no_engine(std::string name) {
  if (name == "amx") return why_no_amx();
  if (name == "avx512_bf16") return why_no_avx512_bf16();
  STD_TORCH_CHECK(false, "there is no engine ", name);
}

std::string fastest_bf16_engine() { return bf16_engine(); }

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
  const StudentArguments arguments{student_hidden,
                                   student_head,
                                   student_bias,
                                   mask,
                                   row_weight,
                                   loss,
                                   stats_given,
                                   grad_hidden,
                                   grad_head,
                                   grad_bias,
                                   grad_head_accumulator,
                                   workspace,
                                   vocab_size,
                                   options,
                                   plan_numbers,
                                   labels,
                                   metrics,
                                   ce_weight,
                                   total_vocab};
  LinearCall call(arguments);
  LinearProblem& p = call.problem;
  p.teacher_hidden = matrix_of(teacher_hidden, "teacher_hidden");
  p.teacher_head = matrix_of(teacher_head, "teacher_head");
  STD_TORCH_CHECK(p.teacher_hidden.rows == call.N && p.teacher_head.cols == p.teacher_hidden.cols &&
                      call.V <= p.teacher_head.rows,
                  "shapes of teacher_hidden, teacher_head and vocab_size do not fit each other");
  check_readable(p.teacher_hidden, call.plan.operands, "teacher_hidden");
  check_readable(p.teacher_head, call.plan.operands, "teacher_head");
  call.with_accumulate([&](auto element) {
    using A = decltype(element);
    p.teacher_bias = vector_of<A>(teacher_bias, call.V, "teacher_bias");
    p.stats = stats_given ? vector_of<A>(stats, call.N * kNumStats, "stats")
                          : call.zeroed<A>(stats, call.N * kNumStats, "stats");
  });
  call.run<HeadTeacher>(0);
}

}  // namespace
}  // namespace minitron

STABLE_TORCH_LIBRARY_IMPL(minitron_kernels, CPU, m) {
  m.impl("linear_kl_loss_cpu_", TORCH_BOX(&minitron::linear_kl_loss_cpu_));
}

STABLE_TORCH_LIBRARY_IMPL(minitron_kernels, CompositeExplicitAutograd, m) {
  m.impl("linear_kl_loss_layout", TORCH_BOX(&minitron::linear_kl_loss_layout));
  m.impl("kl_loss_constant", TORCH_BOX(&minitron::kl_loss_constant));
  m.impl("bf16_engine", TORCH_BOX(&minitron::fastest_bf16_engine));
  m.impl("why_no_engine", TORCH_BOX(&minitron::why_no_engine));
}
