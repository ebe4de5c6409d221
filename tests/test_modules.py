"""What is done to a user's modules for a while."""

import pytest
from torch import nn

from minitron_kernels._modules import eval_mode


class Merging(nn.Linear):
    """Adapters that are merged when the mode changes, as LoRA layers do in train()."""

    def train(self, mode=True):
        raise AssertionError("its mode is only to be noted")


def test_each_module_gets_its_own_mode_back():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), Merging(2, 2)))
    model[1].training = False
    before = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        model[0].training = True
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == before and len(set(before)) == 2
