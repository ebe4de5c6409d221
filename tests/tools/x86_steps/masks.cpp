// The instructions on masks: moves, and tests for none and for all.
#include "machine.h"

namespace stepped {
namespace {

// Bits of a mask: by VEX.W and the prefix, which another table of the manual gives the moves from and to
// general registers.
int mask_bits(const Instruction& x, bool general) {
  if (general && x.prefix == 3) return x.wide ? 64 : 32;
  if (x.wide) return x.prefix == 1 ? 32 : 64;
  return x.prefix == 1 ? 8 : 16;
}

// KORTEST: the flags say whether none or all bits of two masks are set.
void test_masks(const Instruction& x, uint64_t all) {
  constexpr int64_t kCarry = 1, kZero = 0x40, kOthers = 0x894;  // overflow, sign, auxiliary carry, parity
  const uint64_t either = (machine.masks[x.reg & 7] | machine.masks[x.third & 7]) & all;
  greg_t& flags = x.general[REG_EFL];
  flags = (flags & ~(kCarry | kZero | kOthers)) | (either == 0 ? kZero : 0) | (either == all ? kCarry : 0);
}

}  // namespace

bool execute_mask(const Instruction& x) {
  const bool tests = x.opcode == 0x98 && !x.memory;
  if (x.evex || x.map != 1 || ((x.opcode & ~3) != 0x90 && !tests)) return false;
  const int bits = mask_bits(x, x.opcode == 0x92 || x.opcode == 0x93);
  const uint64_t all = bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
  count(tests ? "kortest" : "kmov");
  uint64_t value = 0;
  if (tests) {
    test_masks(x, all);
  } else if (x.opcode == 0x90 && !x.memory) {
    machine.masks[x.reg & 7] = machine.masks[x.third & 7] & all;
  } else if (x.opcode == 0x90) {
    std::memcpy(&value, readable(x, x.address(), bits / 8), bits / 8);
    machine.masks[x.reg & 7] = value;
  } else if (x.opcode == 0x91) {
    std::memcpy(writable(x, x.address(), bits / 8), &machine.masks[x.reg & 7], bits / 8);
  } else if (x.opcode == 0x92) {
    machine.masks[x.reg & 7] = uint64_t(general_register(x.general, x.third_general)) & all;
  } else {
    general_register(x.general, x.reg & 15) = int64_t(machine.masks[x.third & 7] & all);
  }
  return true;
}

}  // namespace stepped
