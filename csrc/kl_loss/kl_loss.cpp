// Schemas of the kl_loss ops. The kernels register themselves in cpu/*.cpp and cuda/*.cu.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(minitron_kernels, m) {
  // Rows of logits in, one divergence per row out; stats holds what the backward needs of a row:
  // max_s, 1/sum_s, max_t, 1/sum_t, what else log-ratios need, kl.
  m.def(
      "kl_loss_forward(Tensor student_logits, Tensor teacher_logits, Tensor? mask, int vocab_size, "
      "float beta, float inv_tau, float student_scale, float student_softcap, float teacher_scale, "
      "float teacher_softcap) -> (Tensor loss, Tensor stats)");
  m.def(
      "kl_loss_backward(Tensor grad_loss, Tensor stats, Tensor student_logits, Tensor teacher_logits, "
      "Tensor? mask, int vocab_size, float beta, float inv_tau, float student_scale, float student_softcap, "
      "float teacher_scale, float teacher_softcap) -> Tensor grad_student_logits");

  // Epilogues of linear_kl_loss on fp32 logits, CUDA only; biases are float32 [vocab_size]. They fill what is
  // mutable. What takes whole rows:
  m.def(
      "kl_tile_forward_(Tensor student_logits, Tensor teacher_logits, Tensor? student_bias, "
      "Tensor? teacher_bias, Tensor? mask, Tensor(a!) loss, Tensor(b!) stats, int vocab_size, float beta, "
      "float inv_tau, float student_scale, float student_softcap, float teacher_scale, "
      "float teacher_softcap) -> ()");
  // And a tile of the vocabulary, of vocab_size tokens; grad in the GEMMs' dtype, 0 beyond them.
  m.def(
      "kl_tile_grad_(Tensor student_logits, Tensor teacher_logits, Tensor? student_bias, "
      "Tensor? teacher_bias, Tensor? mask, Tensor weight, Tensor stats, Tensor(a!) grad, int vocab_size, "
      "float beta, float inv_tau, float student_scale, float student_softcap, float teacher_scale, "
      "float teacher_softcap) -> ()");
  // state [5, N] and sums [2, N] run over the tiles; `first` starts them. Then they are finished: parts
  // [splits, 5 or 2, N] in, loss and stats out.
  m.def(
      "kl_tile_stats_(Tensor student_logits, Tensor teacher_logits, Tensor? student_bias, "
      "Tensor? teacher_bias, Tensor? mask, Tensor(a!) state, bool first, float beta, float inv_tau, "
      "float student_scale, float student_softcap, float teacher_scale, float teacher_softcap) -> ()");
  m.def(
      "kl_tile_mixture_(Tensor student_logits, Tensor teacher_logits, Tensor? student_bias, "
      "Tensor? teacher_bias, Tensor? mask, Tensor stats, Tensor(a!) sums, bool first, float beta, "
      "float inv_tau, float student_scale, float student_softcap, float teacher_scale, "
      "float teacher_softcap) -> ()");
  m.def("kl_finish_stats_(Tensor states, Tensor? mask, Tensor(a!) loss, Tensor(b!) stats, float beta) -> ()");
  m.def("kl_finish_mixture_(Tensor sums, Tensor? mask, Tensor(a!) loss, Tensor(b!) stats, float beta) -> ()");

  // Hidden states and heads in; fills loss, stats and whichever gradients are given. The caller plans, and
  // lends a workspace of linear_kl_loss_layout()'s size.
  m.def(
      "linear_kl_loss_cpu_(Tensor student_hidden, Tensor student_head, Tensor teacher_hidden, "
      "Tensor teacher_head, Tensor? student_bias, Tensor? teacher_bias, Tensor? mask, Tensor? row_weight, "
      "Tensor(a!) loss, Tensor(b!) stats, bool stats_given, Tensor(c!)? grad_hidden, Tensor(d!)? grad_head, "
      "Tensor(e!)? grad_bias, Tensor(f!)? head_accumulator, Tensor(g!) workspace, int vocab_size, "
      "float beta, float inv_tau, float student_scale, float student_softcap, float teacher_scale, "
      "float teacher_softcap, str schedule, int chunk_rows, int tile, int super_tiles, int stored_tiles, "
      "str engine) -> ()");
  // The operand type in which a bf16 product runs fastest here: "bf16" or "f32".
  m.def("bf16_operands() -> str");
  // Bytes of each part of that workspace, in the order of LinearKLPlan.PARTS.
  m.def(
      "linear_kl_loss_layout(int rows, int vocab_size, int student_width, int teacher_width, "
      "int operand_bytes, int accumulate_bytes, bool grad_hidden, bool grad_head, bool head_in_place, "
      "str schedule, int chunk_rows, int tile, int super_tiles, int stored_tiles, int threads) -> int[]");
}
