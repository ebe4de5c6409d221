"""DistillationTrainer on two processes: DDP and FSDP2, on gloo."""

import pytest

pytest.importorskip("transformers", reason="DistillationTrainer is a transformers.Trainer")

from distillation.trainer_rank_cases import CASES
from distillation.trainer_ranks import start
from tools.ranks import errors_of


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return start(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(case, reports):
    if case.endswith("_adapters"):
        pytest.importorskip("peft", reason="adapters are peft's")
    assert not (errors := errors_of(reports, case)), errors
