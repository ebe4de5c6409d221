// bf16 GEMM by AMX, of operands in tiles. Compiled where the compiler knows AMX, called where
// bf16_engines.cpp finds that the CPU has it and the operating system allows it.
#include "common/cpu/bf16_engines.h"
#include "common/cpu/tile_gemm.h"

namespace minitron::amx {
namespace {

// As instructions of our own, since GCC's intrinsics for loads do not say that they read memory (GCC 12 then
// moves stores behind them), and want literals for the registers.
struct AmxTiles {
  template <int i>
  [[gnu::always_inline]] void load(const void* from, int64_t stride) const {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(i) : "memory");
  }
  // A tile of A, which is read once for these columns: it need not stay in the L1 cache.
  template <int i>
  [[gnu::always_inline]] void load_once(const void* from) const {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(int64_t{64}), "i"(i) : "memory");
  }
  template <int i>
  [[gnu::always_inline]] void store(void* to, int64_t stride) const {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(i) : "memory");
  }
  template <int i>
  [[gnu::always_inline]] void zero() const {
    asm volatile("tilezero %%tmm%c0" ::"i"(i));
  }
  template <int to, int a, int b>
  [[gnu::always_inline]] void multiply() const {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(to), "i"(a), "i"(b));
  }
};

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
constexpr TileConfig kConfig{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

}  // namespace

// Once per task: whoever else uses tiles on this thread, such as libtorch's GEMMs, leaves another
// configuration.
void begin_task() { asm volatile("ldtilecfg %0" ::"m"(kConfig) : "memory"); }

// Tiles in use make switches between threads slower.
void end_task() { asm volatile("tilerelease" ::: "memory"); }

void gemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t, int64_t ldc, bool add, const bf16* a,
          const bf16* b, float* c, const Ahead& ahead) {
  AmxTiles tiles;
  tile_gemm(tiles, M, N, K, lda, ldc, add, a, b, c, ahead.a);
}

}  // namespace minitron::amx
