// Schemas of the importance ops. The kernels register themselves in cpu/*.cpp and cuda/*.cu.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(minitron_kernels, m) {
  // x [B, S, C], or [T, C] with the borders cu_seqlens [B + 1] of its sequences; mask [B, S] or [T], true
  // where a token counts. With num_heads, the M = num_heads values of a token are the L2 norms of its heads;
  // else they are its M = C channels. Per sequence and value: sums over its tokens, the planes that `kinds`
  // asks for (1: the sum of |v|; 2: of v^2; 4: of v, and of (v - mean)^2), and the number of tokens.
  m.def(
      "importance_moments(Tensor x, Tensor? mask, Tensor? cu_seqlens, int num_heads, int kinds) -> "
      "(Tensor moments, Tensor counts)");
  // Per row: its L2 norm; with y, 1 - the cosine of the two rows.
  m.def("importance_rows(Tensor x, Tensor? y) -> Tensor");
}
