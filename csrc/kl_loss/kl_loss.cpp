// Schemas of the kl_loss ops. The kernels register themselves in cpu/*.cpp and cuda/*.cu.
// `options` are the numbers of LossOptions, `plan` those of LinearPlan, in the order of their fields.
//
// With `metrics`, [N, kNumMetrics] in the type of stats, a forward also makes what Metric in loss_options.h
// lists. `labels`: int64 [N]; -1, or a token of another tile or shard, is not found. A gradient with
// `ce_weight` [N] is that of sum(weight * loss + ce_weight * cross-entropy), from the labels and the metrics
// that the forward wrote. `first_token`: the token that column 0 of a tile is. `total_vocab`: tokens over
// which label smoothing spreads, where vocab_size is that of a tile or a shard; 0 for vocab_size.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(minitron_kernels, m) {
  // From rows of logits one divergence per row, and the row's stats, which the backward needs: see Stat in
  // loss_options.h.
  m.def(
      "kl_loss_forward(Tensor student_logits, Tensor teacher_logits, Tensor? mask, int vocab_size, "
      "float[] options) -> (Tensor loss, Tensor stats)");
  m.def(
      "kl_loss_forward_metrics(Tensor student_logits, Tensor teacher_logits, Tensor? mask, Tensor? labels, "
      "int vocab_size, float[] options) -> (Tensor loss, Tensor stats, Tensor metrics)");
  m.def(
      "kl_loss_backward(Tensor grad_loss, Tensor stats, Tensor student_logits, Tensor teacher_logits, "
      "Tensor? mask, int vocab_size, float[] options, Tensor? labels=None, Tensor? metrics=None, "
      "Tensor? ce_weight=None) -> Tensor grad_student_logits");

  // grad *= factor, contiguous, any number of dimensions; factor: 0-dim float32 (float64 for a float64 grad)
  // on the same device. The product is rounded once. A factor of 1 moves none of grad's bytes.
  m.def("kl_scale_grad_(Tensor(a!) grad, Tensor factor) -> ()");

  // Epilogues of linear_kl_loss on fp32 logits, CUDA only; biases are float32 [vocab_size]. They write into
  // the mutable arguments. On whole rows:
  m.def(
      "kl_tile_forward_(Tensor student_logits, Tensor teacher_logits, Tensor? student_bias, "
      "Tensor? teacher_bias, Tensor? mask, Tensor(a!) loss, Tensor(b!) stats, int vocab_size, "
      "float[] options, Tensor? labels=None, Tensor(c!)? metrics=None) -> ()");
  // That and kl_tile_grad_ with the stats it has just made. `weight` is the gradient of each row's loss.
  m.def(
      "kl_tile_forward_grad_(Tensor student_logits, Tensor teacher_logits, Tensor? student_bias, "
      "Tensor? teacher_bias, Tensor? mask, Tensor weight, Tensor(a!) loss, Tensor(b!) stats, Tensor(c!) "
      "grad, "
      "int vocab_size, float[] options, Tensor? labels=None, Tensor(d!)? metrics=None, "
      "Tensor? ce_weight=None) -> ()");
  // On a tile of the vocabulary, whose first vocab_size columns are tokens: the gradient, in the dtype of the
  // GEMMs, 0 in the other columns.
  m.def(
      "kl_tile_grad_(Tensor student_logits, Tensor teacher_logits, Tensor? student_bias, "
      "Tensor? teacher_bias, Tensor? mask, Tensor weight, Tensor stats, Tensor(a!) grad, int vocab_size, "
      "float[] options, Tensor? labels=None, Tensor? metrics=None, Tensor? ce_weight=None, "
      "int first_token=0, int total_vocab=0) -> ()");
  // The same two for the student alone. state [2, N]: max_s, sum_s. Logits of -inf add nothing to total_y:
  // they are tokens that a sparse teacher names, or masked out. Of what its tokens say together, one number a
  // row, lse = log sum exp s, the gradient is that of sum(weight * lse + ce_weight * cross-entropy), with
  // lse_y that of all y, at temperature 1.
  m.def(
      "kl_student_stats_(Tensor student_logits, Tensor? student_bias, Tensor? mask, Tensor(a!) state, "
      "bool first, float[] options, Tensor? labels=None, Tensor(b!)? metric_state=None, int first_token=0) "
      "-> ()");
  m.def(
      "kl_student_grad_(Tensor student_logits, Tensor? student_bias, Tensor? mask, Tensor weight, Tensor "
      "lse, "
      "Tensor(a!) grad, int vocab_size, float[] options, Tensor? labels=None, Tensor? lse_y=None, "
      "Tensor? ce_weight=None, int first_token=0, int total_vocab=0) -> ()");
  // state [5, N] and sums [2, N] are carried from tile to tile; `first` starts them.
  m.def(
      "kl_tile_stats_(Tensor student_logits, Tensor teacher_logits, Tensor? student_bias, "
      "Tensor? teacher_bias, Tensor? mask, Tensor(a!) state, bool first, float[] options, "
      "Tensor? labels=None, Tensor(b!)? metric_state=None, int first_token=0) -> ()");
  m.def(
      "kl_tile_mixture_(Tensor student_logits, Tensor teacher_logits, Tensor? student_bias, "
      "Tensor? teacher_bias, Tensor? mask, Tensor stats, Tensor(a!) sums, bool first, float[] options) -> "
      "()");
  // Turns them into loss and stats, after merging those of several splits: [splits, 5 or 2, N]; and
  // metric_states [splits, 4, N] into metrics.
  m.def(
      "kl_finish_stats_(Tensor states, Tensor? mask, Tensor(a!) loss, Tensor(b!) stats, float[] options, "
      "Tensor? labels=None, Tensor? metric_states=None, Tensor(c!)? metrics=None, int total_vocab=0) -> ()");
  m.def(
      "kl_finish_mixture_(Tensor sums, Tensor? mask, Tensor(a!) loss, Tensor(b!) stats, float[] options) "
      "-> ()");

  // From hidden states and heads loss, stats, and whichever gradients have a tensor. The caller plans, and
  // brings a workspace of linear_kl_loss_layout()'s size.
  m.def(
      "linear_kl_loss_cpu_(Tensor student_hidden, Tensor student_head, Tensor teacher_hidden, "
      "Tensor teacher_head, Tensor? student_bias, Tensor? teacher_bias, Tensor? mask, Tensor? row_weight, "
      "Tensor(a!) loss, Tensor(b!) stats, bool stats_given, Tensor(c!)? grad_hidden, Tensor(d!)? grad_head, "
      "Tensor(e!)? grad_bias, Tensor(f!)? grad_head_accumulator, Tensor(g!) workspace, int vocab_size, "
      "float[] options, int[] plan, Tensor? labels=None, Tensor(h!)? metrics=None, Tensor? ce_weight=None, "
      "int total_vocab=0) -> ()");
  // The same for a sparse teacher, whose outcomes are k tokens and "any other". ids: int64 [N, k], ascending
  // in a row, -1 behind them where it has fewer. teacher_outcomes [N, k + 1]: the logarithms of their
  // probabilities, up to a constant, the last that of any other token; -inf at an id of -1. student_outcomes
  // [N, k + 1]: the student's transformed logits of the ids, and log-sum-exp of all others; written, or with
  // outcomes_given read, and then only gradients are made.
  m.def(
      "linear_sparse_kl_loss_cpu_(Tensor student_hidden, Tensor student_head, Tensor? student_bias, "
      "Tensor ids, Tensor teacher_outcomes, Tensor? mask, Tensor? row_weight, Tensor(a!) loss, "
      "Tensor(b!) student_outcomes, bool outcomes_given, Tensor(c!)? grad_hidden, Tensor(d!)? grad_head, "
      "Tensor(e!)? grad_bias, Tensor(f!)? grad_head_accumulator, Tensor(g!) workspace, int vocab_size, "
      "float[] options, int[] plan, Tensor? labels=None, Tensor(h!)? metrics=None, Tensor? ce_weight=None, "
      "int total_vocab=0) -> ()");
  // Of ids and log-probabilities [N, k] of a sparse teacher, and the tail's [N] (none: the ids are a sample),
  // in rows that are valid: the ids ascending with -1 behind them, outcomes [N, k + 1], and whether all is as
  // the op in Python wants it; if not, the rest is undefined.
  m.def(
      "sparse_outcomes(Tensor ids, Tensor logprobs, Tensor? tail, Tensor? valid, int vocab_size, "
      "bool untempered) -> (Tensor ids, Tensor outcomes, bool fits)");
  // Bytes of each part of that workspace, in the order of LinearKLPlan.PARTS, and their sum. outcomes: k + 1
  // of a sparse teacher, 0 for one with a head.
  m.def(
      "linear_kl_loss_layout(int tokens, int vocab_size, int student_hidden_size, int teacher_hidden_size, "
      "int accumulate_bytes, bool grad_hidden, bool grad_head, bool head_in_place, int[] plan, "
      "bool metrics=False, int outcomes=0) -> int[]");
  // The engine in which a bf16 product runs fastest here: a name in ENGINES of ops/kl_loss/engines_cpu.py.
  m.def("bf16_engine() -> str");
  // Why the engine "amx" or "avx512_bf16" cannot run here; "" where it can.
  m.def("why_no_engine(str name) -> str");
  // For tests: the numbers that Python repeats, of stats, a panel, schedules, operand types, divergences.
  m.def("kl_loss_constant(str name) -> int");
}
