"""A model in memory is left in the modes that it had, whatever lm-eval, or an error in it, makes of them."""

import pytest
from torch import nn

from minitron_kernels.evaluation import run
from minitron_kernels.evaluation.results import Evaluation


def test_a_frozen_part_stays_in_evaluation_mode(monkeypatch):
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model[1].eval()  # frozen
    before = [module.training for module in model.modules()]

    def wrap(model, *_, **__):
        model.eval()
        raise ZeroDivisionError

    monkeypatch.setattr(run.harness, "wrap", wrap)
    with pytest.raises(ZeroDivisionError):
        run._run_all(
            Evaluation("x", settings={"max_length": None}), [], {}, model, None, 1, False, None, False
        )
    assert [module.training for module in model.modules()] == before
