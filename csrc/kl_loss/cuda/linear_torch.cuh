// Launches of the kernels on fp32 logits that linear.cu has without metrics, and linear_metrics.cu with them.
#pragma once

#include "kl_loss/cuda/cluster_kernels.cuh"
#include "kl_loss/cuda/metrics_torch.cuh"
#include "kl_loss/cuda/tile_kernels.cuh"

namespace minitron::cuda {

// False if the device has no clusters, or this build no code for it that uses them.
template <typename... Metrics>
bool launch_clusters(const LaunchScope& scope, const LogitTensors& logits, Divergence divergence,
                     const DeviceOptions& options, const Tensor& weight, float* loss, float* stats,
                     Tensor& grad, const Metrics&... of_metrics) {
  const int threads =
      threads_for(options.vocab_size / (kClusterBlocks * kClusterPairsAtOnce), kClusterThreads);
  const ClusterLaunch launch(grad.size(0), kClusterBlocks, threads, scope.stream());
  bool fits = false;
  dispatch_float(grad.scalar_type(), "grad", [&](auto g) {
    with_divergence(divergence, [&](auto constant) {
      using G = decltype(g);
      void (*kernel)(KlRows<float, float>, DeviceOptions, const float*, int64_t, float*, float*, G*, int64_t,
                     int, Metrics...) = &kl_forward_grad_kernel<constant(), G, Metrics...>;
      fits = launch.fits(kernel);
      if (!fits) return;
      launch(kernel, logits.rows<float, float>(), options, const_floats(weight), weight.stride(0), loss,
             stats, static_cast<G*>(grad.mutable_data_ptr()), grad.stride(0), static_cast<int>(grad.size(1)),
             of_metrics...);
    });
  });
  return fits;
}

template <typename... Metrics>
void launch_tile_stats(const LaunchScope& scope, const LogitTensors& logits, Divergence divergence,
                       const DeviceOptions& options, Tensor& state, bool first,
                       const Metrics&... of_metrics) {
  with_divergence(divergence, [&](auto constant) {
    const auto kernel = &kl_tile_stats_kernel<constant(), Metrics...>;
    MINITRON_LAUNCH(kernel, dim3(logits.student.size(0)), dim3(state_threads(options.vocab_size)),
                    scope.stream(), (logits.rows<float, float>()), options, floats(state), state.stride(0),
                    first, of_metrics...);
  });
}

inline dim3 finish_grid(int64_t rows) { return dim3((rows + kFinishThreads - 1) / kFinishThreads); }

template <typename... Metrics>
void launch_finish_stats(const LaunchScope& scope, const FinishRows& rows, Divergence divergence,
                         const float* states, float* loss, float* stats, const Metrics&... of_metrics) {
  with_divergence(divergence, [&](auto constant) {
    const auto kernel = &kl_finish_stats_kernel<constant(), Metrics...>;
    MINITRON_LAUNCH(kernel, finish_grid(rows.rows), dim3(kFinishThreads), scope.stream(), rows, states, loss,
                    stats, of_metrics...);
  });
}

extern template bool launch_clusters(const LaunchScope&, const LogitTensors&, Divergence,
                                     const DeviceOptions&, const Tensor&, float*, float*, Tensor&,
                                     const MetricsInOut&);
extern template void launch_tile_stats(const LaunchScope&, const LogitTensors&, Divergence,
                                       const DeviceOptions&, Tensor&, bool, const MetricsState&);
extern template void launch_finish_stats(const LaunchScope&, const FinishRows&, Divergence, const float*,
                                         float*, float*, const MetricsFinish&);

}  // namespace minitron::cuda
