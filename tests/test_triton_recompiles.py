"""A new size of input compiles nothing: Triton's own choice of what to compile, followed without a GPU."""

import importlib
import json

import pytest

from tools.triton_runs import faults_of, needs, ops_with, planted, python

pytestmark = needs("triton")
OPS = ops_with("TRITON_RECOMPILES")


def recompiled(op, folder, faults=()):
    """The kernels that were compiled for another than the first size, and not for that."""
    done = python(planted(folder, faults), folder, "-m", "tools.triton_recompiles", op)
    assert done.returncode == 0, done.stderr[-4000:]
    first, *others = (set(kernels) for kernels in json.loads(done.stdout))
    assert {name.split()[0] for name in first} == importlib.import_module(f"{op}.launches").KERNELS
    return {name.split()[0] for name in set().union(*others) - first}


@pytest.mark.parametrize("op", OPS)
def test_a_new_size_compiles_nothing(tmp_path, op):
    assert recompiled(op, tmp_path) == set()


@pytest.mark.parametrize(
    ("op", "fault", "kernels"), [(op, *fault) for op in OPS for fault in faults_of(op).TRITON_RECOMPILES]
)
def test_planted_specialisation_is_found(tmp_path, op, fault, kernels):
    assert recompiled(op, tmp_path, (fault,)) == kernels
