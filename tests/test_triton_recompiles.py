"""A new size of input compiles nothing: Triton's own choice of what to compile, followed without a GPU."""

import importlib
import json

import pytest
from _triton_runs import TESTS, missing, needs, ops_with, planted, python

pytestmark = needs("triton")
NAMES = ops_with("_triton_recompiles")
OPS = {} if missing("triton") else {op: importlib.import_module(f"_triton_recompiles_{op}") for op in NAMES}


def recompiled(op, folder, faults=()):
    """The kernels that were compiled for another than the first size, and not for that."""
    done = python(planted(folder, faults), folder, TESTS / "_triton_recompiles.py", op)
    assert done.returncode == 0, done.stderr[-4000:]
    first, *others = (set(kernels) for kernels in json.loads(done.stdout))
    assert {name.split()[0] for name in first} == OPS[op].KERNELS
    return {name.split()[0] for name in set().union(*others) - first}


@pytest.mark.parametrize("op", NAMES)
def test_a_new_size_compiles_nothing(tmp_path, op):
    assert recompiled(op, tmp_path) == set()


@pytest.mark.parametrize(
    ("op", "fault", "kernels"), [(op, *fault) for op, cases in OPS.items() for fault in cases.FAULTS]
)
def test_planted_specialisation_is_found(tmp_path, op, fault, kernels):
    assert recompiled(op, tmp_path, (fault,)) == kernels
