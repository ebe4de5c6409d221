// What kl_loss and linear_kl_loss compute, said once for CPU and CUDA: the divergence, the options of the
// logits, and what a row's statistics are. No torch header: kernels see this file.
#pragma once

#include <stdexcept>
#include <type_traits>
#include <vector>

namespace minitron {

enum class Divergence { kForwardKL, kReverseKL, kJSD };

struct LossOptions {
  double beta = 0;  // 0: forward KL, 1: reverse KL, between them the weight of the teacher in JSD's mixture
  double inv_tau = 1;
  double student_scale = 1, student_softcap = 0, teacher_scale = 1, teacher_softcap = 0;  // softcap 0: none
  double label_smoothing = 0;  // of the cross-entropy

  // From `float[] options` of the ops: these fields in this order.
  static LossOptions of(const std::vector<double>& numbers) {
    if (numbers.size() != 7) throw std::invalid_argument("options must be the 7 numbers of LossOptions");
    return {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6]};
  }

  // Always inlined, as what follows: some of the files that include this are compiled for other CPUs than the
  // rest, and a function of theirs must not become everyone's.
  [[gnu::always_inline]] Divergence divergence() const {
    if (beta <= 0) return Divergence::kForwardKL;
    if (beta >= 1) return Divergence::kReverseKL;
    return Divergence::kJSD;
  }
};

// Calls f with the divergence as a compile-time constant. Without a default case, so that a further
// divergence does not compile before it is handled here.
template <typename F>
decltype(auto) with_divergence(Divergence divergence, F&& f) {
  switch (divergence) {
    case Divergence::kForwardKL:
      return f(std::integral_constant<Divergence, Divergence::kForwardKL>{});
    case Divergence::kReverseKL:
      return f(std::integral_constant<Divergence, Divergence::kReverseKL>{});
    case Divergence::kJSD:
      return f(std::integral_constant<Divergence, Divergence::kJSD>{});
  }
  __builtin_unreachable();
}

// What the schedules have to know of a divergence; like with_divergence(), without a default case.

// Whether a row's loss and kl can only be summed once the row's normalisers are known, from a second look at
// the logits. Otherwise parts of the vocabulary merge by the chain rule of KL, and one look is enough.
[[gnu::always_inline]] constexpr bool needs_second_look(Divergence divergence) {
  switch (divergence) {
    case Divergence::kForwardKL:
    case Divergence::kReverseKL:
      return false;
    case Divergence::kJSD:
      return true;
  }
  __builtin_unreachable();
}

// Whether the gradient needs a KL of the whole row (kKL of its stats).
[[gnu::always_inline]] constexpr bool grad_needs_kl(Divergence divergence) {
  switch (divergence) {
    case Divergence::kForwardKL:
      return false;
    case Divergence::kReverseKL:
    case Divergence::kJSD:
      return true;
  }
  __builtin_unreachable();
}

// Whether the KL of parts of the vocabulary is KL(S || T) and not KL(T || S).
[[gnu::always_inline]] constexpr bool is_of_student(Divergence divergence) {
  switch (divergence) {
    case Divergence::kForwardKL:
    case Divergence::kJSD:
      return false;
    case Divergence::kReverseKL:
      return true;
  }
  __builtin_unreachable();
}

// Columns of `stats`, [N, kNumStats]: what the gradient needs to know of a row.
//   kLseDiff  lse_s - lse_t, less the part that a kernel can take off the logits without rounding: on the CPU
//             shift_between() the maxima, on GPUs max_s - max_t itself
//   kKL       KL(S || T) for reverse KL, KL(S || M) for JSD, else 0
enum Stat { kMaxS, kInvSumS, kMaxT, kInvSumT, kLseDiff, kKL, kNumStats };

// Columns of `metrics`, [N, kNumMetrics]: what else is known of a row where the caller asks for it. All are
// of the student at temperature 1, whose logits y = s tau are the transformed ones without the temperature;
// at temperature 1 its sum is the row's. Without labels kCE and kLabelLogprob are 0; with a label that is not
// among the tokens they are +inf and -inf.
//   kInvSumY       1 / sum exp(y - max_y), max_y = kMaxS tau
//   kCE            cross-entropy (1 - smoothing) -log p(label) + smoothing mean_v -log p(v)
//   kEntropy       -sum p log p
//   kLabelLogprob  log p(label)
enum Metric { kInvSumY, kCE, kEntropy, kLabelLogprob, kNumMetrics };

// Rows of `metric_state`, [kNumMetricState, N]: what a part of the vocabulary says of them, mergeable
// together with the part's max_s.
//   kStateSumY   sum exp(y - max_y)
//   kStateDotY   sum exp(y - max_y) (y - max_y) <= 0
//   kStateTotalY sum y, for label smoothing; 0 without it
//   kStateLabel  y of the label; -inf where it is not among these tokens
enum MetricState { kStateSumY, kStateDotY, kStateTotalY, kStateLabel, kNumMetricState };

}  // namespace minitron
