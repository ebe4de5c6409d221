"""Compiled CPU kernels, run one instruction at a time on a CPU that lacks their instructions.

The files are compiled as the build does it; x86_steps/ takes over the instructions on vectors, masks and
tiles, and checks what memory they use. Linux on x86-64 only. A build may have faults planted in its sources.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tools.faults import Fault
from tools.host_shim import CSRC, TESTS, planted, write_sources

STEPS = TESTS / "tools/x86_steps"
HARNESS_FLAGS = [
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-psabi",
]


@functools.cache
def _build():
    """The modules `compile` and `tools` of the build, and what it would build here."""
    root = TESTS.parent
    if not (root / "build_backend").is_dir():  # an sdist has it; an installed copy has not
        pytest.skip("no build_backend folder here")
    sys.path.insert(0, str(root))
    try:
        from build_backend import compile, tools
    finally:
        sys.path.remove(str(root))
    return compile, tools, tools.make_plan("cpu")


def skip_where_there_is_nothing_to_step(*isas: str) -> None:
    """Skips the test without the compiler or the system that it needs."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("instructions are stepped on x86-64 Linux only")
    compiler = _build()[2].compiler
    if compiler is None:
        pytest.skip("no C++ compiler")
    if missing := set(isas) - set(compiler.isas):
        pytest.skip(f"the compiler does not know {', '.join(sorted(missing))}")


class Stepped:
    """The kernels in `sources` (under csrc/), and the functions of `harness` (in tests/), in one library."""

    def __init__(self, folder: Path, sources: list[str], harness: Path):
        self._folder, self._sources = folder, sources
        texts = {path: path.read_text() for pattern in ("*.h", "*.cpp") for path in CSRC.rglob(pattern)}
        self._texts = {str(path.relative_to(CSRC)): text for path, text in texts.items()}
        compiler = _build()[2].compiler
        own = [*compiler.command, *HARNESS_FLAGS, f"-I{CSRC}", f"-I{STEPS}", "-DMINITRON_SIMD=portable"]
        own += [f"-DMINITRON_HAVE_{isa.upper()}" for isa in compiler.isas]
        self._harness = []
        for path in (harness, *sorted(STEPS.glob("*.cpp"))):
            self._harness.append(folder / f"{path.stem}.o")
            _run([*own, "-c", str(path), "-o", str(self._harness[-1])])
        self._whole = self._objects(folder / "whole", sources, ())
        self._count = 0

    def _objects(self, folder: Path, sources: list[str], faults: tuple[Fault, ...]) -> dict[str, Path]:
        compile, _, plan = _build()
        write_sources(planted(self._texts, faults), folder / "csrc")
        steps = compile.compile_steps(
            folder, folder / "o", plan, [folder / "csrc" / name for name in sources]
        )
        for step in steps:
            step.output.parent.mkdir(parents=True, exist_ok=True)
            _run(step.command)
        return dict(zip(sources, [step.output for step in steps], strict=True))

    def load(self, fault: Fault | None = None, recompiled: str | None = None) -> ctypes.CDLL:
        """The library; with a fault in what the source `recompiled` (that of the fault) is made of."""
        self._count += 1
        objects = dict(self._whole)
        if fault:
            broken = self._folder / str(self._count)
            objects |= self._objects(broken, [recompiled or fault.file], (fault,))
        target = self._folder / f"stepped{self._count}.so"
        command = _build()[2].compiler.command
        _run(
            [
                *command,
                "-shared",
                "-Wl,-z,now,-Bsymbolic",
                "-o",
                str(target),
                *map(str, [*self._harness, *objects.values()]),
            ]
        )
        return ctypes.CDLL(str(target))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
