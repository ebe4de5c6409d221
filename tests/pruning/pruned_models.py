"""Tiny models pruned by random scores, and how they are compared."""

import itertools

import torch

from minitron_kernels.pruning import make_plan, prune_model
from minitron_kernels.pruning.families.registry import family_of
from pruning.score_tables import random_tables
from pruning.tiny_models import FAMILIES

IDS = torch.arange(24).view(2, 12) * 7 % 96
# norms, RoPE and softmax of these models compute in fp32: 2^-24 at each of a few dozen steps in a row
TOLERANCE = 64 * 2**-24
FAMILY_AND_TIE = tuple(itertools.product(FAMILIES, (False, True)))


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def assert_same_logits(actual, expected):
    """Equal but for rounding, and far from what an idle model would give."""
    expected = expected.double()
    scale = expected.abs().amax()
    assert scale > 0.01
    error = (actual.double() - expected).abs().amax()
    assert error <= TOLERANCE * scale, f"{error / scale:.2e} of the largest logit"


def layers_of(model):
    return model.get_submodule(family_of(model.config).layers)


def pruned(model, tables=None, *, divisor=16, **target):
    plan = make_plan(tables or random_tables(model.config), model.config, divisor=divisor, **target)
    smaller = prune_model(model, plan)
    assert sum(p.numel() for p in smaller.parameters()) == plan.parameters_after < plan.parameters_before
    return plan, smaller


@torch.no_grad()
def zero(parameter, *index):
    """Zero parameter[index], with lists as indices of one dimension each."""
    if parameter is not None:
        parameter[index] = 0


def gone(keep, size):
    return sorted(set(range(size)) - set(keep))


def plan_for(config, **target):
    return make_plan(random_tables(config), config, divisor=16, **(target or {"hidden_size": 32}))


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
