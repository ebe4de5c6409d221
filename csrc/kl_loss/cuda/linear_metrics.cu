// The kernels of linear.cu with metrics.
#include "kl_loss/cuda/linear_torch.cuh"

namespace minitron::cuda {

template bool launch_clusters(const LaunchScope&, const LogitTensors&, Divergence, const DeviceOptions&,
                              const Tensor&, float*, float*, Tensor&, const MetricsInOut&);
template void launch_tile_stats(const LaunchScope&, const LogitTensors&, Divergence, const DeviceOptions&,
                                Tensor&, bool, const MetricsState&);
template void launch_finish_stats(const LaunchScope&, const FinishRows&, Divergence, const float*, float*,
                                  float*, const MetricsFinish&);

}  // namespace minitron::cuda
