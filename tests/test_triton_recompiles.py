"""A new number of rows compiles nothing: Triton's own choice of what to compile, followed without a GPU."""

import json

import pytest
from _faults import Fault
from _triton_runs import TESTS, needs, planted, python

pytestmark = needs("triton")
KERNELS = {
    "forward_kernel",
    "grad_kernel",
    "tile_stats_kernel",
    "tile_mixture_kernel",
    "finish_stats_kernel",
    "finish_mixture_kernel",
    "linear_kernel",
}


def recompiled(folder, faults=()):
    """{number of rows: the kernels that were not compiled for 128 rows}."""
    done = python(planted(folder, faults), folder, TESTS / "_triton_recompiles.py")
    assert done.returncode == 0, done.stderr[-4000:]
    found = {int(rows): set(kernels) for rows, kernels in json.loads(done.stdout).items()}
    assert {name.split()[0] for name in found[128]} == KERNELS
    return {rows: {name.split()[0] for name in kernels - found[128]} for rows, kernels in found.items()}


def test_a_new_number_of_rows_compiles_nothing(tmp_path):
    """One row, even and odd numbers, several chunks: chunks that start anywhere."""
    assert set().union(*recompiled(tmp_path).values()) == set()


@pytest.mark.parametrize(
    ("fault", "kernels"),
    [
        (
            Fault("kl_loss/kernel_triton_rows.py", '["stride_mn", "stride_state"]', '["stride_mn"]'),
            {"tile_stats_kernel"},
        ),
        (
            Fault("kl_loss/kernel_triton_rows.py", 'PER_ROW = ("mask_ptr", ', "PER_ROW = ("),
            {"forward_kernel", "grad_kernel"},
        ),
    ],
)
def test_planted_specialisation_is_found(tmp_path, fault, kernels):
    assert set().union(*recompiled(tmp_path, (fault,)).values()) == kernels
