"""Runs the Triton rungs in a fresh Python, against the package or a copy with faults planted.

An op brings _triton_cases_<op>.py (tests for device="cuda"), _triton_traffic_<op>.py (launches whose bytes
are counted) and _offline_triton_<op>.py (launches to compile for GPUs that are not here).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from _faults import Fault

import minitron_kernels

TESTS = Path(__file__).resolve().parent
PACKAGE = Path(minitron_kernels.__file__).parent


def missing(*modules: str) -> str | None:
    """Which of the modules is not installed, as a reason to skip; or None."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def needs(*modules: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(missing(*modules) is not None, reason=str(missing(*modules)))


def ops_with(stem: str) -> list[str]:
    """The ops that have a file <stem>_<op>.py."""
    return sorted(path.stem.removeprefix(f"{stem}_") for path in TESTS.glob(f"{stem}_*.py"))


def planted(folder: Path, faults: tuple[Fault, ...]) -> Path:
    """A folder to import the package from, with the faults in it; the installed one if there are none."""
    if not faults:
        return PACKAGE.parent
    copy = folder / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for fault in faults:
        path = copy / "ops" / fault.file
        path.write_text(fault.plant(path.read_text()))
    return folder


def python(import_from: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python arguments`, with the package and nothing of the checkout but what is named."""
    environment = {**os.environ, "PYTHONPATH": str(import_from)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def run_cases(op: str, folder: Path, only: str = "", faults: tuple[Fault, ...] = ()) -> tuple[int, str]:
    """Exit status and output under ttsem of the cases of `op` whose name matches."""
    folder.mkdir(exist_ok=True)
    command = ["-m", "ttsem.sanitize", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider"]
    cases = TESTS / f"_triton_cases_{op}.py"
    done = python(planted(folder, faults), folder, *command, cases, "-k", only)
    return done.returncode, done.stdout + done.stderr


def traffic(op: str, folder: Path, faults: tuple[Fault, ...] = ()) -> dict[str, dict[str, list[int]]]:
    """{case: {tensor: [bytes loaded, bytes stored, bytes of the tensor]}} of the launches of `op`."""
    done = python(planted(folder, faults), folder, TESTS / "_triton_traffic.py", op)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def wrong_traffic(report, minimum) -> list[str]:
    """Where a launch moves other bytes than the mathematics needs, one line each.

    minimum: {first words of a case: {tensor: (passes that load it, passes that store it)}}.
    """
    wrong = []
    for case, counts in report.items():
        expected = next(passes for name, passes in minimum.items() if case.startswith(name))
        for name, (loads, stores) in expected.items():
            loaded, stored, size = counts[name]
            if (loaded, stored) != (loads * size, stores * size):
                wrong.append(f"{case}: {name} of {size} bytes: {loaded} loaded, {stored} stored")
    return wrong
