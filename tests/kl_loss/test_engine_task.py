"""A task of GEMMs ends what it began, however it ends: tiles left configured would slow down others."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
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


@pytest.mark.skipif(not CSRC.is_dir() or not shutil.which("g++"), reason="needs csrc/ and g++")
def test_a_task_that_throws_ends_its_engine(tmp_path):
    (tmp_path / "task.cpp").write_text(PROGRAM)
    command = ["g++", "-std=c++20", f"-I{CSRC}", str(tmp_path / "task.cpp"), "-o", str(tmp_path / "task")]
    subprocess.run(command, check=True)
    assert subprocess.run([str(tmp_path / "task")]).returncode == 0
