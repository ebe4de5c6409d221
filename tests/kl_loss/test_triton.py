"""The Triton kernels without a GPU: kl_loss/triton_cases.py under ttsem, and the bytes they move.

ttsem runs every launch on the CPU by the semantics of Triton's own IR and reports accesses out of bounds,
races between programs and, filled with NaN, reads of memory that nobody wrote.
"""

import functools
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from kl_loss.faults import TRITON_TRAFFIC, TRITON_VALUES
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


@needs_ttsem
@pytest.mark.parametrize("name", TRITON_VALUES)
def test_planted_fault_is_found(tmp_path, name):
    only, fault, message = TRITON_VALUES[name]
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
    wrong = wrong_traffic(traffic("kl_loss", tmp_path, (TRITON_TRAFFIC,)), MINIMUM)
    assert wrong and all(re.match(r"rows .*: student ", line) for line in wrong)
