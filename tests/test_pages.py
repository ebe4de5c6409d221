"""New memory is told from old, and its pages are made without a byte being changed."""

import sys

import pytest

from tools.programs import exit_status, needs_compiler

PROGRAM = """
#include "common/cpu/pages.h"

#include <sys/mman.h>

using namespace minitron;
constexpr int64_t kPages = 16, kBytes = kPages * kPageBytes;

static bool resident(const char* page) {
  unsigned char found = 0;
  return mincore(const_cast<char*>(page), 1, &found) == 0 && found & 1;
}

int main() {
  void* mapped =
      mmap(nullptr, kBytes + kPageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  char* memory = static_cast<char*>(mapped);
  mprotect(memory + kBytes, kPageBytes, PROT_NONE);  // what lies behind is nobody's
  if (!is_new(memory, kBytes) || is_new(memory, 0) || is_new(memory, -5)) return 1;

  memory[2 * kPageBytes + 7] = 3;  // in a page that is there already
  map_pages(memory + kPageBytes + 100, 2 * kPageBytes);
  if (memory[2 * kPageBytes + 7] != 3) return 2;
  const bool made = resident(memory + kPageBytes);
  if (made != resident(memory + 3 * kPageBytes) || resident(memory + 4 * kPageBytes)) return 3;
  if (!is_new(memory, kBytes)) return 4;
  map_pages(memory, 0);

  map_pages(memory, kBytes);
  if (resident(memory + kBytes - kPageBytes) != made || is_new(memory, kBytes) == made) return 5;
  for (int64_t i = 0; i < kBytes; ++i) {
    if (memory[i] != (i == 2 * kPageBytes + 7 ? 3 : 0)) return 6;
  }
  memory[kBytes - 1] = 1;
  if (is_new(memory, kBytes)) return 7;
  mprotect(memory, kBytes, PROT_READ);
  map_pages(memory, kBytes);  // is refused, without a word
  return memory[2 * kPageBytes + 7] == 3 ? 0 : 8;
}
"""


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_pages(tmp_path):
    assert exit_status(PROGRAM, tmp_path) == 0
