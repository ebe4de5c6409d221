"""Every Triton kernel compiled for every target, and what the compiler made of it: no spills; registers,
shared memory, 128-bit accesses and tensor-core instructions within triton_artifacts.json. Needs no GPU.
"""

import functools
import json
import os
import re
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from _triton_runs import TESTS, Fault, missing, planted, python

pytestmark = pytest.mark.skipif(missing("triton") is not None, reason=str(missing("triton")))

GATES = json.loads((TESTS / "triton_artifacts.json").read_text())
TARGETS = ("sm_90", "sm_100", "sm_80", "gfx942")  # the longest first


def compiled(target, only="", faults=()):
    """Artifacts of the cases whose name has `only` in it."""
    with tempfile.TemporaryDirectory() as folder:
        package = planted(Path(folder), faults)
        done = python(package, Path(folder), TESTS / "_offline_triton.py", target, only)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def violations(artifacts, target):
    """What the gates forbid, one line each."""
    lines = []
    for found in artifacts:
        gate = GATES.get(found["kernel"], {}).get(target)
        name = f"{found['case']} {found['kernel']}"
        if gate is None:
            lines.append(f"{name}: has no gate in triton_artifacts.json")
            continue
        lines += [f"{name}: {found['spills']} accesses for spilled registers"] if found["spills"] else []
        lines += [
            f"{name}: {what} {found[what]}, at most {gate[what]}"
            for what in ("registers", "shared_bytes", "narrow_loads", "narrow_stores")
            if found[what] > gate[what]
        ]
        lines += [
            f"{name}: {what} {found[what]}, at least {gate[what]}"
            for what in ("wide_loads", "wide_stores")
            if found[what] < gate[what]
        ]
        if "matrix" in gate and not found["matrix"].get(gate["matrix"]):
            lines.append(f"{name}: no {gate['matrix']}, but {found['matrix']}")
    return lines


@functools.cache
def everything():
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(zip(TARGETS, pool.map(compiled, TARGETS), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_gates(target):
    artifacts = everything()[target]
    assert violations(artifacts, target) == []
    found = Counter(artifact["kernel"] for artifact in artifacts)
    assert found == {name: gate[target]["instances"] for name, gate in GATES.items()}


FAULTS = {  # name: cases, fault, what the gate says
    "none": ("rows forward bf16", (), None),
    "spills": (
        "linear forward bf16",
        (Fault("kernel_triton_linear.py", "KEEP_EXP=False", "KEEP_EXP=True"),),
        "spilled registers",
    ),
    "no tensor cores": (
        "linear forward bf16",
        (
            Fault(
                "kernel_triton_linear.py",
                "tl.dot(x, tl.trans(w), z)",
                'tl.dot(x.to(tl.float32), tl.trans(w).to(tl.float32), z, input_precision="ieee")',
            ),
            Fault(
                "kernel_triton.py",
                "return LinearBlocks(128, 128) if generation in (9, 10)",
                "return LinearBlocks(32, 32) if generation in (9, 10)",
            ),
        ),
        "no HGMMA",
    ),
    "scalar accesses": (
        "grad forward bf16",
        (Fault("kernel_triton_rows.py", '["stride_mn", "stride_wn"]', '["stride_mn", "stride_sn"]'),),
        "wide_loads 2, at least",
    ),
    "registers": (
        "rows forward bf16",
        (Fault("kernel_triton.py", "block // 512", "block // 2048"),),
        "registers",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(name):
    only, faults, message = FAULTS[name]
    lines = violations(compiled("sm_90", only, faults), "sm_90")
    if message is None:
        assert lines == []
    else:
        assert any(re.search(message, line) for line in lines), lines
