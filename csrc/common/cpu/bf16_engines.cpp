#include "common/cpu/bf16_engines.h"

#include <cerrno>
#include <cstring>

#include "common/cpu/gemm_trial.h"
#include "common/cpu/tiles.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace minitron {
namespace {

struct Cpu {
  bool amd = false, avx512_bf16 = false,
       amx = false;                                 // amx: with AVX512_BF16, by which its operands are packed
  bool keeps_vectors = false, keeps_tiles = false;  // whether the operating system saves the registers
};

const Cpu& cpu() {
  static const Cpu found = [] {
    Cpu x;
#if defined(__x86_64__)
    unsigned a, b, c, d;
    if (__get_cpuid(0, &a, &b, &c, &d)) x.amd = b == signature_AMD_ebx;
    if (__get_cpuid(1, &a, &b, &c, &d) && c >> 27 & 1) {  // OSXSAVE: XGETBV is there
      unsigned low, high;
      asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
      x.keeps_vectors = (low & 0xe6) == 0xe6;
      x.keeps_tiles = (low & 0x60000) == 0x60000;
    }
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
      const bool avx512 = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);  // F, DQ, BW, VL
      const bool tiles = (d >> 22 & 1) && (d >> 24 & 1);  // AMX_BF16, AMX_TILE
      if (avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) x.avx512_bf16 = a >> 5 & 1;
      x.amx = tiles && x.avx512_bf16;
    }
#endif
    return x;
  }();
  return found;
}

// Why this process may not use AMX; "" if it may. Linux gives the tile registers to a process that asks, for
// all of its threads and forks.
const std::string& why_not_allowed() {
  static const std::string why = []() -> std::string {
    if (!cpu().amx) return "this CPU has none";
    if (!cpu().keeps_vectors || !cpu().keeps_tiles) return "the operating system does not save its registers";
#if defined(__x86_64__) && defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "";
    return std::string("the operating system refused it: ") + std::strerror(errno);
#else
    return "only Linux is asked for it";
#endif
  }();
  return why;
}

#if defined(MINITRON_HAVE_AMX) || defined(MINITRON_HAVE_AVX512_BF16)
// Whether operands in tiles are multiplied: in whole blocks and at the edges, of every number of vectors of
// columns that the kernels tell apart.
bool multiplies_tiles(Gemm<bf16, float> gemm) {
  constexpr GemmTrial kTrials[] = {{35, kPanel, 38, kPanel, true},
                                   {5, 50, 150, kPanel, false},
                                   {33, 40, 33, 57, true},
                                   {19, 19, 70, 19, true},
                                   {1, 5, 32, kPanel, false}};
  for (const GemmTrial& trial : kTrials) {
    const int64_t depth = round_up(trial.K, kTileDepth);  // what there is beyond K and the rows is zero
    const auto a_at = [&](int64_t m, int64_t k) { return tile_a(m, k, depth); };
    if (!multiplies(gemm, trial, depth, std::vector<bf16>(round_up(trial.M, kTileRows) * depth, bf16{0}),
                    std::vector<bf16>(depth * kPanel, bf16{0}), a_at, &tile_b)) {
      return false;
    }
  }
  return true;
}
#endif

}  // namespace

const std::string& why_no_avx512_bf16() {
  static const std::string why = []() -> std::string {
    if (!cpu().avx512_bf16) return "this CPU has none";
    if (!cpu().keeps_vectors) return "the operating system does not save its registers";
#if defined(MINITRON_HAVE_AVX512_BF16)
    return multiplies_tiles(&avx512_bf16::gemm) ? "" : "it multiplied wrongly";
#else
    return "the compiler of this build did not know it";
#endif
  }();
  return why;
}

const std::string& why_no_amx() {
  static const std::string why = []() -> std::string {
    if (!why_not_allowed().empty()) return why_not_allowed();
    if (!why_no_avx512_bf16().empty())
      return "its operands are packed by AVX512_BF16: " + why_no_avx512_bf16();
#if defined(MINITRON_HAVE_AMX)
    amx::begin_task();
    const bool right = multiplies_tiles(&amx::gemm);
    amx::end_task();
    return right ? "" : "it multiplied wrongly";
#else
    return "the compiler of this build did not know it";
#endif
  }();
  return why;
}

// A rule and not a measurement, so that a machine gives the same bits every time. AMX, and AVX512_BF16 on AMD
// (from Zen 4 on), multiply bf16 at least twice as fast as fp32. Without AMX, Intel's VDPBF16PS is half as
// fast as its fp32 FMA (measured on Emerald Rapids: 87 against 165 GFLOP/s per core), and bf16 widens to fp32
// without rounding.
const char* bf16_engine() {
  if (why_no_amx().empty()) return "amx";
  if (cpu().amd && why_no_avx512_bf16().empty()) return "avx512_bf16";
  const bool fast = why_not_allowed().empty() || (cpu().amd && cpu().avx512_bf16);
  return fast && brgemm_bf16() ? "bf16" : "f32";
}

std::string gemm_engine_report() {
  const std::string chosen = bf16_engine();
  std::string report = "float64, fp32, fp16: vector code; bf16: ";
  const std::string without =
      " (AMX: " + why_no_amx() +
      "; AVX512_BF16: " + (why_no_avx512_bf16().empty() ? "slower than fp32 here" : why_no_avx512_bf16()) +
      ")";
  if (chosen == "amx") {
    report += "own kernels for AMX";
  } else if (chosen == "avx512_bf16") {
    report += "own kernels for AVX512_BF16 (AMX: " + why_no_amx() + ")";
  } else if (chosen == "bf16") {
    report += "brgemm bf16" + without;
  } else {
    report += "vector code on operands widened to fp32" + without;
  }
  if (!exports_brgemm()) report += ". libtorch does not export brgemm";
  return report;
}

}  // namespace minitron
