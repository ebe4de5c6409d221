// The registers that are kept, and one decoded instruction.
#pragma once

#include <sys/ucontext.h>

#include <cstdint>
#include <cstring>

#include "stepped.h"

namespace stepped {

struct Tile {
  uint8_t rows[16][64];
};
struct Machine {
  uint8_t vectors[32][64];
  uint64_t masks[8];
  Tile tiles[8];
  uint8_t palette, tile_rows[8];
  uint16_t tile_row_bytes[8];
};
extern Machine machine;

struct Instruction {
  greg_t* general;    // the general registers
  const uint8_t* at;  // its first byte
  int length;
  bool evex, wide;         // wide: W
  int map, prefix;         // map: 1 is 0F, 2 is 0F38, 3 is 0F3A; prefix: 0 is none, 1 is 66, 2 is F3, 3 is F2
  int opcode, bytes;       // bytes of the vectors: 16, 32, 64
  int reg, second, third;  // ModRM.reg; vvvv; ModRM.rm, if that is a register
  int third_general;       // the same as a general register
  bool memory, broadcast, zeroing, has_sib;
  int mask, immediate;
  uint8_t* base;     // memory: base and displacement
  int64_t index;     // and scaled index
  bool of_constant;  // its address is relative to the instruction
  uint8_t* address() const { return base + index; }
  // prefix, map and opcode in one number, as the manual writes them: 0xF3'0F38'52
  int64_t key() const {
    constexpr int kPrefixes[] = {0, 0x66, 0xf3, 0xf2}, kMaps[] = {0, 0x0f, 0x0f38, 0x0f3a};
    return int64_t(kPrefixes[prefix]) << 24 | int64_t(kMaps[map & 3]) << 8 | opcode;
  }
};

// Stops the run.
[[noreturn]] void stop(const char* why);
[[noreturn]] void stop_at(const Instruction& x, const char* why);
// Whether an instruction with a VEX or EVEX prefix is next; then all of it.
bool decode(greg_t* general, Instruction* x);
int64_t& general_register(greg_t* general, int number);

// Stop the run where the memory is not the code's to use.
const uint8_t* readable(const Instruction& x, const uint8_t* p, size_t bytes);
uint8_t* writable(const Instruction& x, uint8_t* p, size_t bytes);

void count(const char* name);
void execute_vector(const Instruction& x);
bool execute_tile(const Instruction& x);  // false: not about tiles
bool execute_mask(const Instruction& x);  // false: not about masks

// fp32 a b + c as the instructions on bf16 do it: rounded once, to nearest even; denormals taken for zeros
// and made zeros.
float multiply_add(float a, float b, float c);
float from_bf16(const uint8_t* p);

template <typename T>
T get(const uint8_t* p) {
  T x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
template <typename T>
void put(uint8_t* p, T x) {
  std::memcpy(p, &x, sizeof(x));
}

}  // namespace stepped
