// What multiplies the operands of the linear losses on CPU, and how it wants them to lie in memory.
//
// A GEMM is C[M, N] (+)= A[M, K] B[K, N]. B always has panels of kPanel columns, of which row k begins at
// k * kPanel; C is a panel, or rows of a matrix. What differs is in OperandLayout, in the table of
// PackKernels, which pack that way, and in the Gemm, which reads it.
//
// To add an engine: a number in Implementation, its name in ENGINES of ops/kl_loss/engines_cpu.py, its
// OperandLayout, its PackKernels (one of them per SIMD level, see kernels.h), and its case in with_engine().
#pragma once

#include "common/cpu/bf16_engines.h"
#include "common/cpu/tiles.h"
#include "kl_loss/cpu/kernels.h"
#include "kl_loss/cpu/linear_plan.h"
#include "kl_loss/cpu/tile_kernels.h"

namespace minitron {

// Where an engine looks for the elements of its operands. Both kinds of A have row m, a multiple of `rows`,
// at m * ld, and from there column k, a multiple of `depth`, at k * k_stride: plain rows have a k_stride of
// 1; strips of 16 rows, in which 32 columns of a strip are one piece of 1 KiB, have one of 16.
struct OperandLayout {
  int64_t depth;  // K is a multiple of it: 2 where pairs of k lie together
  int64_t rows;   // so is the number of rows that an A operand has memory for; those added are zero
  int64_t k_stride;
  bool in_place;  // rows of a tensor of the operands' type are an A operand as they are
};

inline OperandLayout operand_layout(DType operands, Implementation implementation) {
  switch (implementation) {
    case Implementation::kLibtorch:
    case Implementation::kPortable:
      break;
    case Implementation::kAmx:
    case Implementation::kAvx512Bf16:
    case Implementation::kPortableAmx:
    case Implementation::kPortableAvx512Bf16:
      return {.depth = kTileDepth, .rows = kTileRows, .k_stride = kTileRows, .in_place = false};
  }
  return {.depth = operands == DType::kBFloat16 ? 2 : 1, .rows = 1, .k_stride = 1, .in_place = true};
}

template <typename Operand, typename Accumulate>
struct Engine {
  using Op = Operand;
  using A = Accumulate;

  Gemm<Op, A> gemm;
  const PackKernels<A, Op>* pack;
  // Called by a thread before and after the GEMMs of a task; null for nothing.
  void (*begin_task)();
  void (*end_task)();
};

// The GEMMs of one task: what begins with them ends however they end.
template <typename Engine>
class EngineTask {
 public:
  explicit EngineTask(const Engine& engine) : end_(engine.end_task) {
    if (engine.begin_task) engine.begin_task();
  }
  ~EngineTask() {
    if (end_) end_();
  }
  EngineTask(const EngineTask&) = delete;
  EngineTask& operator=(const EngineTask&) = delete;

 private:
  void (*const end_)();
};

// The engine of bf16 operands in tiles. One that cannot run here throws why.
inline Engine<bf16, float> tile_engine(Implementation implementation) {
  const TileKernels& portable = tile_kernels();
  if (implementation == Implementation::kPortableAmx) {
    return {portable.like_amx, &portable.pack, nullptr, nullptr};
  }
  if (implementation == Implementation::kPortableAvx512Bf16) {
    return {portable.like_avx512_bf16, &portable.pack, nullptr, nullptr};
  }
  const bool is_amx = implementation == Implementation::kAmx;
  const std::string& why = is_amx ? why_no_amx() : why_no_avx512_bf16();
  if (!why.empty()) {
    throw std::invalid_argument(std::string("the kernels for ") + (is_amx ? "AMX" : "AVX512_BF16") +
                                " cannot run: " + why);
  }
#if defined(MINITRON_HAVE_AMX) && defined(MINITRON_HAVE_AVX512_BF16)
  if (is_amx) return {&amx::gemm, &avx512_bf16::tile_pack(), &amx::begin_task, &amx::end_task};
#endif
#ifdef MINITRON_HAVE_AVX512_BF16
  if (!is_amx) return {&avx512_bf16::gemm, &avx512_bf16::tile_pack(), nullptr, nullptr};
#endif
  __builtin_unreachable();  // what was not compiled has a reason not to run
}

// Calls f with the Engine that a plan names.
template <typename F>
void with_engine(const LinearPlan& plan, F&& f) {
  const CpuKernels& kernels = cpu_kernels();
  if (plan.operands == DType::kFloat64) {
    f(Engine<double, double>{kernels.f64.gemm, &kernels.pack_f64, nullptr, nullptr});
  } else if (plan.operands == DType::kFloat32) {
    f(Engine<float, float>{kernels.f32.gemm, &kernels.pack_f32, nullptr, nullptr});
  } else if (plan.implementation >= Implementation::kAmx) {
    f(tile_engine(plan.implementation));
  } else if (plan.implementation == Implementation::kPortable) {
    f(Engine<bf16, float>{kernels.gemm_bf16, &kernels.pack_bf16, nullptr, nullptr});
  } else {
    if (!brgemm_bf16()) throw std::invalid_argument("this CPU or this libtorch has no bf16 microkernel");
    f(Engine<bf16, float>{brgemm_bf16(), &kernels.pack_bf16, nullptr, &brgemm_release});
  }
}

}  // namespace minitron
