"""How many calls of torch a small call makes: each costs a microsecond, whatever it computes."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import minitron_kernels as mk
from kl_loss.problems import make_linear

pytestmark = pytest.mark.native


def calls_of_torch(call):
    """Ops of torch that a call makes itself, the second time."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        call()
    events = [e for e in prof.events() if e.name.startswith("aten::")]
    return [e.name for e in events if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]


def sparse_teacher(N, V, k, *, tau=1.0):
    log_p = torch.randn(N, V, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    logprobs, ids = log_p.topk(k, -1)
    rest = torch.ones(N, V, dtype=torch.bool).scatter(1, ids, False)
    return ids, logprobs, {tau: (log_p / tau).masked_fill(~rest, -torch.inf).logsumexp(-1)}


@pytest.mark.parametrize(("tau", "most"), [(1.0, 30), (2.0, 36)])
def test_a_sparse_teacher(tau, most):
    hidden, head = make_linear(3, 16, 16, 100, torch.float32)[:2]
    teacher = sparse_teacher(3, 100, 5, tau=tau)
    with torch.no_grad():
        made = calls_of_torch(lambda: mk.linear_sparse_kl_loss(hidden, head, *teacher, temperature=tau))
    assert len(made) <= most, made


def test_importance():
    state, x = mk.ImportanceState(8, seq=("mean", "L2", "var")), torch.randn(2, 3, 8)
    made = calls_of_torch(lambda: mk.accumulate_importance_(state, x))
    assert len(made) <= 4, made
