"""Hidden-state terms on two ranks: who averages the map, which weight a rank has."""

import pytest
import torch.distributed as dist

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs gloo", allow_module_level=True)

from distillation import hidden_ranks
from tools.ranks import errors_of


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return hidden_ranks.start(2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", [case.__name__ for case in hidden_ranks.CASES])
def test_two_ranks(case, reports):
    assert not (errors := errors_of(reports, case)), errors
