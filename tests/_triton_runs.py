"""Runs scripts and test suites in a fresh Python against the package, or a copy with faults planted."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import minitron_kernels

TESTS = Path(__file__).resolve().parent
PACKAGE = Path(minitron_kernels.__file__).parent
KERNELS = Path("ops/kl_loss")


@dataclass(frozen=True)
class Fault:
    """In `file` (of the kernels), the one occurrence of `old` becomes `new`."""

    file: str
    old: str
    new: str


def missing(*modules: str) -> str | None:
    """Which of the modules is not installed, as a reason to skip; or None."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def planted(folder: Path, faults: tuple[Fault, ...]) -> Path:
    """A folder to import the package from, with the faults in it; the installed one if there are none."""
    if not faults:
        return PACKAGE.parent
    copy = folder / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for fault in faults:
        path = copy / KERNELS / fault.file
        text = path.read_text()
        if text.count(fault.old) != 1:
            raise ValueError(f"{path} has {text.count(fault.old)} times, wanted once: {fault.old!r}")
        path.write_text(text.replace(fault.old, fault.new))
    return folder


def python(import_from: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python arguments`, with the package and nothing of the checkout but what is named."""
    environment = {**os.environ, "PYTHONPATH": str(import_from)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
