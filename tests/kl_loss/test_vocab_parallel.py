"""linear_kl_loss with a vocabulary over the ranks of a group: processes that gloo joins run the cases of
vocab_parallel_cases.py and vocab_parallel_calls.py, once for all tests of this file, in groups of 2, 3 and 4.
"""

import pytest
import torch.distributed as dist

from kl_loss.ranks import cases_of, start
from tools.host_shim import load, missing_tool
from tools.ranks import errors_of

RANKS = 4

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]


@pytest.fixture(scope="module", name="reports")
def reports_fixture(tmp_path_factory):
    if missing_tool() is None:
        load("kl_loss")  # so that the processes find it compiled
    return start(RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    ("world", "name"), [(world, name) for world in range(2, RANKS + 1) for name in cases_of(world)]
)
def test_case(reports, world, name):
    if name.startswith("gpu") and missing_tool() is not None:
        pytest.skip(missing_tool())
    assert not (errors := errors_of(reports, f"{world}-{name}")), errors
