// What CUDA sources use in place of <<<>>>, __shared__ and raw 16-byte accesses, so that the same file also
// compiles as host C++ against the shim of the tests (MINITRON_CUDA_SHIM), which runs the kernels without a
// GPU.
#pragma once

#ifdef MINITRON_CUDA_SHIM
#include "cuda_shim.h"  // defines everything below
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

// Clusters of blocks: from sm_90 on. Where code is compiled for an older GPU, a kernel that needs them is
// empty.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define MINITRON_HAS_CLUSTERS 1
#else
#define MINITRON_HAS_CLUSTERS 0
#endif

// kernel: a pointer to a __global__ function
#define MINITRON_LAUNCH(kernel, grid, block, stream, ...) \
  (kernel)<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)
#define MINITRON_SHARED(type, name, count) __shared__ type name[count]

namespace minitron::cuda {

// 16 bytes at a 16-byte aligned address. kConstant: nothing writes there while the kernel runs.
template <bool kConstant>
__device__ __forceinline__ uint4 load16(const void* p) {
  if constexpr (kConstant) return __ldg(static_cast<const uint4*>(p));
  return *static_cast<const uint4*>(p);
}

// The same for what this kernel read before and nobody reads again: the caches are to let go of it first.
__device__ __forceinline__ uint4 load16_last_use(const void* p) {
  return __ldcs(static_cast<const uint4*>(p));
}

template <bool kConstant, typename T>
__device__ __forceinline__ T load_scalar(const T* p) {
  return *p;  // a scalar __ldg is no faster, and __nv_bfloat16's needs sm_80 intrinsics
}

// kStreaming: the caches are to let go of it first.
template <bool kStreaming = false>
__device__ __forceinline__ void store16(void* p, uint4 v) {
  if constexpr (kStreaming) return __stcs(static_cast<uint4*>(p), v);
  *static_cast<uint4*>(p) = v;
}
// 8 bytes at an 8-byte aligned address.
template <bool kStreaming = false>
__device__ __forceinline__ void store8(void* p, uint2 v) {
  if constexpr (kStreaming) return __stcs(static_cast<uint2*>(p), v);
  *static_cast<uint2*>(p) = v;
}

template <typename T>
__device__ __forceinline__ void store_scalar(T* p, T v) {
  *p = v;
}

// 2^x to 2 ulp in one instruction. 2^-inf is 0, NaN stays NaN, results below 2^-126 become 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x y, rounded by itself: never part of a fused multiply-add.
__device__ __forceinline__ float mul_rounded(float x, float y) { return __fmul_rn(x, y); }

// ---- clusters of blocks, which run at the same time and can read each other's shared memory

// The index of this block in its cluster.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A barrier of all threads of the cluster. What was written to shared memory before it can be read after it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive;\n\tbarrier.cluster.wait;" ::: "memory");
}

// What stands at `mine`, an address in shared memory, in block `rank` of the cluster.
template <typename V>
__device__ __forceinline__ V load_of_rank(const V* mine, unsigned rank) {
  static_assert(sizeof(V) % 4 == 0);
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(mine));
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
  uint32_t words[sizeof(V) / 4];
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(V) / 4); ++i) {
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(words[i]) : "r"(address + 4 * i) : "memory");
  }
  V out;
  memcpy(&out, words, sizeof(V));
  return out;
}

// The launch of `clusters` clusters of `blocks` blocks.
class ClusterLaunch {
 public:
  ClusterLaunch(int64_t clusters, int blocks, int threads, cudaStream_t stream) {
    attribute_.id = cudaLaunchAttributeClusterDimension;
    attribute_.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    config_.gridDim = dim3(static_cast<unsigned>(clusters * blocks));
    config_.blockDim = dim3(threads);
    config_.stream = stream;
    config_.attrs = &attribute_;
    config_.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;

  // Whether the current device can run it. The device must have clusters; so must the architecture that its
  // code was compiled for, since the driver also compiles code of an older one for it, where the kernel is
  // empty; and a cluster must fit, also in a part of a GPU. Waits for nothing.
  template <typename... P>
  bool fits(void (*kernel)(P...)) const {
    cudaFuncAttributes attributes;
    int active = 0;
    const bool fits = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess &&
                      attributes.ptxVersion >= 90 &&
                      cudaOccupancyMaxActiveClusters(&active, kernel, &config_) == cudaSuccess && active > 0;
    if (!fits) cudaGetLastError();  // a question that the device refuses is not an error of the next launch
    return fits;
  }

  template <typename... P, typename... A>
  void operator()(void (*kernel)(P...), const A&... args) const {
    cudaLaunchKernelEx(&config_, kernel, P(args)...);
  }

 private:
  cudaLaunchAttribute attribute_ = {};
  cudaLaunchConfig_t config_ = {};
};

}  // namespace minitron::cuda

#endif  // MINITRON_CUDA_SHIM
