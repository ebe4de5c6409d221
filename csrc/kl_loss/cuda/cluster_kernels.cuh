// Loss, stats and gradient of rows of fp32 logits in one launch, where the stats are not known before.
//
//   forward_grad  grid (8 N), a cluster of 8 blocks a row (sm_90 and up). The first look at the row, from
//                 memory, makes its sums; these are merged over the blocks through their shared memory. The
//                 last look makes the gradient, out of L2: with 2 blocks on each of 132 SMs it has to hold 33
//                 rows, 33 MiB at 131072 tokens, less what has been looked at for the last time. That look
//                 goes backwards, since what was read last is in L2 for sure. JSD takes another look in
//                 between.
//
// So 8 bytes a token are read from memory, where a forward and a backward kernel read 16. Values are merged
// in an order that depends only on the shape: results are bitwise equal from run to run.
#pragma once

#include <type_traits>

#include "kl_loss/cuda/row_kernels.cuh"

namespace minitron::cuda {

constexpr int kClusterBlocks = 8;             // the most that every GPU with clusters takes
constexpr int kFewestClusterColumns = 16384;  // a turn of 128 threads a block
constexpr int kClusterThreads = 512;          // the most in a block
constexpr int kClusterBlocksPerSM = 2;        // at most 64 registers a thread
constexpr int kClusterPairsAtOnce = 16;       // 128 bytes of loads under way a thread
constexpr int kClusterTermsAtOnce = 8;  // the same where each pair makes a term: fewer registers are left

// Maximum and sum of both sides: all that the first look makes where the loss is summed in a later one.
struct RowSums {
  OnlineSum student, teacher;

  static __device__ __forceinline__ RowSums empty() { return {OnlineSum::empty(), OnlineSum::empty()}; }
  template <int N>
  __device__ __forceinline__ void add(const float (&s)[N], const float (&t)[N]) {
    student.add(s);
    teacher.add(t);
  }
  // Of one run alone; also gives exp_s = exp(s - maximum).
  template <int N>
  static __device__ __forceinline__ RowSums of(const float (&s)[N], const float (&t)[N], float (&exp_s)[N]) {
    float exp_t[N];
    return {OnlineSum::of(s, exp_s), OnlineSum::of(t, exp_t)};
  }
  __device__ __forceinline__ RowSums merged(const RowSums& other) const {
    return {student.merged(other.student), teacher.merged(other.teacher)};
  }
  __device__ __forceinline__ RowStats stats() const { return RowStats::of(student, teacher); }
};

// A row as a block of its cluster sees it.
template <typename G>
struct ClusterRow {
  // runs of 4 tokens also where dz has 2 bytes: a warp then reads whole lines, and L2 is what limits it
  using Pairs = PairRow<float, float, kRunOf<float>, true>;
  Pairs pairs;
  int begin, step;

  __device__ __forceinline__ ClusterRow(const KlRows<float, float>& rows, int64_t row,
                                        const DeviceOptions& options)
      : pairs(rows, row, options),
        begin(cluster_rank() * blockDim.x + threadIdx.x),
        step(kClusterBlocks * blockDim.x) {}

  // tau: of a state with metrics.
  template <typename State, typename... Tau>
  __device__ __forceinline__ State state(ClusterPartials<State>* shared, Tau... tau) const {
    State state = State::empty();
    if constexpr (std::is_same_v<State, RowSums>) {
      pairs.template for_each_several<kClusterPairsAtOnce / Pairs::kRun>(
          begin, step, [&](const auto& s, const auto& t, const auto&) { state.add(s, t); });
    } else {
      pairs.template for_each<kClusterTermsAtOnce / Pairs::kRun, Pass::kForwards>(
          begin, step, [&](int, const auto& s, const auto& t) { state.add(s, t, tau...); });
    }
    return cluster_reduce<kClusterBlocks>(state, State::empty(), shared,
                                          [&](const auto& a, const auto& b) { return a.merged(b, tau...); });
  }

  __device__ __forceinline__ MixtureSums mixture(const RowStats& stats,
                                                 ClusterPartials<MixtureSums>* shared) const {
    MixtureSums sums = MixtureSums::empty();
    pairs.template for_each<kClusterTermsAtOnce / Pairs::kRun, Pass::kBackwards>(
        begin, step, [&](int, const auto& s, const auto& t) {
          sums = with_terms(sums, s, t, stats, pairs.options.shares);
        });
    return cluster_reduce<kClusterBlocks>(sums, MixtureSums::empty(), shared,
                                          [](const auto& a, const auto& b) { return a.merged(b); });
  }

  // Writes the gradient; make(column, s, t) gives a token's, to be multiplied by weight.
  template <Pass kPass, typename Make>
  __device__ __forceinline__ void write_grad(G* grad, float weight, Make make) const {
    pairs.template for_each<kClusterTermsAtOnce / Pairs::kRun, kPass>(
        begin, step, [&](int column, const auto& s, const auto& t) {
          store_grads<true>(grad, column, true, s, t, weight, pairs.options.student, make);
        });
  }
};

template <Divergence kDivergence, typename G, typename... Metrics>  // MetricsInOut or nothing
__global__ void __launch_bounds__(kClusterThreads, kClusterBlocksPerSM)
    kl_forward_grad_kernel(KlRows<float, float> rows, DeviceOptions options, const float* __restrict__ weight,
                           int64_t weight_stride,                                   // (N)
                           float* __restrict__ loss,                                // (N)
                           float* __restrict__ stats,                               // (N, kNumStats)
                           G* __restrict__ grad, int64_t grad_stride, int columns,  // (N, columns)
                           Metrics... of_metrics) {
#if MINITRON_HAS_CLUSTERS
  const int64_t row = blockIdx.x / kClusterBlocks;
  const bool writes = cluster_rank() == 0 && threadIdx.x == 0;
  const int begin = cluster_rank() * blockDim.x + threadIdx.x, step = kClusterBlocks * blockDim.x;
  grad += row * grad_stride;
  if (!rows.is_valid(row)) {  // all blocks of the cluster: nobody waits for them
    if (writes) {
      store_scalar(loss + row, 0.0f);
      store_stats(stats + row * kNumStats, RowStats{});
      (of_metrics.out.store_zero(row), ...);
    }
    return fill_zero(grad, columns, begin, step);
  }

  const ClusterRow<G> cluster(rows, row, options);
  const float row_weight = load_scalar<true>(weight + row * weight_stride);
  const Shares& shares = options.shares;
  // the cross-entropy of the row with this state
  const auto of_ce = [&](const auto& metrics, const auto& state) {
    const float inv_sum_y = 1.0f / state.sum_y(metrics.tau());
    return metrics.ce().at(row, options.vocab_size, state.row.student.max, inv_sum_y, row_weight);
  };
  constexpr bool kSumsAlone = needs_second_look(kDivergence) || !grad_needs_kl(kDivergence);
  using State = StateOf<std::conditional_t<kSumsAlone, RowSums, RowState<kDivergence>>, Metrics...>;
  MINITRON_SHARED(ClusterPartials<State>, shared_state, 1);
  const State state = cluster.state(shared_state, of_metrics.tau()...);
  RowStats stat = state.stats();
  float value;
  const auto write_grad = [&](auto pass, auto term, const auto&... ce) {
    cluster.template write_grad<pass()>(
        grad, sizeof...(ce) == 0 ? row_weight : 1.0f,
        [&](int column, float s, float t) { return combined(term(s, t), column, s, ce...); });
  };
  const auto term = [&](float s, float t) { return PairTerms<kDivergence>::grad(s, t, stat, shares); };
  if constexpr (needs_second_look(kDivergence)) {
    MINITRON_SHARED(ClusterPartials<MixtureSums>, shared_mixture, 1);
    const MixtureSums mixture = cluster.mixture(stat, shared_mixture);
    stat.kl = mixture.student;
    value = mixture.loss(shares);
    write_grad(std::integral_constant<Pass, Pass::kLastForwards>(), term, of_ce(of_metrics, state)...);
  } else if constexpr (grad_needs_kl(kDivergence)) {
    value = state.loss();
    write_grad(std::integral_constant<Pass, Pass::kLastBackwards>(), term, of_ce(of_metrics, state)...);
  } else {
    MINITRON_SHARED(ClusterPartials<float>, shared_loss, 1);
    float terms = 0.0f;
    const auto term_and_loss = [&](float s, float t) {
      const auto [pair_loss, pair_grad] = PairTerms<kDivergence>::loss_and_grad(s, t, stat);
      terms += pair_loss;
      return pair_grad;
    };
    write_grad(std::integral_constant<Pass, Pass::kLastBackwards>(), term_and_loss,
               of_ce(of_metrics, state)...);
    value = cluster_reduce<kClusterBlocks>(terms, 0.0f, shared_loss, [](float a, float b) { return a + b; });
  }
  if (writes) {
    store_scalar(loss + row, value);
    store_stats(stats + row * kNumStats, stat);
    // out of shared memory, so that no thread keeps them in registers during the last look
    (of_metrics.out.store(row, shared_state->cluster, cluster.pairs.student, options), ...);
  }
  fill_zero(grad + options.vocab_size, columns - options.vocab_size, begin, step);
  cluster_sync();  // a block that exits takes its shared memory with it, which others may still read
#endif
}

}  // namespace minitron::cuda
