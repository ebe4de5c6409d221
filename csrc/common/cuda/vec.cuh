// Moves runs of elements between memory and fp32 registers: by 16-byte accesses where the address allows it,
// else element by element.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/cuda/platform.cuh"

namespace minitron::cuda {

// A 32-bit word of memory <-> the elements in it.
__device__ __forceinline__ void unpack_word(uint32_t word, float* out, const float*) {
  *out = __uint_as_float(word);
}
__device__ __forceinline__ void unpack_word(uint32_t word, float* out, const __nv_bfloat16*) {
  out[0] = __uint_as_float(word << 16);  // bf16 is the upper half of an fp32
  out[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void unpack_word(uint32_t word, float* out, const __half*) {
  out[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(word & 0xffffu)));
  out[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

__device__ __forceinline__ uint32_t pack_word(const float* in, const float*) {
  return __float_as_uint(in[0]);
}
__device__ __forceinline__ uint32_t pack_word(const float* in, const __nv_bfloat16*) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(in[0], in[1]);  // one instruction for both
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}
__device__ __forceinline__ uint32_t pack_word(const float* in, const __half*) {
  const __half2 pair = __floats2half2_rn(in[0], in[1]);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}

__host__ __device__ __forceinline__ bool aligned16(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// N elements as they are in memory. Loads of several runs that only fill these words can all be under way at
// once; unpacking is the first to wait for them.
template <typename T, int N>
struct Run {
  static constexpr int kPerWord = 4 / sizeof(T), kPerAccess = 16 / sizeof(T), kAccesses = N / kPerAccess;
  static_assert(N % kPerAccess == 0);
  uint4 words[kAccesses];

  // aligned: p is a multiple of 16 bytes. kLastUse: nobody reads them again.
  template <bool kLastUse = false>
  static __device__ __forceinline__ Run load(const T* p, bool aligned) {
    Run run;
    if (aligned) {
#pragma unroll
      for (int i = 0; i < kAccesses; ++i) {
        const T* access = p + i * kPerAccess;
        run.words[i] = kLastUse ? load16_last_use(access) : load16<true>(access);
      }
    } else {
      T elements[N];
#pragma unroll
      for (int i = 0; i < N; ++i) elements[i] = load_scalar<true>(p + i);
#pragma unroll
      for (int i = 0; i < kAccesses; ++i) memcpy(&run.words[i], elements + i * kPerAccess, 16);
    }
    return run;
  }

  __device__ __forceinline__ void unpack(float (&out)[N]) const {
    const T* type = nullptr;
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      float* access = out + i * kPerAccess;
      unpack_word(words[i].x, access, type);
      unpack_word(words[i].y, access + kPerWord, type);
      unpack_word(words[i].z, access + 2 * kPerWord, type);
      unpack_word(words[i].w, access + 3 * kPerWord, type);
    }
  }
};

// N elements from p. aligned: p is a multiple of 16 bytes.
template <int N, typename T>
__device__ __forceinline__ void load_run(const T* p, bool aligned, float (&out)[N]) {
  Run<T, N>::load(p, aligned).unpack(out);
}

// N elements to p. aligned: p is a multiple of 16 bytes, or of 8 where N elements have no more. kStreaming:
// the caches are to let go of it before anything else.
template <int N, bool kStreaming = false, typename T>
__device__ __forceinline__ void store_run(T* p, bool aligned, const float (&in)[N]) {
  constexpr int kPerWord = 4 / sizeof(T), kPerAccess = 16 / sizeof(T);
  static_assert(N % kPerAccess == 0 || N == kPerAccess / 2);
  if (!aligned) {
#pragma unroll
    for (int i = 0; i < N; ++i) store_scalar(p + i, from_float<T>(in[i]));
  } else if constexpr (N < kPerAccess) {
    store8<kStreaming>(p, {pack_word(in, p), pack_word(in + kPerWord, p)});
  } else {
#pragma unroll
    for (int i = 0; i < N; i += kPerAccess) {
      uint4 v;
      v.x = pack_word(in + i, p);
      v.y = pack_word(in + i + kPerWord, p);
      v.z = pack_word(in + i + 2 * kPerWord, p);
      v.w = pack_word(in + i + 3 * kPerWord, p);
      store16<kStreaming>(p + i, v);
    }
  }
}

// Splits a row of n elements into whole runs of kRun elements, which start at a multiple of 16 bytes, and the
// rest before and after the runs: fewer than kRun + 16 / sizeof(T) elements.
template <int kRun, typename T>
struct RowSplit {
  int head, runs, rest;

  __device__ __forceinline__ RowSplit(const T* row, int n) {
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16);
    head = past == 0 ? 0 : (16 - past) / static_cast<int>(sizeof(T));
    if (head > n) head = n;
    runs = (n - head) / kRun;
    rest = n - runs * kRun;
  }
  __device__ __forceinline__ int run_start(int run) const { return head + run * kRun; }
  __device__ __forceinline__ int rest_index(int i) const { return i < head ? i : i + runs * kRun; }
};

// A struct of floats, V::kFields of them, each in its own row of a matrix.
template <typename V>
__device__ __forceinline__ V load_fields(const float* column, int64_t stride) {
  static_assert(sizeof(V) == V::kFields * sizeof(float));
  float fields[V::kFields];
#pragma unroll
  for (int i = 0; i < V::kFields; ++i) fields[i] = load_scalar<false>(column + i * stride);
  V out;
  memcpy(&out, fields, sizeof(V));
  return out;
}
template <typename V>
__device__ __forceinline__ void store_fields(float* column, int64_t stride, const V& v) {
  static_assert(sizeof(V) == V::kFields * sizeof(float));
  float fields[V::kFields];
  memcpy(fields, &v, sizeof(V));
#pragma unroll
  for (int i = 0; i < V::kFields; ++i) store_scalar(column + i * stride, fields[i]);
}

// Sets n elements to zero: the work of a thread that begins at `begin`, of `step` threads.
template <typename T>
__device__ __forceinline__ void fill_zero(T* row, int n, int begin, int step) {
  constexpr int kRun = 16 / sizeof(T);
  const RowSplit<kRun, T> split(row, n);
  const float zeros[kRun] = {};
  for (int run = begin; run < split.runs; run += step)
    store_run<kRun>(row + split.run_start(run), true, zeros);
  for (int i = begin; i < split.rest; i += step) store_scalar(row + split.rest_index(i), from_float<T>(0.0f));
}

}  // namespace minitron::cuda
