// AMX on tiles of bf16, from the manual's descriptions of LDTILECFG, TILELOADD, TILESTORED, TILEZERO,
// TDPBF16PS and TILERELEASE. What would raise an exception stops the run.
#include "machine.h"

namespace stepped {
namespace {

void load_config(const Instruction& x) {
  const uint8_t* config = readable(x, x.address(), 64);
  Machine& m = machine;
  std::memset(m.tiles, 0, sizeof(m.tiles));
  m.palette = config[0];
  if (m.palette > 1) stop_at(x, "asks for a palette that there is not");
  if (config[1] != 0) stop_at(x, "starts in the middle of a tile");
  for (int i = 0; i < 64; ++i) {
    const bool reserved = (i >= 2 && i < 16) || (i >= 32 && i < 48) || i >= 56;
    if (m.palette && reserved && config[i]) stop_at(x, "sets reserved bytes");
  }
  for (int t = 0; t < 8; ++t) {
    m.tile_row_bytes[t] = m.palette ? get<uint16_t>(config + 16 + 2 * t) : 0;
    m.tile_rows[t] = m.palette ? config[48 + t] : 0;
    if (m.tile_row_bytes[t] > 64 || m.tile_rows[t] > 16) stop_at(x, "asks for a tile that is too large");
    if (!m.tile_row_bytes[t] != !m.tile_rows[t]) stop_at(x, "asks for a tile of no rows or no columns");
  }
}

// The number of a tile that the configuration has.
int tile(const Instruction& x, int t) {
  if (t > 7) stop_at(x, "names a tile that there is not");
  if (!machine.palette || !machine.tile_rows[t]) stop_at(x, "uses a tile that was not configured");
  return t;
}

void load(const Instruction& x) {
  const int t = tile(x, x.reg);
  if (!x.has_sib) stop_at(x, "has no stride");
  Tile fresh{};
  for (int r = 0; r < machine.tile_rows[t]; ++r) {
    const int bytes = machine.tile_row_bytes[t];
    std::memcpy(fresh.rows[r], readable(x, x.base + r * x.index, bytes), bytes);
  }
  machine.tiles[t] = fresh;
}

void store(const Instruction& x) {
  const int t = tile(x, x.reg);
  if (!x.has_sib) stop_at(x, "has no stride");
  for (int r = 0; r < machine.tile_rows[t]; ++r) {
    const int bytes = machine.tile_row_bytes[t];
    std::memcpy(writable(x, x.base + r * x.index, bytes), machine.tiles[t].rows[r], bytes);
  }
}

// ModRM.reg += ModRM.rm times vvvv. Even and odd k are added up for themselves, both from zero.
void multiply(const Instruction& x) {
  const int c = tile(x, x.reg), a = tile(x, x.third), b = tile(x, x.second);
  const Machine& m = machine;
  if (a == b || a == c || b == c) stop_at(x, "names a tile twice");
  const int rows = m.tile_rows[c], row_bytes = m.tile_row_bytes[c], pairs = m.tile_row_bytes[a] / 4;
  if (m.tile_row_bytes[a] % 4 || m.tile_row_bytes[b] % 4 || row_bytes % 4) stop_at(x, "cuts a pair");
  if (m.tile_rows[a] != rows || m.tile_rows[b] != pairs || m.tile_row_bytes[b] != row_bytes) {
    stop_at(x, "multiplies tiles whose sizes do not agree");
  }
  Tile result{};
  for (int r = 0; r < rows; ++r) {
    for (int n = 0; n < row_bytes / 4; ++n) {
      float even = 0, odd = 0;
      for (int k = 0; k < pairs; ++k) {
        const uint8_t *left = m.tiles[a].rows[r] + 4 * k, *right = m.tiles[b].rows[k] + 4 * n;
        even = multiply_add(from_bf16(left), from_bf16(right), even);
        odd = multiply_add(from_bf16(left + 2), from_bf16(right + 2), odd);
      }
      const float products = multiply_add(1, even, odd), old = get<float>(m.tiles[c].rows[r] + 4 * n);
      put(result.rows[r] + 4 * n, multiply_add(1, old, products));
    }
  }
  machine.tiles[c] = result;
}

}  // namespace

bool execute_tile(const Instruction& x) {
  if (x.evex || x.wide || x.bytes != 16) return false;
  switch (x.key()) {
    case 0x00'0f38'49:
      if (x.memory && x.reg == 0) {
        count("ldtilecfg");
        load_config(x);
        return true;
      }
      if (x.memory || x.reg != 0 || x.third != 0) return false;
      count("tilerelease");
      machine.palette = 0;
      std::memset(machine.tiles, 0, sizeof(machine.tiles));
      return true;
    case 0xf2'0f38'49:
      if (x.memory || x.third != 0) return false;
      count("tilezero");
      machine.tiles[tile(x, x.reg)] = {};
      return true;
    case 0xf2'0f38'4b:
    case 0x66'0f38'4b:
      if (!x.memory) return false;
      count(x.prefix == 3 ? "tileloadd" : "tileloaddt1");
      load(x);
      return true;
    case 0xf3'0f38'4b:
      if (!x.memory) return false;
      count("tilestored");
      store(x);
      return true;
    case 0xf3'0f38'5c:
      if (x.memory) return false;
      count("tdpbf16ps");
      multiply(x);
      return true;
    default:
      return false;
  }
}

}  // namespace stepped
