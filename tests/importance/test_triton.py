"""importance's Triton kernels without a GPU: their cases under ttsem, and the bytes they move."""

import re

import pytest

from importance.faults import TRITON_TRAFFIC, TRITON_VALUES
from tools.faults import some
from tools.triton_runs import assert_cases_pass, assert_fault_is_found, needs, traffic, wrong_traffic

needs_ttsem, needs_triton = needs("triton", "ttsem"), needs("triton")


@needs_ttsem
def test_cases_under_ttsem(tmp_path):
    halves = ("test_moments or test_heads", "not test_moments and not test_heads")
    assert_cases_pass("importance", tmp_path, least=55, parts=halves)


@needs_ttsem
@pytest.mark.parametrize("name", some(TRITON_VALUES))
def test_planted_fault_is_found(tmp_path, name):
    assert_fault_is_found("importance", tmp_path, *TRITON_VALUES[name])


# first words of a case: passes that load and that store each tensor
SUMS = {"moments": (0, 1), "counts": (0, 1), "partial": (1, 1)}
MINIMUM = {
    "moments": {"x": (1, 0), "piece_counts": (3, 1)} | SUMS,
    "masked fp32": {"x": (1, 0), "mask": (3, 0)} | SUMS,  # the mask once for each 2048 bytes of a token
    "masked bf16": {"x": (1, 0), "mask": (2, 0)} | SUMS,
    "packed": {"x": (1, 0), "moments": (0, 1), "counts": (0, 1)},
    "heads": {"x": (1, 0), "norms": (1, 1)} | SUMS,
    "rows": {"x": (1, 0), "out": (0, 1)},
    "pairs": {"x": (1, 0), "y": (1, 0), "out": (0, 1)},
}


@needs_triton
def test_traffic(tmp_path):
    report = traffic("importance", tmp_path)
    assert len(report) == 14
    assert wrong_traffic(report, MINIMUM) == []


@needs_triton
def test_planted_extra_pass_is_found(tmp_path):
    wrong = wrong_traffic(traffic("importance", tmp_path, (TRITON_TRAFFIC,)), MINIMUM)
    assert wrong and all(re.match(r"(moments|masked|packed|heads) .*: (x|norms) ", line) for line in wrong)
