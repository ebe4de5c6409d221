"""What a GEMM fetches ahead: every line of what is read next, once and in order, and nothing behind it."""

from tools.programs import exit_status, needs_compiler

PROGRAM = """
#include <cstdio>
#include <initializer_list>
#include <utility>

static const char* fetched[64];
static int count = 0;
#define __builtin_prefetch(line, ...) (fetched[count++] = (line))
#include "common/cpu/ahead.h"

using namespace minitron;

// Whether next(), called `times` times, fetches exactly these.
static bool fetches(const Ahead& ahead, int times, std::initializer_list<const char*> lines) {
  Fetcher fetcher(ahead);
  count = 0;
  for (int i = 0; i < times; ++i) fetcher.next();
  if (count != int(lines.size())) return false;
  int i = 0;
  for (const char* line : lines) {
    if (fetched[i++] != line) return false;
  }
  return true;
}

int main() {
  static float b[40], none[1];
  static char a[1000];
  const char *b0 = reinterpret_cast<const char*>(b), *b1 = b0 + 64, *b2 = b0 + 128;
  const MemoryRows panel = MemoryRows::of(b, 40);  // 160 bytes: three lines
  const MemoryRows head{a, 3, 100, 300};           // two lines of each of three rows
  if (panel.lines() != 3 || head.lines() != 6 || MemoryRows{}.lines() != 0) return 1;

  if (!fetches({{}, panel}, 10, {b0, b1, b2})) return 2;
  if (!fetches({{}, panel}, 2, {b0, b1})) return 3;
  if (!fetches({head, {}}, 10, {a, a + 64, a + 300, a + 364, a + 600, a + 664})) return 4;
  if (!fetches({head.part(1, 3), panel}, 10, {a + 300, a + 364, b0, b1, b2})) return 5;
  if (!fetches({}, 3, {})) return 6;
  // nothing to fetch in one of them keeps nothing from the other
  if (!fetches({MemoryRows::of(none, 0), panel}, 5, {b0, b1, b2})) return 7;

  // parts are all of it, whatever their number
  for (int n = 1; n < 8; ++n) {
    int64_t rows = 0;
    for (int i = 0; i < n; ++i) {
      const MemoryRows part = head.part(i, n);
      if (part.data != a + rows * 300 || part.bytes != 100) return 8;
      rows += part.rows;
    }
    if (rows != 3) return 9;
  }
  const MemoryRows tile = MemoryRows::of(b, 8, 5);
  return tile.rows == 5 && tile.stride == 32 && tile.part(2, 5).data == b0 + 64 ? 0 : 10;
}
"""


@needs_compiler
def test_every_line_is_fetched_once(tmp_path):
    assert exit_status(PROGRAM, tmp_path) == 0
