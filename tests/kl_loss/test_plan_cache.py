"""No plan is made twice for one problem, and none is taken for another."""

import pytest
import torch

import minitron_kernels as mk
from kl_loss.problems import make_linear, threads
from minitron_kernels.ops.kl_loss import plan_cpu

pytestmark = pytest.mark.native
PROBLEM = {
    "dtype": torch.bfloat16,
    "grad_hidden": True,
    "grad_head": True,
    "grad_bias": False,
    "grad_head_accumulator": False,
    "divergence_needs_kl": False,
    "schedule": "auto",
    "workspace_bytes": 8 << 20,
    "engine": "f32",
    "metrics": False,
    "outcomes": 0,
}
SIZES = {"num_tokens": 1100, "vocab_size": 2100, "student_hidden_size": 64, "teacher_hidden_size": 96}
STORE, RECOMPUTE = {"schedule": "store"}, {"schedule": "recompute"}
FROZEN = {"grad_hidden": False, "grad_head": False}
# two problems that differ in one thing, each thing that a plan depends on once
PAIRS = [
    *(({}, {name: size + 64}) for name, size in SIZES.items()),
    ({}, {"dtype": torch.float32}),
    ({}, {"grad_hidden": False}),
    ({}, {"grad_head": False}),
    (FROZEN, FROZEN | {"grad_bias": True}),
    (STORE, STORE | {"grad_head_accumulator": True}),
    (RECOMPUTE, RECOMPUTE | {"divergence_needs_kl": True}),
    (STORE, RECOMPUTE),
    ({}, {"workspace_bytes": 16 << 20}),
    ({}, {"engine": "portable_bf16"}),
    ({}, {"metrics": True}),
    ({"teacher_hidden_size": 0}, {"teacher_hidden_size": 0, "outcomes": 5}),
    ({}, {"threads": 3}),
]


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """Counts the plans that are made, from an empty cache on."""
    plan_cpu._plan.cache_clear()
    count, search = [], plan_cpu.Planner.plan
    monkeypatch.setattr(
        plan_cpu.Planner, "plan", lambda self, schedule: (count.append(schedule), search(self, schedule))[1]
    )
    yield count
    plan_cpu._plan.cache_clear()


def plan(other):
    given = SIZES | PROBLEM | other
    sizes = [given.pop(name) for name in SIZES]
    with threads(given.pop("threads", 1)):
        return plan_cpu.plan(*sizes, **given)


def test_each_decider_decides(made):
    """One problem after the other: the plan of each is what it is without a cache."""
    alone = []
    for pair in PAIRS:
        for problem in pair:
            plan_cpu._plan.cache_clear()
            alone.append((problem, plan(problem)))
    assert all(a != b for (_, a), (_, b) in zip(alone[::2], alone[1::2], strict=True))
    plan_cpu._plan.cache_clear()
    made.clear()
    for _ in range(2):
        assert all(plan(problem) == expected for problem, expected in alone)
    different = {str(SIZES | PROBLEM | problem) for problem, _ in alone}
    assert len(made) == len(different)


def test_calls_of_one_shape_make_one_plan(made):
    """Forward and backward, masks that leave as many tokens, and another number of threads in between."""
    hidden, head, *teacher = make_linear(6, 16, 24, 70, torch.float32)
    masks = torch.tensor([[True, True, False, True, True, False], [False, True, True, False, True, True]])
    results = {}
    for count in (1, 2, 1, 2):
        with threads(count):
            for i, mask in enumerate(masks):
                loss = mk.linear_kl_loss(hidden.requires_grad_(), head, *teacher, mask=mask)
                (grad,) = torch.autograd.grad(loss, hidden)
                first = results.setdefault(i, (loss.detach(), grad))
                assert torch.equal(loss, first[0]) and torch.equal(grad, first[1])
    assert len(made) == 2  # one for each number of threads


def test_a_budget_too_small_is_said_each_time():
    for _ in range(2):
        with pytest.raises(ValueError, match="workspace_bytes=1000 is too small"):
            plan({"workspace_bytes": 1000})
