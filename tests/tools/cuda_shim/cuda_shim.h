// Runs CUDA kernels on the host: compiled by g++ with -DMINITRON_CUDA_SHIM, a kernel is a plain function and
// every thread of a block a fiber on one OS thread. What it finds:
//   - wrong values, from the kernels' own source and the launchers' own grid;
//   - missing barriers: shared memory starts as NaN in every block, and threads run forwards, backwards or
//   shuffled, those of a cluster's blocks among each other;
//   - divergent barriers and shuffles: a block in which nobody can go on is an error that names who waits
//   where;
//   - accesses outside of the regions that a test allows (finer than ASan: also padding and masked rows),
//   16-byte
//     accesses at unaligned addresses, bytes moved per region, bytes written twice or never;
//   - with -fsanitize=address,undefined whatever these find.
//   - shared memory of another block of the cluster that is read after that block has exited.
// It does not model the memory system between blocks: clusters, or blocks without one, run one after another.
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
struct alignas(8) uint2 {
  unsigned x, y;
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

// cluster: blocks of one, along x.
void launch(dim3 grid, dim3 block, const std::function<void()>& thread, unsigned cluster = 1);
void block_barrier(const char* file, unsigned line);
// Of all threads of the cluster. Stricter than the GPU's, which does not wait for threads that have exited.
void cluster_barrier(const char* file, unsigned line);
unsigned cluster_rank();
// What stands in block `rank` of the cluster where p, of shared memory, stands in the running block.
const void* shared_of_rank(const void* p, unsigned rank);
bool has_clusters();
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
template <typename... P, typename... A>
void launch_clusters(void (*kernel)(P...), dim3 grid, dim3 block, unsigned cluster, const A&... args) {
  launch(grid, block, [&] { kernel(P(args)...); }, cluster);
}

}  // namespace cuda_shim

#define threadIdx (::cuda_shim::where().thread)
#define blockIdx (::cuda_shim::where().block)
#define blockDim (::cuda_shim::where().block_dim)
#define gridDim (::cuda_shim::where().grid_dim)

#define MINITRON_HAS_CLUSTERS 1
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
inline uint4 load16_last_use(const void* p) { return load16<false>(p); }
template <bool kConstant, typename T>
T load_scalar(const T* p) {
  cuda_shim::on_load(p, sizeof(T));
  return *p;
}
template <bool kStreaming = false>
void store16(void* p, uint4 v) {
  cuda_shim::on_store(p, 16);
  memcpy(p, &v, 16);
}
template <bool kStreaming = false>
void store8(void* p, uint2 v) {
  cuda_shim::on_store(p, 8);
  memcpy(p, &v, 8);
}
template <typename T>
void store_scalar(T* p, T v) {
  cuda_shim::on_store(p, sizeof(T));
  *p = v;
}

inline float mul_rounded(float x, float y) { return x * y; }

inline unsigned cluster_rank() { return cuda_shim::cluster_rank(); }
inline void cluster_sync(std::source_location at = std::source_location::current()) {
  cuda_shim::cluster_barrier(at.file_name(), at.line());
}
template <typename V>
V load_of_rank(const V* mine, unsigned rank) {
  V out;
  memcpy(&out, cuda_shim::shared_of_rank(mine, rank), sizeof(V));
  return out;
}

class ClusterLaunch {
 public:
  ClusterLaunch(int64_t clusters, int blocks, int threads, int)
      : grid_(static_cast<unsigned>(clusters * blocks)), block_(threads), cluster_(blocks) {}
  template <typename... P>
  bool fits(void (*)(P...)) const {
    return cuda_shim::has_clusters();
  }
  template <typename... P, typename... A>
  void operator()(void (*kernel)(P...), const A&... args) const {
    cuda_shim::launch_clusters(kernel, grid_, block_, cluster_, args...);
  }

 private:
  dim3 grid_, block_;
  unsigned cluster_;
};

// ex2.approx.ftz is off by up to 2 ulp and flushes denormals: so is this, in a direction that varies with x.
inline float exp2_approx(float x) {
  const float y = exp2f(x);
  if (y < 0x1p-126f) return 0.0f;
  if (!std::isfinite(y)) return y;
  const uint32_t bits = std::bit_cast<uint32_t>(y);
  return std::bit_cast<float>(bits + (std::bit_cast<uint32_t>(x) * 2654435761u >> 31 ? 1u : 0u));
}

}  // namespace minitron::cuda
