"""A task of GEMMs ends what it began, however it ends: tiles left configured would slow down others."""

from tools.programs import exit_status, needs_compiler

PROGRAM = """
#include "kl_loss/cpu/engine.h"

using namespace minitron;

static int begun = 0, ended = 0;

int main() {
  const Engine<float, float> engine{nullptr, nullptr, [] { ++begun; }, [] { ++ended; }};
  try {
    const EngineTask task(engine);
    if (begun != 1 || ended != 0) return 1;
    throw 1;
  } catch (int) {
  }
  if (begun != 1 || ended != 1) return 2;
  const Engine<float, float> plain{nullptr, nullptr, nullptr, nullptr};
  { const EngineTask task(plain); }
  return begun == 1 && ended == 1 ? 0 : 3;
}
"""


@needs_compiler
def test_a_task_that_throws_ends_its_engine(tmp_path):
    assert exit_status(PROGRAM, tmp_path) == 0
