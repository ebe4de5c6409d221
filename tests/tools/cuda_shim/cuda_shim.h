// Runs CUDA kernels on the host: compiled by g++ with -DMINITRON_CUDA_SHIM, a kernel is a plain function and
// every thread of a block a fiber on one OS thread. What it finds:
//   - wrong values, from the kernels' own source and the launchers' own grid;
//   - missing barriers: shared memory starts as NaN in every block, and threads run forwards, backwards or
//   shuffled;
//   - divergent barriers and shuffles: a block in which nobody can go on is an error that names who waits
//   where;
//   - accesses outside of the regions that a test allows (finer than ASan: also padding and masked rows),
//   16-byte
//     accesses at unaligned addresses, bytes moved per region, bytes written twice or never;
//   - with -fsanitize=address,undefined whatever these find.
// It does not model the memory system between blocks: these run one after another.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>

// ---- the language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// ---- the machine

namespace cuda_shim {

struct Where {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
Where& where();

void launch(dim3 grid, dim3 block, const std::function<void()>& thread);
void block_barrier(const char* file, unsigned line);
// All lanes of `mask` hand in a word and get everybody's; a rendezvous.
const uint32_t* exchange(uint32_t mask, uint32_t word, const char* what);
// `bytes` of the running block's shared memory, the same for all its threads; `key` names the variable.
void* shared_memory(const void* key, size_t bytes);
void on_load(const void* p, size_t bytes);
void on_store(const void* p, size_t bytes);

inline unsigned lane() { return where().thread.x % 32; }

template <typename... P, typename... A>
void launch_kernel(void (*kernel)(P...), dim3 grid, dim3 block, const A&... args) {
  launch(grid, block, [&] { kernel(P(args)...); });
}

}  // namespace cuda_shim

#define threadIdx (::cuda_shim::where().thread)
#define blockIdx (::cuda_shim::where().block)
#define blockDim (::cuda_shim::where().block_dim)
#define gridDim (::cuda_shim::where().grid_dim)

#define MINITRON_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), ::cuda_shim::launch_kernel(kernel, grid, block, __VA_ARGS__))
#define MINITRON_SHARED(type, name, count) \
  static const char name##_key = 0;        \
  type* name = static_cast<type*>(::cuda_shim::shared_memory(&name##_key, sizeof(type) * (count)))

inline void __syncthreads(std::source_location at = std::source_location::current()) {
  cuda_shim::block_barrier(at.file_name(), at.line());
}
inline uint32_t __shfl_sync(uint32_t mask, uint32_t word, int from) {
  return cuda_shim::exchange(mask, word, "__shfl_sync")[from & 31];
}
inline uint32_t __shfl_xor_sync(uint32_t mask, uint32_t word, int lane_mask) {
  return cuda_shim::exchange(mask, word, "__shfl_xor_sync")[(cuda_shim::lane() ^ lane_mask) & 31];
}

// ---- arithmetic; bf16 and fp16 by torch's own conversions

inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __fdividef(float a, float b) { return a / b; }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct __half2 {
  __half x, y;
};

inline __half __ushort_as_half(unsigned short x) { return {x}; }
inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
inline float __half2float(__half x) { return c10::Half(x.bits, c10::Half::from_bits()); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {c10::BFloat16(x).x}; }
inline __half __float2half_rn(float x) { return {c10::Half(x).x}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }

namespace minitron::cuda {

template <bool kConstant>
uint4 load16(const void* p) {
  cuda_shim::on_load(p, 16);
  uint4 v;
  memcpy(&v, p, 16);
  return v;
}
template <bool kConstant, typename T>
T load_scalar(const T* p) {
  cuda_shim::on_load(p, sizeof(T));
  return *p;
}
inline void store16(void* p, uint4 v) {
  cuda_shim::on_store(p, 16);
  memcpy(p, &v, 16);
}
template <typename T>
void store_scalar(T* p, T v) {
  cuda_shim::on_store(p, sizeof(T));
  *p = v;
}

// ex2.approx.ftz is off by up to 2 ulp and flushes denormals: so is this, in a direction that varies with x.
inline float exp2_approx(float x) {
  const float y = exp2f(x);
  if (y < 0x1p-126f) return 0.0f;
  if (!std::isfinite(y)) return y;
  const uint32_t bits = std::bit_cast<uint32_t>(y);
  return std::bit_cast<float>(bits + (std::bit_cast<uint32_t>(x) * 2654435761u >> 31 ? 1u : 0u));
}

}  // namespace minitron::cuda
