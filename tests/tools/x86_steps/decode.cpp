// VEX and EVEX instructions, as the manual's volume 2, chapter 2 lays them out.
#include "machine.h"

namespace stepped {

int64_t& general_register(greg_t* general, int number) {
  constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                            REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  static_assert(sizeof(greg_t) == sizeof(int64_t));
  return reinterpret_cast<int64_t&>(general[kOrder[number & 15]]);
}

namespace {

bool has_immediate(const Instruction& x) {
  return x.map == 3 || (x.map == 1 && (x.opcode == 0x70 || x.opcode == 0xc6));
}

// What an EVEX displacement of one byte counts: the bytes of memory that the instruction reads.
int displacement_unit(const Instruction& x) {
  if (!x.evex) return 1;
  const int element = x.wide ? 8 : 4;
  switch (x.key()) {
    case 0x66'0f38'58:  // VPBROADCASTD
    case 0x66'0f38'18:  // VBROADCASTSS
      return 4;
    case 0x66'0f38'59:  // VPBROADCASTQ
    case 0x66'0f38'19:  // VBROADCASTSD
    case 0x66'000f'd6:  // VMOVQ
    case 0xf3'000f'7e:
      return 8;
    case 0x66'000f'6e:  // VMOVD, VMOVQ
    case 0x66'000f'7e:
    case 0x66'0f3a'22:  // VPINSRD, VPINSRQ
      return element;
    case 0x66'0f3a'18:  // VINSERTF32X4 and its like
    case 0x66'0f3a'38:
      return 16;
    case 0x66'0f3a'1a:  // VINSERTF64X4
    case 0x66'0f3a'3a:
      return 32;
    default:
      return x.broadcast ? element : x.bytes;
  }
}

}  // namespace

bool decode(greg_t* general, Instruction* out) {
  Instruction x{};
  x.general = general;
  const uint8_t* p = x.at = reinterpret_cast<const uint8_t*>(general[REG_RIP]);
  int high_reg = 0, high_index = 0, high_base = 0, high_vector = 0;
  if (*p == 0xc5) {
    high_reg = ~p[1] >> 7 & 1;
    x.map = 1;
    x.second = ~p[1] >> 3 & 15;
    x.bytes = p[1] & 4 ? 32 : 16;
    x.prefix = p[1] & 3;
    p += 2;
  } else if (*p == 0xc4 || *p == 0x62) {
    x.evex = *p == 0x62;
    high_reg = ~p[1] >> 7 & 1;
    high_index = ~p[1] >> 6 & 1;
    high_base = ~p[1] >> 5 & 1;
    x.map = p[1] & (x.evex ? 7 : 31);
    x.wide = p[2] >> 7;
    x.second = ~p[2] >> 3 & 15;
    x.prefix = p[2] & 3;
    if (x.evex) {
      high_reg |= (~p[1] >> 4 & 1) << 1;
      high_vector = high_index;  // of a register
      x.second |= (~p[3] >> 3 & 1) << 4;
      x.zeroing = p[3] >> 7;
      x.bytes = 16 << (p[3] >> 5 & 3);
      x.broadcast = p[3] >> 4 & 1;
      x.mask = p[3] & 7;
      p += 4;
    } else {
      x.bytes = p[2] & 4 ? 32 : 16;
      p += 3;
    }
  } else {
    return false;
  }
  x.opcode = *p++;
  if (x.map < 1 || x.map > 3 || x.bytes > 64) stop_at(x, "is not known");
  if (x.map == 1 && x.opcode == 0x77) {  // VZEROUPPER has no operands
    x.length = int(p - x.at);
    *out = x;
    return true;
  }
  const int mod = *p >> 6, rm = *p & 7;
  x.reg = (*p >> 3 & 7) | high_reg << 3;
  x.third = rm | high_base << 3 | high_vector << 4;
  x.third_general = rm | high_base << 3;
  ++p;
  x.memory = mod != 3;
  if (x.memory) {
    int base = x.third_general, low = rm;
    if (rm == 4) {
      x.has_sib = true;
      const int index = (*p >> 3 & 7) | high_index << 3;
      if (index != 4) x.index = general_register(general, index) << (*p >> 6);
      low = *p & 7;
      base = low | high_base << 3;
      ++p;
    }
    int64_t address = 0;
    if (mod == 0 && low == 5) {
      address = get<int32_t>(p);
      p += 4;
      if (!x.has_sib) {
        x.of_constant = true;
        address += reinterpret_cast<int64_t>(p) + has_immediate(x);
      }
    } else {
      address = general_register(general, base);
      if (mod == 1) address += int64_t(int8_t(*p++)) * displacement_unit(x);
      if (mod == 2) {
        address += get<int32_t>(p);
        p += 4;
      }
    }
    x.base = reinterpret_cast<uint8_t*>(address);
  }
  if (has_immediate(x)) x.immediate = *p++;
  x.length = int(p - x.at);
  *out = x;
  return true;
}

}  // namespace stepped
