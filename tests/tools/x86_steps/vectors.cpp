// The instructions on vectors and masks that GCC makes of the kernels, from the manual's descriptions. One
// that is missing stops the run and names itself.
#include <array>
#include <cmath>

#include "machine.h"

namespace stepped {
namespace {

using Bytes = std::array<uint8_t, 64>;
constexpr uint32_t kSign = 0x80000000, kExponent = 0x7f800000;

float flushed(float x) {
  const uint32_t bits = get<uint32_t>(reinterpret_cast<const uint8_t*>(&x));
  return bits & kExponent ? x : std::copysign(0.0f, x);
}

// Rounded to nearest even; a denormal becomes zero, and a NaN quiet.
uint16_t to_bf16(uint32_t bits) {
  const uint32_t magnitude = bits & ~kSign;
  if (magnitude > kExponent) return uint16_t(bits >> 16 | 0x40);
  if (!(bits & kExponent)) return uint16_t((bits & kSign) >> 16);
  const uint32_t half = 0x8000, rest = bits & 0xffff, whole = bits >> 16;
  return uint16_t(whole + (rest > half || (rest == half && (whole & 1))));
}

bool lane_is_on(const Instruction& x, int lane) { return !x.mask || (machine.masks[x.mask] >> lane & 1); }

Bytes vector(int number) {
  Bytes v;
  std::memcpy(v.data(), machine.vectors[number], v.size());
  return v;
}

// ModRM.rm: a register, memory, or one element of memory everywhere. Of memory whose lanes are off too, which
// the CPU would not read; no kernel has that but in moves.
Bytes third(const Instruction& x) {
  if (!x.memory) return vector(x.third);
  Bytes v{};
  if (x.broadcast) {
    const int element = x.wide ? 8 : 4;
    const uint8_t* p = readable(x, x.address(), element);
    for (int i = 0; i < x.bytes; i += element) std::memcpy(v.data() + i, p, element);
  } else {
    std::memcpy(v.data(), readable(x, x.address(), x.bytes), x.bytes);
  }
  return v;
}

// Lanes that are off keep what they had, or become zero; so do those beyond the instruction's vector.
void write(const Instruction& x, int number, const Bytes& value, int element) {
  uint8_t* to = machine.vectors[number];
  for (int i = 0; i < x.bytes; i += element) {
    if (lane_is_on(x, i / element)) {
      std::memcpy(to + i, value.data() + i, element);
    } else if (x.zeroing) {
      std::memset(to + i, 0, element);
    }
  }
  std::memset(to + x.bytes, 0, 64 - x.bytes);
}

// For aligned moves, memory at another address is an error.
void move(const Instruction& x, bool to_memory, int element, bool aligned) {
  if (x.memory && aligned && reinterpret_cast<uintptr_t>(x.address()) % x.bytes) stop_at(x, "is misaligned");
  if (!x.memory) return write(x, to_memory ? x.third : x.reg, vector(to_memory ? x.reg : x.third), element);
  Bytes value{};
  for (int i = 0; i < x.bytes; i += element) {
    if (!lane_is_on(x, i / element)) continue;  // its memory is not touched
    if (to_memory) {
      std::memcpy(writable(x, x.address() + i, element), machine.vectors[x.reg] + i, element);
    } else {
      std::memcpy(value.data() + i, readable(x, x.address() + i, element), element);
    }
  }
  if (!to_memory) write(x, x.reg, value, element);
}

// Every lane of the result from the two sources' bits.
template <typename F>
void bitwise(const Instruction& x, F&& f) {
  const Bytes a = vector(x.second), b = third(x);
  Bytes out{};
  for (int i = 0; i < 64; ++i) out[i] = f(a[i], b[i]);
  write(x, x.reg, out, x.wide ? 8 : 4);
}

// Lane i of the result is lane index(i) of `first`, or from there on of `second`.
template <typename F>
void permute(const Instruction& x, int element, const Bytes& first, const Bytes& second, F&& index) {
  Bytes out{};
  const int lanes = x.bytes / element;
  for (int i = 0; i < lanes; ++i) {
    const int from = index(i);
    const Bytes& source = from < lanes ? first : second;
    std::memcpy(out.data() + i * element, source.data() + from % lanes * element, element);
  }
  write(x, x.reg, out, element);
}

int64_t lane(const Bytes& v, int element, int i) {
  int64_t x = 0;
  std::memcpy(&x, v.data() + i * element, element);
  return x;
}

// VPERMT2*: the tables are the destination and ModRM.rm, the indices vvvv; VPERMI2*: the indices are the
// destination, the tables vvvv and ModRM.rm.
void permute_two(const Instruction& x, int element, bool index_is_written) {
  const Bytes destination = vector(x.reg), second = vector(x.second);
  const Bytes &indices = index_is_written ? destination : second,
              &table = index_is_written ? second : destination;
  const int lanes = x.bytes / element;
  permute(x, element, table, third(x), [&](int i) { return lane(indices, element, i) & (2 * lanes - 1); });
}

// VPERM*: of one table, ModRM.rm, by the indices in vvvv.
void permute_one(const Instruction& x, int element) {
  const Bytes indices = vector(x.second), table = third(x);
  const int lanes = x.bytes / element;
  permute(x, element, table, table, [&](int i) { return lane(indices, element, i) & (lanes - 1); });
}

// VPUNPCK*, VUNPCK*: of every 16 bytes the low or high halves, in turns.
void unpack(const Instruction& x, int element, bool high) {
  const int quarter = 16 / element, lanes = x.bytes / element;
  permute(x, element, vector(x.second), third(x), [&](int i) {
    const int in_quarter = i % quarter;
    return i - in_quarter + in_quarter / 2 + (high ? quarter / 2 : 0) + (in_quarter & 1 ? lanes : 0);
  });
}

// VSHUFF32X4 and its like: pieces of 16 bytes, the low half of the result from vvvv, the high one from
// ModRM.rm.
void shuffle_pieces(const Instruction& x, int element) {
  const int pieces = x.bytes / 16, piece = 16 / element, bits = pieces == 4 ? 2 : 1,
            lanes = x.bytes / element;
  permute(x, element, vector(x.second), third(x), [&](int i) {
    const int p = i / piece, from = x.immediate >> (p * bits) & (pieces - 1);
    return from * piece + i % piece + (p >= pieces / 2 ? lanes : 0);
  });
}

// VPINSR*, VINSERT*: a piece of vvvv replaced.
void insert(const Instruction& x, const uint8_t* from, int size, int element) {
  Bytes out = vector(x.second);
  std::memcpy(out.data() + (x.immediate & (x.bytes / size - 1)) * size, from, size);
  write(x, x.reg, out, element);
}

void insert_vector(const Instruction& x, int size) {
  const uint8_t* from = x.memory ? readable(x, x.address(), size) : machine.vectors[x.third];
  Bytes piece{};
  std::memcpy(piece.data(), from, size);
  insert(x, piece.data(), size, x.wide ? 8 : 4);
}

void broadcast(const Instruction& x, const uint8_t* from, int element) {
  Bytes out{};
  for (int i = 0; i < x.bytes; i += element) std::memcpy(out.data() + i, from, element);
  write(x, x.reg, out, element);
}

const uint8_t* third_element(const Instruction& x, int element) {
  return x.memory ? readable(x, x.address(), element) : machine.vectors[x.third];
}

// A general register or as much memory.
const uint8_t* third_general(const Instruction& x, int bytes) {
  if (x.memory) return readable(x, x.address(), bytes);
  return reinterpret_cast<const uint8_t*>(&general_register(x.general, x.third_general));
}

void to_general(const Instruction& x, int number, uint64_t value) {
  general_register(x.general, number) = int64_t(value);  // 32 bits clear the upper ones
}

// Each fp32 of the destination += two products, that of the odd elements first.
void dot(const Instruction& x) {
  const Bytes a = vector(x.second), b = third(x);
  Bytes out = vector(x.reg);
  for (int i = 0; i < x.bytes; i += 4) {
    float sum = get<float>(&out[i]);
    sum = multiply_add(from_bf16(&a[i + 2]), from_bf16(&b[i + 2]), sum);
    sum = multiply_add(from_bf16(&a[i]), from_bf16(&b[i]), sum);
    put(&out[i], sum);
  }
  write(x, x.reg, out, 4);
}

// `halves` of fp32, the first one ModRM.rm, to bf16 one after the other.
void narrow(const Instruction& x, bool two) {
  const Bytes low = third(x), high = vector(x.second);
  Bytes out{};
  for (int i = 0; i < x.bytes / 4; ++i) {
    put(&out[2 * i], to_bf16(get<uint32_t>(&low[4 * i])));
    if (two) put(&out[x.bytes / 2 + 2 * i], to_bf16(get<uint32_t>(&high[4 * i])));
  }
  Instruction to = x;
  if (!two) to.bytes /= 2;
  write(to, x.reg, out, 2);
}

}  // namespace

float multiply_add(float a, float b, float c) {
  return flushed(std::fma(flushed(a), flushed(b), flushed(c)));
}

float from_bf16(const uint8_t* p) {
  uint8_t bytes[4] = {0, 0, p[0], p[1]};
  return get<float>(bytes);
}

void execute_vector(const Instruction& x) {
  if (execute_mask(x)) return;
  const int element = x.wide ? 8 : 4;
  switch (x.key()) {
    case 0x00'000f'10:
    case 0x66'000f'10:
    case 0x00'000f'28:
    case 0x66'000f'28:
    case 0x00'000f'11:
    case 0x66'000f'11:
    case 0x00'000f'29:
    case 0x66'000f'29:
      count(x.opcode < 0x20 ? "vmovups" : "vmovaps");
      return move(x, x.opcode & 1, element, x.opcode >= 0x20);
    case 0x66'000f'6f:
    case 0xf3'000f'6f:
    case 0xf2'000f'6f:
    case 0x66'000f'7f:
    case 0xf3'000f'7f:
    case 0xf2'000f'7f:
      count(x.prefix == 1 ? "vmovdqa" : "vmovdqu");
      return move(x, x.opcode == 0x7f, x.prefix == 3 ? element / 4 : element, x.prefix == 1);
    case 0x66'000f'6e: {  // VMOVD, VMOVQ: the rest is zero
      count("vmovq");
      Bytes out{};
      std::memcpy(out.data(), third_general(x, element), element);
      return write(x, x.reg, out, 16);
    }
    case 0x66'000f'7e:
      count("vmovq");
      if (x.memory) {
        std::memcpy(writable(x, x.address(), element), machine.vectors[x.reg], element);
      } else if (x.wide) {
        to_general(x, x.third_general, get<uint64_t>(machine.vectors[x.reg]));
      } else {
        to_general(x, x.third_general, get<uint32_t>(machine.vectors[x.reg]));
      }
      return;
    case 0xf3'000f'7e: {
      count("vmovq");
      Bytes out{};
      std::memcpy(out.data(), third_element(x, 8), 8);
      return write(x, x.reg, out, 16);
    }
    case 0x66'000f'd6:
      count("vmovq");
      if (!x.memory) stop_at(x, "is not known");
      std::memcpy(writable(x, x.address(), 8), machine.vectors[x.reg], 8);
      return;
    case 0x00'000f'54:
    case 0x66'000f'54:
    case 0x66'000f'db:
      count("vpand");
      return bitwise(x, [](int a, int b) { return a & b; });
    case 0x00'000f'56:
    case 0x66'000f'56:
    case 0x66'000f'eb:
      count("vpor");
      return bitwise(x, [](int a, int b) { return a | b; });
    case 0x00'000f'57:
    case 0x66'000f'57:
    case 0x66'000f'ef:
      count("vpxor");
      return bitwise(x, [](int a, int b) { return a ^ b; });
    case 0x00'000f'77:
      count("vzeroupper");
      if (x.bytes != 16) stop_at(x, "is not known");
      for (int i = 0; i < 16; ++i) std::memset(machine.vectors[i] + 16, 0, 48);
      return;
    case 0x66'0f38'18:
    case 0x66'0f38'58:
      count("vpbroadcastd");
      return broadcast(x, third_element(x, 4), 4);
    case 0x66'0f38'19:
    case 0x66'0f38'59:
      count("vpbroadcastq");
      return broadcast(x, third_element(x, 8), 8);
    case 0x66'0f38'7c:
      count("vpbroadcastd");
      return broadcast(x, third_general(x, element), element);
    case 0xf3'0f38'52:
      count("vdpbf16ps");
      return dot(x);
    case 0xf2'0f38'72:
      count("vcvtne2ps2bf16");
      return narrow(x, true);
    case 0xf3'0f38'72:
      count("vcvtneps2bf16");
      return narrow(x, false);
    case 0x66'0f38'75:
    case 0x66'0f38'7d:
      count("vpermt2w");
      return permute_two(x, x.wide ? 2 : 1, x.opcode == 0x75);
    case 0x66'0f38'76:
    case 0x66'0f38'77:
    case 0x66'0f38'7e:
    case 0x66'0f38'7f:
      count("vpermt2ps");
      return permute_two(x, element, x.opcode < 0x78);
    case 0x66'0f38'8d:
      count("vpermw");
      return permute_one(x, x.wide ? 2 : 1);
    case 0x66'0f38'16:
    case 0x66'0f38'36:
      count("vpermps");
      return permute_one(x, element);
    case 0x00'000f'14:
    case 0x00'000f'15:
    case 0x66'000f'14:
    case 0x66'000f'15:
      count("vunpcklps");
      return unpack(x, x.prefix == 1 ? 8 : 4, x.opcode & 1);
    case 0x66'000f'60:
    case 0x66'000f'61:
    case 0x66'000f'62:
      count("vpunpckl");
      return unpack(x, 1 << (x.opcode - 0x60), false);
    case 0x66'000f'68:
    case 0x66'000f'69:
    case 0x66'000f'6a:
      count("vpunpckh");
      return unpack(x, 1 << (x.opcode - 0x68), true);
    case 0x66'000f'6c:
    case 0x66'000f'6d:
      count("vpunpckqdq");
      return unpack(x, 8, x.opcode & 1);
    case 0x00'000f'c6:  // VSHUFPS: of every 16 bytes two lanes of vvvv, then two of ModRM.rm
      count("vshufps");
      return permute(x, 4, vector(x.second), third(x), [&](int i) {
        return i / 4 * 4 + (x.immediate >> 2 * (i % 4) & 3) + (i % 4 >= 2 ? x.bytes / 4 : 0);
      });
    case 0x66'0f3a'23:
    case 0x66'0f3a'43:
      count("vshuff32x4");
      return shuffle_pieces(x, element);
    case 0x66'0f3a'22:
      count("vpinsrq");
      return insert(x, third_general(x, element), element, 16);
    case 0x66'0f3a'18:
    case 0x66'0f3a'38:
      count("vinserti128");
      return insert_vector(x, 16);
    case 0x66'0f3a'1a:
    case 0x66'0f3a'3a:
      count("vinserti64x4");
      return insert_vector(x, 32);
    default:
      stop_at(x, "is not known");
  }
}

}  // namespace stepped
