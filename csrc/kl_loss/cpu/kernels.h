// Between the launchers, which know torch, and the kernels, which know a SIMD level: plain structs, and one
// table of function pointers per level.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/cpu/gemm.h"
#include "common/cpu/simd.h"
#include "common/types.h"
#include "kl_loss/loss_options.h"

namespace minitron {

// What one tile of the vocabulary says of a row, in a form that merges with that of other tiles: maxima, sums
// of exp, and the KL divergence (in the direction asked for) given that the token is in the tile. By the
// chain rule, KL = KL of the tiles' probabilities + the sum over tiles of P(tile) KL(in the tile).
enum Partial { kPartMaxS, kPartSumS, kPartMaxT, kPartSumT, kPartKL, kNumPartials };

// The log-ratio of a token is d = (t - s) + (lse_s - lse_t). The logits of two models may lie far apart, and
// their difference would then lose its digits. So a shift, a whole number close to max_s - max_t, is added to
// the first bracket and taken off the second. Where the maxima agree it is 0, and t - s of a student close to
// its teacher stays exact.
// The arguments are of type A, or vectors of it. Always inlined, since the files that include this are
// compiled for different CPUs.
template <typename A, typename V>
[[gnu::always_inline]] inline V shift_between(V max_s, V max_t) {
  constexpr A kRounds = std::is_same_v<A, float> ? A(0x1.8p23) : A(0x1.8p52);  // adding it rounds
  return ((max_s - max_t) + kRounds) - kRounds;
}
// lse_s - lse_t less the shift, from maxima and sums of exp: what Stat::kLseDiff holds.
template <typename A>
[[gnu::always_inline]] inline A lse_diff_between(A max_s, double sum_s, A max_t, double sum_t) {
  const double shift = shift_between<A>(max_s, max_t);
  return A((double(max_s) - double(max_t) - shift) + (std::log(sum_s) - std::log(sum_t)));
}

// One row of logits, [vocab_size] with stride 1.
struct LogitsRow {
  const void* student;
  const void* teacher;
  DType student_dtype, teacher_dtype;
  int64_t vocab_size;
};

// What a row's cross-entropy adds to its gradient.
template <typename A>
struct RowCrossEntropy {
  int64_t label;  // -1: none
  A inv_sum_y, weight;
};

// Where a panel's labels are: token numbers, of which the panel's entries are those from `first_token` on.
struct PanelLabels {
  const int64_t* labels;  // [kPanel]; -1: none
  int64_t first_token;
};

// The same of a panel; values per token as below. total_vocab: over which label smoothing spreads.
template <typename A>
struct PanelCrossEntropy {
  PanelLabels labels;
  const A *inv_sum_y, *weight;
  int64_t total_vocab;
};

// The outcomes of a panel's tokens, k + 1 in a row: k ids, and any other token, which is the tail.
template <typename A>
struct PanelOutcomes {
  const int64_t* ids;   // [N, k], ascending in a row, -1 behind them
  A* student;           // [N, k + 1]: the transformed logits of the ids, log-sum-exp of the tail
  const int64_t* rows;  // [tokens] of these two
  int64_t tokens;       // the panel's others only fill it up
  int64_t k, first_token;
};

// Of their gradient: values per token, and those of outcomes, [tokens, k + 1].
template <typename A>
struct PanelOutcomeGrads {
  const A *tail_lse, *tail_grad, *grads;
};

// A = float or double: the type in which logits are held and summed.
template <typename A>
struct KlKernels {
  // kl_loss. Forward: a row's loss and its kNumStats stats; and its kNumMetrics metrics, where that is not
  // null, with a label where that is not null. Backward: its gradient, [vocab_size] in the student's dtype;
  // without cross-entropy where that is null.
  void (*row_forward)(const LogitsRow&, const LossOptions&, A* loss, A* stats, const int64_t* label,
                      A* metrics);
  void (*row_backward)(const LogitsRow&, const LossOptions&, const A* stats, A grad_loss,
                       const RowCrossEntropy<A>*, void* grad);

  // linear_kl_loss, on panels [entries of the vocabulary, kPanel tokens]. Values per token, such as stats and
  // loss, are runs of kPanel, `stride` apart where there are several. Lanes that are not computed are neither
  // read nor written. panel_stats transforms the panels in
  // place (with a bias per entry, or nullptr); the others read what it left. metric_state: kNumMetricState
  // runs, or null where nobody asks; its sums count from the panel's maximum, and the label's is its s.
  void (*panel_stats)(A* student, A* teacher, PanelSize, const A* student_bias, const A* teacher_bias,
                      const LossOptions&, bool needs_kl, A* partials, int64_t stride, const PanelLabels&,
                      A* metric_state);
  void (*panel_kl)(const A* student, const A* teacher, PanelSize, const LossOptions&, const A* stats,
                   int64_t stride, A* kl, A* loss);
  // panel_grad also fetches the panels that lie `ahead` elements behind these, 0 for none.
  void (*panel_grad)(const A* student, const A* teacher, int64_t ahead, PanelSize, const LossOptions&,
                     const A* stats, int64_t stride, const A* row_weight, const PanelCrossEntropy<A>*, A* dz,
                     A* loss);
  // linear_sparse_kl_loss, the same: what it needs is kPartMaxS and kPartSumS of the tail, and the logits of
  // the ids, in whose place it leaves -inf. `write`: into the student's outcomes. metric_state is that of the
  // tail, but for the label's logit, if it is an id. In PanelCrossEntropy inv_sum_y is log sum exp y.
  void (*sparse_panel_stats)(A* student, PanelSize, const A* bias, const LossOptions&,
                             const PanelOutcomes<A>&, bool write, A* partials, int64_t stride,
                             const PanelLabels&, A* metric_state);
  void (*sparse_panel_grad)(const A* student, PanelSize, const LossOptions&, const PanelOutcomes<A>&,
                            const PanelOutcomeGrads<A>&, const PanelCrossEntropy<A>*, A* dz);
  // sums[v] += the sum over tokens of the panel's entry v.
  void (*panel_entry_sums)(const A* panel, PanelSize, A* sums);
  Gemm<A, A> gemm;
};

// Packing of operands of type Op from any dtype that Op can hold without loss, as one engine reads them (see
// engine.h; pack.h has plain rows and panels). transposed and rows make a B operand, the others an A; all pad
// it with zeros to whole steps of K, and to whole rows of an A.
template <typename A, typename Op>
struct PackKernels {
  void (*transposed)(const void* src, DType, int64_t ld, const int64_t* index, int64_t rows, int64_t cols,
                     Op* dst);
  void (*rows)(const void* src, DType, int64_t ld, const int64_t* index, int64_t rows, int64_t padded_rows,
               int64_t cols, Op* dst);
  void (*convert)(const void* src, DType, int64_t ld, int64_t rows, int64_t cols, int64_t padded_cols,
                  Op* dst);
  void (*cast_panel)(const A* panel, PanelSize, Op* dst, int64_t ld);
  // K is the panel's entries, padded to padded_rows.
  void (*transpose_panel)(const A* panel, PanelSize, int64_t padded_rows, Op* dst, int64_t ld);
  // [rows, cols] of type A, rounded to a tensor's dtype.
  void (*narrow)(const A* src, int64_t lds, int64_t rows, int64_t cols, void* dst, DType, int64_t ldd);
};

struct CpuKernels {
  KlKernels<float> f32;
  KlKernels<double> f64;
  PackKernels<float, float> pack_f32;
  PackKernels<float, bf16> pack_bf16;
  PackKernels<double, double> pack_f64;
  Gemm<bf16, float> gemm_bf16;

  template <typename A>
  const KlKernels<A>& kl() const {
    static_assert(std::is_same_v<A, float> || std::is_same_v<A, double>);
    if constexpr (std::is_same_v<A, float>) return f32;
    if constexpr (std::is_same_v<A, double>) return f64;
  }
};

MINITRON_TABLE_PER_LEVEL(CpuKernels, cpu_kernels)

}  // namespace minitron
