"""DistillationTrainer on two processes: DDP and FSDP2, on gloo."""

import pytest

pytest.importorskip("transformers", reason="DistillationTrainer is a transformers.Trainer")

from distillation.trainer_rank_cases import CASES
from distillation.trainer_ranks import start


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return start(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(case, reports):
    if case.endswith("_adapters"):
        pytest.importorskip("peft", reason="adapters are peft's")
    errors = {rank: error for rank, error in reports[case].items() if error}
    assert not errors, "\n".join(f"rank {rank}: {error}" for rank, error in errors.items())
