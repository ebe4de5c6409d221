// What every launcher needs of torch. Only the stable ABI is used, so that one build loads under a CPU and a
// CUDA torch.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "common/cuda/platform.cuh"

// Where the *.cu files register their ops. The tests build them under another name, for CPU tensors.
#ifndef MINITRON_CUDA_LIBRARY
#define MINITRON_CUDA_LIBRARY minitron_kernels
#define MINITRON_CUDA_KEY CUDA
#endif

namespace minitron::cuda {

#ifdef MINITRON_CUDA_SHIM

struct LaunchScope {
  explicit LaunchScope(const torch::stable::Tensor&) {}
  int stream() const { return 0; }
  void check(const char*) const {}
};

#else

// torch's current stream on the device. Not Stream::nativeHandle(), which is new in torch 2.13: this function
// of the C shim is older. It is in libtorch_cuda, which a CPU torch lacks and the extension is therefore not
// linked against; where there is a CUDA tensor, it is loaded.
inline cudaStream_t current_stream(torch::stable::accelerator::DeviceIndex device) {
  using Function = int32_t (*)(int32_t device, void** stream);  // returns 0 unless it failed
  constexpr const char* kLibrary = "libtorch_cuda.so";
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  static const Function function = [] {
    void* library = dlopen(kLibrary, RTLD_LAZY | RTLD_NOLOAD);
    STD_TORCH_CHECK(library != nullptr, kLibrary,
                    " is not loaded, so that there is no CUDA stream to launch on");
    void* found = dlsym(library, kName);
    STD_TORCH_CHECK(found != nullptr, kLibrary, " has no ", kName, ": this torch is not supported");
    return reinterpret_cast<Function>(found);
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, kName, " failed for device ", device);
  return static_cast<cudaStream_t>(stream);
}

// While it exists the tensor's device is the current one; launches go to torch's current stream there.
class LaunchScope {
 public:
  explicit LaunchScope(const torch::stable::Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(device_), stream_(current_stream(device_)) {}

  cudaStream_t stream() const { return stream_; }

  // To be called after every launch, so that a refused one is reported here and not by a later call.
  void check(const char* op) const {
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, op, ": launch failed on device ", device_, ": ",
                    cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceIndex device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

#endif

// Calls f with a value-initialised element of the floating dtype.
template <typename F>
void dispatch_float(torch::headeronly::ScalarType dtype, const char* name, F&& f) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    case ScalarType::Half:
      return f(__half{});
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16 on CUDA, got ",
                      torch::headeronly::toString(dtype));
  }
}

}  // namespace minitron::cuda
