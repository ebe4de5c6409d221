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

template <bool kConstant, typename T>
__device__ __forceinline__ T load_scalar(const T* p) {
  return *p;  // a scalar __ldg is no faster, and __nv_bfloat16's needs sm_80 intrinsics
}

__device__ __forceinline__ void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

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

}  // namespace minitron::cuda

#endif  // MINITRON_CUDA_SHIM
