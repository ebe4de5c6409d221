// Schemas of the importance ops. The kernels register themselves in cpu/*.cpp and cuda/*.cu.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(minitron_kernels, m) {
  // x [B, S, C], or [T, C] with the borders cu_seqlens [B + 1] of its sequences; mask [B, S] or [T], true for
  // valid tokens. With num_heads, the M = num_heads values of a token are the L2 norms of its heads; without
  // (0), its M = C channels. Gives sums over the valid tokens of each sequence, [num_sums, B, M], of which
  // `moments` says which (1: of |v|; 2: of v^2; 4: of v, and of (v - mean)^2), and the number of tokens [B].
  m.def(
      "importance_moments(Tensor x, Tensor? mask, Tensor? cu_seqlens, int num_heads, int moments) -> "
      "(Tensor sums, Tensor counts)");
  // Adds such sums, values [num_sums, B, M] contiguous, float32 or float64, and counts [B] (or [B, G], where
  // each of G equal groups of values has its own) to a state: sums and squares [K, M] float64, sequences and
  // tokens int64 [] (or [G]). aggregations: K of the bits of `moments`.
  m.def(
      "importance_add_(Tensor(a!) sums, Tensor(b!) squares, Tensor(c!) sequences, Tensor(d!) tokens, "
      "Tensor values, Tensor counts, int[] aggregations, int moments) -> ()");
  // Both in one, on CPUs, for a state without groups.
  m.def(
      "importance_accumulate_(Tensor(a!) sums, Tensor(b!) squares, Tensor(c!) sequences, Tensor(d!) tokens, "
      "Tensor x, Tensor? mask, Tensor? cu_seqlens, int num_heads, int[] aggregations, int moments) -> ()");
  // Of each row of x its L2 norm, or with y 1 - the cosine of the two rows.
  m.def("importance_rows(Tensor x, Tensor? y) -> Tensor");
}
