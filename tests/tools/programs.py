"""Small C++ programs around a header of csrc/: compiled, and run for their exit status."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
needs_compiler = pytest.mark.skipif(
    not CSRC.is_dir() or not shutil.which("g++"), reason="needs csrc/ and g++"
)


def exit_status(program: str, folder: Path) -> int:
    """What main() returns: 0, or the number of the first thing that is not as it should be."""
    source, binary = folder / "program.cpp", folder / "program"
    source.write_text(program)
    subprocess.run(["g++", "-std=c++20", f"-I{CSRC}", str(source), "-o", str(binary)], check=True)
    return subprocess.run([str(binary)]).returncode
