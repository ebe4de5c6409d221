"""An op in Python runs at once where nobody looks on, and through the dispatcher where somebody does."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import minitron_kernels as mk
from kl_loss.problems import make_linear
from minitron_kernels._opaque import opaque_op
from minitron_kernels.ops.kl_loss.linear_op import linear_kl_loss_op


@opaque_op("minitron_kernels_test::add_to_", mutates_args=("total", "count"))
def add_to_(
    total: torch.Tensor, x: torch.Tensor, factor: float, count: torch.Tensor | None = None
) -> torch.Tensor:
    # as a kernel does, without a new version
    total.detach().numpy()[...] += factor * x.detach().numpy()
    if count is not None:
        count.detach().numpy()[...] += 1
    return x.new_ones(x.shape)


@add_to_.register_fake
def _(x, count):  # of the arguments those that it looks at
    assert count is None
    return x.new_empty(x.shape)


class Seen(TorchDispatchMode):
    """Notes the ops that it is shown."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Sub(torch.Tensor):
    """A subclass without anything of its own."""


@pytest.fixture
def through_dispatcher(monkeypatch):
    """The calls that went to the custom_op."""
    calls, op = [], add_to_.op
    monkeypatch.setattr(add_to_, "op", lambda *args, **kwargs: (calls.append(args), op(*args, **kwargs))[1])
    return calls


def test_a_plain_call_runs_at_once(through_dispatcher):
    for total in (torch.zeros(3), torch.nn.Parameter(torch.zeros(3), requires_grad=False)):
        result = add_to_(total, torch.ones(3), 2.0)
        assert total.tolist() == [2.0] * 3 and result.tolist() == [1.0] * 3
    assert not through_dispatcher


@pytest.mark.parametrize("keyword", [False, True])
def test_what_is_changed_has_a_new_version(keyword):
    """As the dispatcher gives it: a backward that has saved the tensor says that it was changed."""
    total, x, count = torch.zeros(3), torch.ones(3, requires_grad=True), torch.zeros(())
    saved = x * total, x * count
    with torch.no_grad():
        add_to_(total, x.detach(), 1.0, **{"count": count}) if keyword else add_to_(total, x, 1.0, count)
    for one in saved:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            one.sum().backward()
    version = total._version
    add_to_(total, x.detach(), 1.0)
    assert total._version > version


def test_who_looks_on_sees_the_op(through_dispatcher):
    with Seen() as seen:
        add_to_(torch.zeros(3), torch.ones(3), 2.0)
    assert "minitron_kernels_test::add_to_" in seen.names
    add_to_(torch.zeros(3), torch.ones(3).as_subclass(Sub), 2.0)
    assert add_to_(torch.zeros(3, device="meta"), torch.ones(3, device="meta"), 2.0).is_meta
    with FakeTensorMode():
        fakes = torch.zeros(3), torch.ones(3)
        assert add_to_(*fakes, 2.0).shape == (3,)
    assert add_to_(*fakes, 2.0).shape == (3,)  # a fake tensor outside of its mode
    assert len(through_dispatcher) == 5

    graph = make_fx(lambda total, x: add_to_(total, x, 2.0))(torch.zeros(3), torch.ones(3))
    assert "minitron_kernels_test.add_to_" in graph.code
    before = len(through_dispatcher)
    torch.func.vmap(lambda x: x * 2)(torch.ones(2, 3))  # gone again by now
    add_to_(torch.zeros(3), torch.ones(3), 2.0)
    assert len(through_dispatcher) == before


@pytest.mark.native
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"grad_head_accumulator": True}])
def test_the_loss_is_the_same_either_way(options):
    """To the bit, with its gradients; also while flops are counted, which needs the dispatcher."""

    def run():
        hidden, head, *teacher = make_linear(5, 16, 24, 70, torch.float32)
        hidden.requires_grad_(), head.requires_grad_()
        given = dict(options)
        if "grad_head_accumulator" in given:
            given["grad_head_accumulator"] = torch.ones_like(head)
        loss = mk.linear_kl_loss(hidden, head, *teacher, labels=torch.arange(5), ce_weight=0.5, **given)
        loss.sum().backward()
        return loss.detach(), hidden.grad, given.get("grad_head_accumulator", head.grad)

    plain = run()
    with FlopCounterMode(display=False), Seen() as seen:
        looked_on = run()
    assert linear_kl_loss_op.op._opoverload.name() in seen.names
    for a, b in zip(plain, looked_on, strict=True):
        assert torch.equal(a, b)
