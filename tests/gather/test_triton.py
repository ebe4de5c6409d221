"""gather by Triton without a GPU: its cases under ttsem, the bytes it moves, how wide its accesses are."""

import json

import pytest

from gather.faults import TRITON_TRAFFIC, TRITON_VALUES
from tools.faults import some
from tools.triton_runs import (
    assert_cases_pass,
    assert_fault_is_found,
    needs,
    planted,
    python,
    traffic,
    wrong_traffic,
)

needs_ttsem, needs_triton = needs("triton", "ttsem"), needs("triton")


@needs_ttsem
def test_cases_under_ttsem(tmp_path):
    assert_cases_pass("gather", tmp_path, least=48)


@needs_ttsem
@pytest.mark.parametrize("name", some(TRITON_VALUES))
def test_planted_fault_is_found(tmp_path, name):
    assert_fault_is_found("gather", tmp_path, *TRITON_VALUES[name])


# first words of a case: passes that load and that store each tensor
ONCE = {"kept": (1, 0), "out": (0, 1)}
MINIMUM = {"single": ONCE, "blocks": ONCE, "rows": ONCE}


@needs_triton
def test_traffic(tmp_path):
    report = traffic("gather", tmp_path)
    assert len(report) == 9
    assert wrong_traffic(report, MINIMUM) == []
    # the indices of a column once for BLOCK_R = 8 rows: 12 rows are two runs
    assert all(
        report[case]["cols"][0] == 2 * report[case]["cols"][2] for case in report if "rows" not in case
    )


@needs_triton
def test_planted_extra_pass_is_found(tmp_path):
    assert wrong_traffic(traffic("gather", tmp_path, (TRITON_TRAFFIC,)), MINIMUM)


@needs_triton
def test_blocks_are_loaded_16_bytes_at_a_time(tmp_path):
    """The gates hold for all cases together; these load and store nothing narrow but indices."""
    done = python(planted(tmp_path, ()), tmp_path, "-m", "tools.offline_triton", "sm_90", "gather", "s fp8")
    assert done.returncode == 0, done.stderr[-4000:]
    found = {a["case"]: a for a in json.loads(done.stdout)}
    for case in ("blocks fp8", "rows fp8"):
        assert found[case]["wide_loads"] >= 4 and found[case]["narrow_stores"] == 0, found[case]
