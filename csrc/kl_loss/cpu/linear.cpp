// Registration of linear_kl_loss on CPU: checks, the choice of operand type, and the call.
#include "kl_loss/cpu/linear.h"

#include <torch/csrc/stable/library.h>

#include <string>

namespace minitron {
namespace {

Schedule schedule_of(const std::string& name) {
  if (name == "store") return Schedule::kStore;
  if (name == "recompute") return Schedule::kRecompute;
  STD_TORCH_CHECK(name == "forward", "schedule must be store, recompute or forward, got ", name);
  return Schedule::kForward;
}

std::vector<int64_t> linear_kl_loss_layout(int64_t rows, int64_t vocab_size, int64_t student_width,
                                           int64_t teacher_width, int64_t operand_bytes,
                                           int64_t accumulate_bytes, bool grad_hidden, bool grad_head,
                                           bool head_in_place, std::string schedule, int64_t chunk_rows,
                                           int64_t tile, int64_t super_tiles, int64_t stored_tiles,
                                           int64_t threads) {
  return make_layout({.rows = rows,
                      .vocab_size = vocab_size,
                      .student_width = student_width,
                      .teacher_width = teacher_width,
                      .op_bytes = operand_bytes,
                      .acc_bytes = accumulate_bytes,
                      .grad_hidden = grad_hidden,
                      .grad_head = grad_head,
                      .head_in_place = head_in_place,
                      .schedule = schedule_of(schedule),
                      .chunk_rows = chunk_rows,
                      .tile = tile,
                      .super_tiles = super_tiles,
                      .stored_tiles = stored_tiles,
                      .threads = threads})
      .bytes();
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

std::vector<int64_t> active_rows(const uint8_t* mask, int64_t n) {
  std::vector<int64_t> rows;
  rows.reserve(n);
  for (int64_t i = 0; i < n; ++i) {
    if (!mask || mask[i]) rows.push_back(i);
  }
  return rows;
}

// What `engine` names: the operands' type and who multiplies them.
struct Engine {
  DType operands;
  bool portable;
};

Engine engine_of(const std::string& name) {
  if (name == "bf16") return {DType::kBFloat16, false};
  if (name == "portable_bf16") return {DType::kBFloat16, true};
  if (name == "f32") return {DType::kFloat32, !brgemm_f32()};
  if (name == "portable") return {DType::kFloat32, true};
  STD_TORCH_CHECK(name == "f64", "engine must be bf16, f32, f64, portable or portable_bf16, got ", name);
  return {DType::kFloat64, true};
}

// Operands of a type that cannot hold the tensor's values would be rounded, or not be there at all.
void check_readable(const Matrix& x, DType operands, const char* name, const std::string& engine) {
  bool readable = false;
  dispatch(x.dtype, [&](auto storage) {
    dispatch(operands, [&](auto operand) { readable = kReadableAs<decltype(storage), decltype(operand)>; });
  });
  STD_TORCH_CHECK(readable, "engine ", engine, " cannot take ", name, ", which is ", dtype_name(x.dtype));
}

template <typename Op, typename A>
void run(const LinearProblem& problem, const LinearShape& shape, Gemm<Op, A> gemm, const Tensor& workspace) {
  const int64_t need = make_layout(shape).total;
  STD_TORCH_CHECK(workspace.numel() >= need, "workspace must have at least ", need, " bytes, got ",
                  workspace.numel());
  advise_huge_pages(workspace.data_ptr(), need);
  LinearKl<Op, A>(problem, shape, counted(gemm), static_cast<char*>(workspace.data_ptr())).run();
}

void linear_kl_loss_cpu_(Tensor student_hidden, Tensor student_head, Tensor teacher_hidden,
                         Tensor teacher_head, std::optional<Tensor> student_bias,
                         std::optional<Tensor> teacher_bias, std::optional<Tensor> mask,
                         std::optional<Tensor> row_weight, Tensor loss, Tensor stats, bool stats_given,
                         std::optional<Tensor> grad_hidden, std::optional<Tensor> grad_head,
                         std::optional<Tensor> grad_bias, std::optional<Tensor> head_accumulator,
                         Tensor workspace, int64_t vocab_size, double beta, double inv_tau,
                         double student_scale, double student_softcap, double teacher_scale,
                         double teacher_softcap, std::string schedule, int64_t chunk_rows, int64_t tile,
                         int64_t super_tiles, int64_t stored_tiles, std::string engine) {
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
  const Schedule plan = schedule_of(schedule);
  STD_TORCH_CHECK(tile > 0 && tile % 2 == 0 && chunk_rows > 0 && super_tiles > 0 && stored_tiles >= 0 &&
                      stored_tiles <= (plan == Schedule::kStore ? ceil_div(V, tile) : 0),
                  "plan out of range");
  p.options = {beta, inv_tau, student_scale, student_softcap, teacher_scale, teacher_softcap};
  p.stats_given = stats_given;
  p.rows = active_rows(mask_of(mask, N), N);
  p.grad_hidden = output_of(grad_hidden, N, H, "grad_hidden");
  p.grad_head = output_of(grad_head, V, H, "grad_head");
  p.head_accumulator = output_of(head_accumulator, V, H, "grad_head_accumulator");

  const Engine chosen = engine_of(engine);
  check_readable(p.student_hidden, chosen.operands, "student_hidden", engine);
  check_readable(p.student_head, chosen.operands, "student_head", engine);
  check_readable(p.teacher_hidden, chosen.operands, "teacher_hidden", engine);
  check_readable(p.teacher_head, chosen.operands, "teacher_head", engine);
  const bool wide = chosen.operands == DType::kFloat64;
  const DType accumulate = wide ? DType::kFloat64 : DType::kFloat32;
  STD_TORCH_CHECK(!p.head_accumulator.data || p.head_accumulator.dtype == accumulate,
                  "grad_head_accumulator must be ", dtype_name(accumulate), ", got ",
                  dtype_name(p.head_accumulator.dtype));
  const bool any_row = !p.rows.empty() && V > 0;
  if (int64_t(p.rows.size()) < N || !any_row) zero_rows(p.grad_hidden, 0, N);
  zero_rows(p.grad_head, any_row ? V : 0, p.grad_head.rows);  // rows beyond vocab_size are padding

  const auto vectors = [&](auto element) {
    using A = decltype(element);
    p.student_bias = vector_of<A>(student_bias, V, "student_bias");
    p.teacher_bias = vector_of<A>(teacher_bias, V, "teacher_bias");
    p.row_weight = vector_of<A>(row_weight, N, "row_weight");
    p.loss = vector_of<A>(loss, N, "loss");
    p.stats = vector_of<A>(stats, N * kStats, "stats");
    A* bias = vector_of<A>(grad_bias, V, "grad_bias");
    p.grad_bias = bias;
    if (bias && !any_row) std::fill_n(bias, V, A(0));
    if (int64_t(p.rows.size()) < N || !any_row) {
      std::fill_n(static_cast<A*>(p.loss), N, A(0));
      if (!stats_given) std::fill_n(static_cast<A*>(p.stats), N * kStats, A(0));
    }
  };
  if (wide) {
    vectors(double{});
  } else {
    vectors(float{});
  }
  if (!any_row) return;

  const bool lent = p.head_accumulator.data != nullptr;
  const LinearShape shape{.rows = int64_t(p.rows.size()),
                          .vocab_size = V,
                          .student_width = H,
                          .teacher_width = p.teacher_hidden.cols,
                          .op_bytes = bytes_of(chosen.operands),
                          .acc_bytes = bytes_of(accumulate),
                          .grad_hidden = p.grad_hidden.data != nullptr,
                          .grad_head = p.grad_head.data != nullptr || lent,
                          .head_in_place = lent || p.grad_head.dtype == accumulate,
                          .schedule = plan,
                          .chunk_rows = chunk_rows,
                          .tile = tile,
                          .super_tiles = super_tiles,
                          .stored_tiles = stored_tiles,
                          .threads = max_threads()};
  const CpuKernels& kernels = cpu_kernels();
  if (wide) {
    run<double, double>(p, shape, kernels.f64.gemm, workspace);
  } else if (chosen.operands == DType::kBFloat16) {
    STD_TORCH_CHECK(chosen.portable || brgemm_bf16(),
                    "engine bf16: this CPU or this libtorch has no bf16 microkernel");
    run<bf16, float>(p, shape, chosen.portable ? kernels.gemm_bf16 : brgemm_bf16(), workspace);
  } else {
    run<float, float>(p, shape, chosen.portable ? kernels.f32.gemm : brgemm_f32(), workspace);
  }
}

}  // namespace
}  // namespace minitron

STABLE_TORCH_LIBRARY_IMPL(minitron_kernels, CPU, m) {
  m.impl("linear_kl_loss_cpu_", TORCH_BOX(&minitron::linear_kl_loss_cpu_));
}

STABLE_TORCH_LIBRARY_IMPL(minitron_kernels, CompositeExplicitAutograd, m) {
  m.impl("linear_kl_loss_layout", TORCH_BOX(&minitron::linear_kl_loss_layout));
  m.impl("bf16_operands", TORCH_BOX(&minitron::bf16_operands));
}
