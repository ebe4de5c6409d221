"""Every Triton kernel compiled for AMD and for the archs of tools/archs.py, and what the compiler made of it:
no spills; registers, shared memory, 128-bit accesses and tensor-core instructions within
triton_artifacts.json. Needs no GPU.

The gates are those of the installed Triton. Folders in MINITRON_TEST_TRITON hold other versions, whose code
for sm_90 has to meet the same gates but for what triton_artifacts_other.json grants them.
"""

import functools
import itertools
import json
import os
import re
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tools.archs import chosen_archs
from tools.faults import some
from tools.triton_runs import TESTS, faults_of, needs, ops_with, other_tritons, planted, python

pytestmark = needs("triton")

GATES = json.loads((TESTS / "triton_artifacts.json").read_text())
ARCHS = chosen_archs(json.loads((TESTS / "cuda_artifacts.json").read_text())["archs"])
TARGETS = sorted((*(f"sm_{arch}" for arch in ARCHS), "gfx942"), key="sm_90".__ne__)  # the longest first
OPS = ops_with("TRITON_ARTIFACTS")
# {first two numbers of a version: {kernel: {what: its gate there}}}, only where the gate is another
GRANTED = json.loads((TESTS / "triton_artifacts_other.json").read_text())
OTHERS = other_tritons()


def compiled(target, op, only="", faults=(), triton=None):
    """Artifacts of the op's cases whose name has `only` in it."""
    with tempfile.TemporaryDirectory() as folder:
        package = planted(Path(folder), faults)
        done = python(package, Path(folder), "-m", "tools.offline_triton", target, op, only, triton=triton)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def violations(artifacts, target, granted=None):
    """What the gates forbid, one line each."""
    lines = []
    for found in artifacts:
        gate = GATES.get(found["kernel"], {}).get(target)
        gate = gate and {"spills": 0, **gate, **(granted or {}).get(found["kernel"], {})}
        name = f"{found['case']} {found['kernel']}"
        if gate is None:
            lines.append(f"{name}: has no gate in triton_artifacts.json")
            continue
        if found["spills"] > gate["spills"]:
            lines.append(f"{name}: {found['spills']} accesses for spilled registers")
        lines += [
            f"{name}: {what} {found[what]}, at most {gate[what]}"
            for what in ("registers", "shared_bytes", "narrow_loads", "narrow_stores")
            if found[what] > gate[what]
        ]
        lines += [
            f"{name}: {what} {found[what]}, at least {gate[what]}"
            for what in ("wide_loads", "wide_stores", "loads_together")
            if found[what] < gate.get(what, 0)
        ]
        if "matrix" in gate and not found["matrix"].get(gate["matrix"]):
            lines.append(f"{name}: no {gate['matrix']}, but {found['matrix']}")
    return lines


@functools.cache
def everything():
    """{target: artifacts of all ops}."""
    jobs = list(itertools.product(TARGETS, OPS))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = pool.map(lambda job: compiled(*job), jobs)
        out = {target: [] for target in TARGETS}
        for (target, _), artifacts in zip(jobs, found, strict=True):
            out[target] += artifacts
    return out


@pytest.mark.parametrize("target", TARGETS)
def test_gates(target):
    artifacts = everything()[target]
    assert violations(artifacts, target) == []
    found = Counter(artifact["kernel"] for artifact in artifacts)
    assert found == {name: gate[target]["instances"] for name, gate in GATES.items()}


@pytest.mark.parametrize("version", GRANTED)
@pytest.mark.parametrize("op", OPS)
def test_gates_on_another_triton(version, op):
    folder = next((OTHERS[name] for name in OTHERS if name.startswith(f"{version}.")), None)
    if folder is None:
        pytest.skip(f"no Triton {version} in MINITRON_TEST_TRITON (pip install --no-deps --target FOLDER)")
    assert violations(compiled("sm_90", op, triton=folder), "sm_90", GRANTED[version]) == []


FAULTS = {(op, name): fault for op in OPS for name, fault in faults_of(op).TRITON_ARTIFACTS.items()}


@pytest.mark.parametrize(("op", "name"), some(FAULTS))
def test_planted_fault_is_found(op, name):
    only, faults, message = FAULTS[op, name]
    lines = violations(compiled("sm_90", op, only, faults), "sm_90")
    assert any(re.search(message, line) for line in lines), lines
