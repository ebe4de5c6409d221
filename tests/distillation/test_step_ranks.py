"""step() on two ranks, in every wrapper: loss and gradients are those of one big batch."""

import pytest
import torch.distributed as dist

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("peft", reason="needs peft")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from distillation.step_ranks import CASES, start
from tools.ranks import errors_of


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return start(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_ranks_come_to_one_big_batch(reports, name):
    assert not (errors := errors_of(reports, name)), errors
