"""The Triton kernels without a GPU: kl_loss/triton_cases.py under ttsem, and the bytes they move.

ttsem runs every launch on the CPU by the semantics of Triton's own IR and reports accesses out of bounds,
races between programs and, filled with NaN, reads of memory that nobody wrote.
"""

import functools
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from tools.faults import Fault
from tools.triton_runs import needs, run_cases, traffic, wrong_traffic

needs_ttsem, needs_triton = needs("triton", "ttsem"), needs("triton")


@needs_ttsem
def test_cases_under_ttsem(tmp_path):
    """All of them, in two halves side by side."""
    halves = ["test_linear and not recompute", "not test_linear or recompute"]
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        folders = (tmp_path / str(i) for i in range(2))
        done = list(pool.map(functools.partial(run_cases, "kl_loss"), folders, halves))
    total = 0
    for status, output in done:
        assert status == 0, output[-8000:]
        assert "skipped" not in output and "unsupported" not in output, output[-2000:]
        total += int(re.search(r"(\d+) passed", output)[1])
    assert total >= 60


ROWS, MATH, LINEAR = (f"kl_loss/kernel_triton/{name}.py" for name in ("rows", "divergence", "linear"))
FAULTS = {  # name: cases, fault, what the output says
    "no rescale between blocks": (
        "rows_rising and 0.0",
        Fault(
            MATH,
            "a_mass_s, b_mass_s = a_sum_s * tl.exp(a_max_s - base_s)",
            "a_mass_s, b_mass_s = a_sum_s",
        ),
        "Not equal to tolerance",
    ),
    "a load without its mask": (
        "test_rows and dtype0-0.0",
        Fault(ROWS, "tl.load(ptr + columns, mask=inside, other=-INF)", "tl.load(ptr + columns)"),
        r"KernelFault.*reads \d+ element",
    ),
    "a store without its mask": (
        "test_rows and dtype0-0.0",
        Fault(ROWS, ", mask=offs_v < columns)", ")"),
        r"KernelFault.*writes \d+ element",
    ),
    "programs that write one address": (
        "test_rows and dtype0-0.0",
        Fault(ROWS, "tl.store(loss_ptr + rows,", "tl.store(loss_ptr + rows * 0,"),
        "KernelFault.*race|KernelFault.*program",
    ),
    "a state that nobody wrote": (
        "test_linear and dtype0 and 0.0 and recompute",
        Fault(ROWS, "    if not FIRST:\n        max_s", "    if FIRST or not FIRST:\n        max_s"),
        "Not equal to tolerance",
    ),
    "digits of 1e4": (
        "rows_at_edges and 0.0-1.0",
        Fault(MATH, "tl.abs(max_s - max_t) > APART", "tl.abs(max_s - max_t) > 1e30"),
        "expected",
    ),
    "splits that overlap": (
        "fused_statistics and 0.0",
        Fault(LINEAR, "tl.minimum(first + tiles_per_split,", "tl.minimum(first + tiles_per_split + 1,"),
        "Not equal to tolerance",
    ),
}


@needs_ttsem
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(tmp_path, name):
    only, fault, message = FAULTS[name]
    status, output = run_cases("kl_loss", tmp_path, only, (fault,))
    assert status == 1 and re.search(message, output), output[-4000:]


# first words of a case: passes that load and that store each tensor
MINIMUM = {
    "rows forward": {"student": (1, 0), "teacher": (1, 0), "loss": (0, 1), "stats": (0, 1)},
    "rows reverse": {"student": (1, 0), "teacher": (1, 0), "loss": (0, 1), "stats": (0, 1)},
    "rows jsd": {"student": (2, 0), "teacher": (2, 0), "loss": (0, 1), "stats": (0, 1)},
    "grad": {"student": (1, 0), "teacher": (1, 0), "grad": (0, 1)},
    "tile_stats": {"student": (1, 0), "teacher": (1, 0), "state": (1, 1)},
    "tile_mixture": {"student": (1, 0), "teacher": (1, 0), "sums": (1, 1)},
}


@needs_triton
def test_traffic(tmp_path):
    report = traffic("kl_loss", tmp_path)
    assert len(report) == 16
    assert wrong_traffic(report, MINIMUM) == []


@needs_triton
def test_planted_extra_pass_is_found(tmp_path):
    again = Fault(
        ROWS,
        "    rows = row + tl.arange(0, 1)\n",
        "    kl += 0.0 * tl.sum(tl.load(student_ptr + tl.arange(0, BLOCK_V)).to(tl.float32), 0)\n"
        "    rows = row + tl.arange(0, 1)\n",
    )
    wrong = wrong_traffic(traffic("kl_loss", tmp_path, (again,)), MINIMUM)
    assert wrong and all(re.match(r"rows .*: student ", line) for line in wrong)
