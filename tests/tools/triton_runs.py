"""Runs the Triton rungs in a fresh Python, against the package or a copy with faults planted.

An op brings <op>/triton_cases.py (tests for device="cuda"), <op>/launches.py (what is compiled and counted)
and <op>/faults.py (what is planted).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

import minitron_kernels
from tools.faults import Fault

TESTS = Path(__file__).resolve().parents[1]
PACKAGE = Path(minitron_kernels.__file__).parent


def missing(*modules: str) -> str | None:
    """Which of the modules is not installed, as a reason to skip; or None."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def needs(*modules: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(missing(*modules) is not None, reason=str(missing(*modules)))


def faults_of(op: str) -> ModuleType:
    """<op>/faults.py, which needs neither triton nor a GPU."""
    return importlib.import_module(f"{op}.faults")


def ops_with(kind: str) -> list[str]:
    """The ops whose faults.py has faults of this kind."""
    ops = sorted(path.parent.name for path in TESTS.glob("*/faults.py") if path.parent.name != "tools")
    return [op for op in ops if hasattr(faults_of(op), kind)]


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


def other_tritons() -> dict[str, Path]:
    """{version: folder} of MINITRON_TEST_TRITON: folders that `pip install --no-deps --target` made."""
    folders = [Path(name) for name in os.environ.get("MINITRON_TEST_TRITON", "").split(os.pathsep) if name]
    found = {}
    for folder in folders:
        versions = [path.name.split("-")[1] for path in folder.glob("triton-*.dist-info")]
        if len(versions) != 1:
            raise pytest.UsageError(f"MINITRON_TEST_TRITON: there is not one triton in {folder}")
        found[versions[0].removesuffix(".dist")] = folder.resolve()
    return found


def python(
    import_from: Path, cwd: Path, *arguments: str, triton: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`python arguments`, with the package and the tests, and nothing else of the checkout.

    triton: the folder of one that is to be imported instead of the installed one.
    """
    first = [] if triton is None else [triton]
    path = os.pathsep.join(map(str, (*first, import_from, TESTS)))
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def run_cases(op: str, folder: Path, only: str = "", faults: tuple[Fault, ...] = ()) -> tuple[int, str]:
    """Exit status and output under ttsem of the cases of `op` whose name matches."""
    folder.mkdir(exist_ok=True)
    command = ["-m", "ttsem.sanitize", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider"]
    cases = TESTS / op / "triton_cases.py"
    done = python(planted(folder, faults), folder, *command, cases, "-k", only)
    return done.returncode, done.stdout + done.stderr


def assert_cases_pass(op: str, folder: Path, *, least: int, parts: tuple[str, ...] = ("",)) -> None:
    """All cases of `op` pass under ttsem, at least so many; the parts, by name, run side by side."""
    with ThreadPoolExecutor(min(len(parts), os.cpu_count() or 1)) as pool:
        folders = (folder / str(i) for i in range(len(parts)))
        done = list(pool.map(functools.partial(run_cases, op), folders, parts))
    total = 0
    for status, output in done:
        assert status == 0, output[-8000:]
        assert "skipped" not in output and "unsupported" not in output, output[-2000:]
        total += int(re.search(r"(\d+) passed", output)[1])
    assert total >= least


def assert_fault_is_found(op: str, folder: Path, only: str, fault: Fault, message: str) -> None:
    """The cases of `op` whose name matches fail by this message, with the fault in the kernels."""
    status, output = run_cases(op, folder, only, (fault,))
    assert status == 1 and re.search(message, output), output[-4000:]


def traffic(op: str, folder: Path, faults: tuple[Fault, ...] = ()) -> dict[str, dict[str, list[int]]]:
    """{case: {tensor: [bytes loaded, bytes stored, bytes of the tensor]}} of the launches of `op`."""
    done = python(planted(folder, faults), folder, "-m", "tools.triton_traffic", op)
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
