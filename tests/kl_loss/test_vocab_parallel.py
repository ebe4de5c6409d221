"""linear_kl_loss with a vocabulary over the ranks of a group: processes that gloo joins run the cases of
vocab_parallel_cases.py, once for all tests of this file, in groups of 2, 3 and 4.
"""

import pytest

from kl_loss import vocab_parallel_cases
from kl_loss.vocab_parallel_cases import CASES, start, value_cases

RANKS = 4

pytestmark = pytest.mark.native


@pytest.fixture(scope="module", name="reports")
def reports_fixture(tmp_path_factory):
    return start(RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("world", range(2, RANKS + 1))
@pytest.mark.parametrize("name", [*value_cases(2), *CASES])
def test_case(reports, world, name):
    if not vocab_parallel_cases.runs(world, name):
        pytest.skip("in smaller groups")
    errors = {rank: error for rank, error in reports[f"{world}-{name}"].items() if error}
    assert not errors, "\n".join(f"rank {rank}: {error}" for rank, error in errors.items())
