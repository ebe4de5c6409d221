// linear_sparse_kl_loss on CPU as torch sees it; see linear_call.h.
#include <torch/csrc/stable/library.h>

#include "kl_loss/cpu/linear_call.h"
#include "kl_loss/cpu/sparse_teacher.h"

namespace minitron {
namespace {

// The kernels find a tile's ids by their order, and write nothing for an id that is no token.
void check_ids(const LinearCall& call, const int64_t* ids, int64_t k) {
  for (const int64_t n : call.problem.valid_tokens) {
    int64_t before = -1;
    for (int64_t i = 0; i < k; ++i) {
      const int64_t id = ids[n * k + i];
      const bool behind = id == -1;
      STD_TORCH_CHECK(behind || (id > before && id < call.V),
                      "ids must ascend in a row, in [0, vocab_size), with -1 behind them; got ", id,
                      " in row ", n);
      before = behind ? call.V : id;
    }
  }
}

void linear_sparse_kl_loss_cpu_(Tensor student_hidden, Tensor student_head,
                                std::optional<Tensor> student_bias, Tensor ids, Tensor teacher_outcomes,
                                std::optional<Tensor> mask, std::optional<Tensor> row_weight, Tensor loss,
                                Tensor student_outcomes, bool outcomes_given,
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
                                   outcomes_given,
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
  STD_TORCH_CHECK(ids.dim() == 2 && ids.size(0) == call.N, "ids must be [N, k]");
  SparseProblem sparse{};
  sparse.k = ids.size(1);
  STD_TORCH_CHECK(ids.scalar_type() == torch::headeronly::ScalarType::Long && ids.is_contiguous(),
                  "ids must be a contiguous int64 tensor");
  check_memory(ids, "ids");
  sparse.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  check_ids(call, sparse.ids, sparse.k);
  call.with_accumulate([&](auto element) {
    using A = decltype(element);
    const int64_t size = call.N * (sparse.k + 1);
    sparse.teacher_outcomes = vector_of<A>(teacher_outcomes, size, "teacher_outcomes");
    sparse.student_outcomes = outcomes_given ? vector_of<A>(student_outcomes, size, "student_outcomes")
                                             : call.zeroed<A>(student_outcomes, size, "student_outcomes");
  });
  call.run<SparseTeacher>(sparse.k + 1, sparse);
}

}  // namespace
}  // namespace minitron

STABLE_TORCH_LIBRARY_IMPL(minitron_kernels, CPU, m) {
  m.impl("linear_sparse_kl_loss_cpu_", TORCH_BOX(&minitron::linear_sparse_kl_loss_cpu_));
}
