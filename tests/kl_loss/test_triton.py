"""The Triton kernels without a GPU: kl_loss/triton_cases.py under ttsem, and the bytes they move.

ttsem runs every launch on the CPU by the semantics of Triton's own IR and reports accesses out of bounds,
races between programs and, filled with NaN, reads of memory that nobody wrote.
"""

import re

import pytest

from kl_loss.faults import (
    TRITON_METRICS_TRAFFIC,
    TRITON_SCALE_TRAFFIC,
    TRITON_STUDENT_TRAFFIC,
    TRITON_TRAFFIC,
    TRITON_VALUES,
)
from tools.faults import some
from tools.triton_runs import assert_cases_pass, assert_fault_is_found, needs, traffic, wrong_traffic

needs_ttsem, needs_triton = needs("triton", "ttsem"), needs("triton")


@needs_ttsem
def test_cases_under_ttsem(tmp_path):
    halves = ("test_linear and not recompute", "not test_linear or recompute")
    assert_cases_pass("kl_loss", tmp_path, least=60, parts=halves)


@needs_ttsem
@pytest.mark.parametrize("name", some(TRITON_VALUES))
def test_planted_fault_is_found(tmp_path, name):
    assert_fault_is_found("kl_loss", tmp_path, *TRITON_VALUES[name])


# first words of a case: passes that load and that store each tensor
MINIMUM = {
    "rows forward": {"student": (1, 0), "teacher": (1, 0), "loss": (0, 1), "stats": (0, 1)},
    "rows reverse": {"student": (1, 0), "teacher": (1, 0), "loss": (0, 1), "stats": (0, 1)},
    "rows jsd": {"student": (2, 0), "teacher": (2, 0), "loss": (0, 1), "stats": (0, 1)},
    "grad": {"student": (1, 0), "teacher": (1, 0), "grad": (0, 1)},
    "tile_stats": {"student": (1, 0), "teacher": (1, 0), "state": (1, 1)},
    # one logit of each row more, which has 512: the label's
    "metrics rows": {"student": (1 + 1 / 512, 0), "teacher": (1, 0), "labels": (1, 0), "metrics": (0, 1)},
    "metrics grad": {"student": (1, 0), "teacher": (1, 0), "grad": (0, 1)},
    "metrics tile_stats": {"student": (1 + 1 / 512, 0), "teacher": (1, 0), "metric_state": (1, 1)},
    "metrics student stats": {"student": (1 + 1 / 512, 0), "state": (1, 1), "metric_state": (1, 1)},
    "metrics student grad": {"student": (1, 0), "grad": (0, 1)},
    "student stats": {"student": (1, 0), "state": (1, 1)},
    "student grad": {"student": (1, 0), "grad": (0, 1)},
    "tile_mixture": {"student": (1, 0), "teacher": (1, 0), "sums": (1, 1)},
    "scale by one": {"grad": (0, 0)},
    "scale": {"grad": (1, 1)},
}


@needs_triton
def test_traffic(tmp_path):
    report = traffic("kl_loss", tmp_path)
    assert len(report) == 27
    assert wrong_traffic(report, MINIMUM) == []


@needs_triton
def test_planted_extra_pass_is_found(tmp_path):
    wrong = wrong_traffic(traffic("kl_loss", tmp_path, (TRITON_TRAFFIC,)), MINIMUM)
    assert wrong and all(re.match(r"(metrics )?rows.*: student ", line) for line in wrong)


@needs_triton
def test_planted_extra_passes_for_metrics_and_of_the_student_are_found(tmp_path):
    wrong = wrong_traffic(
        traffic("kl_loss", tmp_path, (TRITON_METRICS_TRAFFIC, TRITON_STUDENT_TRAFFIC)), MINIMUM
    )
    cases = ["metrics rows", "metrics student stats", "metrics tile_stats", "student stats"]
    assert sorted(line.split(":")[0] for line in wrong) == cases


@needs_triton
def test_a_factor_of_one_that_is_multiplied_by_is_found(tmp_path):
    wrong = wrong_traffic(traffic("kl_loss", tmp_path, (TRITON_SCALE_TRAFFIC,)), MINIMUM)
    assert wrong and all(line.startswith("scale by one") for line in wrong)
