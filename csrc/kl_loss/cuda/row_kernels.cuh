// Row divergences of two matrices of logits, and their gradient to the student's logits.
//
//   forward   grid (N), one block a row. Reads each logit once. For JSD a second time, since M is known only
//             after the sums; then from the end, which the caches still hold. Writes O(1) numbers a row.
//   backward  grid (N, parts of a row). Reads each logit once, writes each gradient once, padding included.
//             Also makes dz of linear_kl_loss, in the dtype of its GEMMs.
//
// Nothing depends on the order in which threads run: results are bitwise equal from run to run.
#pragma once

#include <cstdint>

#include "common/cuda/reduce.cuh"
#include "kl_loss/cuda/metrics.cuh"
#include "kl_loss/cuda/row_pairs.cuh"
#include "kl_loss/cuda/row_state.cuh"

namespace minitron::cuda {

constexpr int kStateThreads = 256;    // the most in a block that makes states
constexpr int kStateBlocksPerSM = 2;  // at most 128 registers a thread: 16 logits a side stay in them
constexpr int kPairsAtOnce = 16;      // entries that a thread merges at a time
// entries whose loads a thread of the backward has under way: 64 bytes
template <typename S, typename T>
constexpr int kGradPairsAtOnce = 64 / (sizeof(S) + sizeof(T));
template <typename S, typename T, typename G>
constexpr int kGradRuns = std::max(1, kGradPairsAtOnce<S, T> / kRunOf<S, T, G>);
constexpr int kGradThreads = 512;
constexpr int kGradBlocksPerSM = 2;  // at most 64 registers a thread

// The state of a whole row, in every thread. begun: empty, but in thread 0 that of earlier tiles. partial:
// shared memory for kMaxWarps states. tau: of a state with metrics.
template <typename State, typename S, typename T, typename... Tau>
__device__ __forceinline__ State row_state(const PairRow<S, T>& pairs, State begun, State* partial,
                                           Tau... tau) {
  pairs.template for_each_several<kPairsAtOnce / kRunOf<S, T>>(
      threadIdx.x, blockDim.x, [&](const auto& s, const auto& t, const auto& is_token) {
        if constexpr (sizeof...(tau) == 0) {
          begun.add(s, t);
        } else {
          begun.add(s, t, is_token, tau...);
        }
      });
  return block_reduce(begun, State::empty(), partial,
                      [&](const auto& a, const auto& b) { return a.merged(b, tau...); });
}

// The sums with the terms of these tokens.
template <int N>
__device__ __forceinline__ MixtureSums with_terms(MixtureSums sums, const float (&s)[N], const float (&t)[N],
                                                  const RowStats& stats, const Shares& shares) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    sums = sums.merged(PairTerms<Divergence::kJSD>::loss(s[i], t[i], stats, shares));
  }
  return sums;
}

// The same for the sums of JSD's terms.
template <typename S, typename T>
__device__ __forceinline__ MixtureSums row_mixture(const PairRow<S, T>& pairs, const RowStats& stats,
                                                   MixtureSums begun, MixtureSums* partial) {
  pairs.template for_each<kPairsAtOnce / kRunOf<S, T>, Pass::kBackwards>(
      threadIdx.x, blockDim.x, [&](int, const auto& s, const auto& t) {
        begun = with_terms(begun, s, t, stats, pairs.options.shares);
      });
  return block_reduce(begun, MixtureSums::empty(), partial,
                      [](const auto& a, const auto& b) { return a.merged(b); });
}

__device__ __forceinline__ RowStats load_stats(const float* in) {
  return {load_scalar<true>(in + kMaxS),    load_scalar<true>(in + kInvSumS), load_scalar<true>(in + kMaxT),
          load_scalar<true>(in + kInvSumT), load_scalar<true>(in + kLseDiff), load_scalar<true>(in + kKL)};
}
__device__ __forceinline__ void store_stats(float* out, const RowStats& stats) {
  store_scalar(out + kMaxS, stats.max_s);
  store_scalar(out + kInvSumS, stats.inv_sum_s);
  store_scalar(out + kMaxT, stats.max_t);
  store_scalar(out + kInvSumT, stats.inv_sum_t);
  store_scalar(out + kLseDiff, stats.lse_diff);
  store_scalar(out + kKL, stats.kl);
}

template <Divergence kDivergence, typename S, typename T, typename... Metrics>  // MetricsOut or nothing
__global__ void __launch_bounds__(kStateThreads, kStateBlocksPerSM)
    kl_forward_kernel(KlRows<S, T> rows, DeviceOptions options, float* __restrict__ loss,  // (N)
                      float* __restrict__ stats,                                           // (N, kNumStats)
                      Metrics... of_metrics) {
  using State = StateOf<RowState<kDivergence>, Metrics...>;
  MINITRON_SHARED(State, partial_states, kMaxWarps);
  const int64_t row = blockIdx.x;
  float* out = stats + row * kNumStats;
  if (!rows.is_valid(row)) {
    if (threadIdx.x == 0) {
      store_scalar(loss + row, 0.0f);
      store_stats(out, RowStats{});
      (of_metrics.store_zero(row), ...);
    }
    return;
  }
  const PairRow<S, T> pairs(rows, row, options);
  const State state = row_state(pairs, State::empty(), partial_states, of_metrics.tau()...);
  if (threadIdx.x == 0) (of_metrics.store(row, state, pairs.student, options), ...);
  RowStats stat = state.stats();
  float value = state.loss();
  if constexpr (needs_second_look(kDivergence)) {
    MINITRON_SHARED(MixtureSums, partial_sums, kMaxWarps);
    const MixtureSums sums = row_mixture(pairs, stat, MixtureSums::empty(), partial_sums);
    stat.kl = sums.student;
    value = sums.loss(options.shares);
  }
  if (threadIdx.x == 0) {
    store_scalar(loss + row, value);
    store_stats(out, stat);
  }
}

// Writes the gradients of N tokens from column on, of which make(column, s, t) gives one's to its transformed
// logit. aligned: grad + column is a multiple of 16 bytes, or for N = 1 anything.
template <bool kStreaming, int N, typename G, typename Make>
__device__ __forceinline__ void store_grads(G* row, int column, bool aligned, const float (&s)[N],
                                            const float (&t)[N], float weight,
                                            const LogitTransform& transform, Make make) {
  G* grad = row + column;
  float g[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    g[i] = make(column + i, s[i], t[i]) * (weight * transform.softcap_grad(s[i]));
    if (masked_out(s[i])) g[i] = 0.0f;
  }
  if constexpr (N == 1) {
    store_scalar(grad, from_float<G>(g[0]));
  } else {
    store_run<N, kStreaming>(grad, aligned, g);
  }
}

// A token's gradient, of a divergence alone not yet weighted; with a cross-entropy it is.
__device__ __forceinline__ float combined(float grad, int, float) { return grad; }
__device__ __forceinline__ float combined(float grad, int column, float s, const RowCrossEntropy& ce) {
  return ce.combined(grad, column, s);
}

template <Divergence kDivergence, typename S, typename T, typename G,
          typename... Metrics>  // MetricsIn or nothing
__global__ void __launch_bounds__(kGradThreads, kGradBlocksPerSM)
    kl_backward_kernel(KlRows<S, T> rows, DeviceOptions options, const float* __restrict__ grad_loss,  // (N)
                       int64_t grad_loss_stride, const float* __restrict__ stats,       // (N, kNumStats)
                       G* __restrict__ grad_student, int64_t grad_stride, int columns,  // (N, columns)
                       Metrics... of_metrics) {
  const int64_t row = blockIdx.x;
  const int begin = blockIdx.y * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.x;
  G* grad = grad_student + row * grad_stride;
  if (!rows.is_valid(row)) return fill_zero(grad, columns, begin, step);

  const RowStats stat = load_stats(stats + row * kNumStats);
  const float weight = load_scalar<true>(grad_loss + row * grad_loss_stride);
  const PairRow<S, T, kRunOf<S, T, G>> pairs(rows, row, options);
  const bool grad_aligned = aligned16(grad + pairs.split.head);
  constexpr int kRuns = kGradRuns<S, T, G>;
  const auto write = [&](const auto&... ce) {
    const auto make = [&](int column, float logit_s, float logit_t) {
      const float of_pair = PairTerms<kDivergence>::grad(logit_s, logit_t, stat, options.shares);
      return combined(of_pair, column, logit_s, ce...);
    };
    pairs.template for_each<kRuns, Pass::kForwards>(
        begin, step, [&](int column, const auto& s, const auto& t) {
          store_grads<false>(grad, column, grad_aligned, s, t, sizeof...(ce) == 0 ? weight : 1.0f,
                             options.student, make);
        });
  };
  write(of_metrics.at(row, options.vocab_size, stat.max_s, weight)...);
  fill_zero(grad + options.vocab_size, columns - options.vocab_size, begin, step);
}

}  // namespace minitron::cuda
