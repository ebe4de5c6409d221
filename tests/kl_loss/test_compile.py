"""The losses under torch.compile: no graph break, and no compilation per value of a number that changes."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import minitron_kernels as mk
from kl_loss.problems import TORCH, make_linear

pytestmark = pytest.mark.native
N, H, HT, V = 24, 16, 20, 70


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def problem(dtype=torch.float64):
    """In float64, where a number that was rounded to fp32 on its way shows."""
    tensors = make_linear(N, H, HT, V, dtype)
    return [x.requires_grad_(i < 2) for i, x in enumerate(tensors)]


def linear(hidden, head, teacher_hidden, teacher_head, **options):
    return mk.linear_kl_loss(hidden, head, teacher_hidden, teacher_head, **options)


def rows(hidden, head, teacher_hidden, teacher_head, **options):
    options.pop("workspace_bytes", None)
    return mk.kl_loss(hidden @ head.T, teacher_hidden @ teacher_head.T, **options)


MASK = torch.arange(N) % 5 > 0
# torch 2.11 guards a symbolic number by its value; the results are right there too
ONE_PER_VALUE = TORCH < (2, 13)
# each call another value of every number at once
NUMBERS = [
    {
        "temperature": 1.0 + 0.37 * i,
        "num_items": 30 + i,
        "divergence": 0.2 + 0.1 * i,
        "student_softcap": 9.0 + 0.5 * i,
        "teacher_softcap": 12.0 - 0.25 * i,
        "student_logit_scale": 1.0 + 0.1 * i,
        "teacher_logit_scale": 0.9 - 0.1 * i,
        "workspace_bytes": (4 << 20) + 4096 * i,
    }
    for i in range(5)
]


def value_and_grads(loss, tensors):
    total = loss.sum() if loss.dim() else loss
    return loss.detach(), *torch.autograd.grad(total, tensors[:2])


@pytest.mark.parametrize(("dynamic", "backend"), [(None, "auto"), (True, "auto"), (None, "reference")])
@pytest.mark.parametrize("function", [linear, rows])
def test_numbers_that_change(function, dynamic, backend):
    """One compilation, with dynamic=None a second one that makes the numbers symbolic; then none."""
    tensors = problem()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=counter)
    def step(*tensors, **numbers):
        return function(*tensors, mask=MASK, temperature_squared=True, backend=backend, **numbers)

    for i, numbers in enumerate(NUMBERS):
        actual = value_and_grads(step(*tensors, **numbers), tensors)
        expected = value_and_grads(
            function(*tensors, mask=MASK, temperature_squared=True, backend=backend, **numbers), tensors
        )
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
        if i == 1:
            compiled = counter.frame_count
    if not ONE_PER_VALUE:
        assert counter.frame_count == compiled <= 2


@pytest.mark.parametrize("function", [linear, rows])
def test_options_of_a_module_and_batches_that_change(function):
    """An annealed temperature kept in a module, other numbers of tokens, items as a tensor."""
    counter = CompileCounterWithBackend("aot_eager")
    _, head, _, teacher_head = problem()

    class Step(torch.nn.Module):
        temperature = 4.0

        def forward(self, hidden, teacher_hidden, items):
            return function(
                hidden,
                head,
                teacher_hidden,
                teacher_head,
                temperature=self.temperature,
                temperature_squared=True,
                num_items=items,
            )

    step = Step()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for i in range(6):
        step.temperature = 4.0 - 0.5 * i
        tokens, items = 10 + 3 * i, torch.tensor(50 + i)
        hidden, _, teacher_hidden, _ = make_linear(tokens, H, HT, V, torch.float64, seed=i)
        expected = step(hidden, teacher_hidden, items)
        torch.testing.assert_close(compiled(hidden, teacher_hidden, items), expected, rtol=1e-11, atol=0)
    if not ONE_PER_VALUE:
        assert counter.frame_count <= 2


@pytest.mark.parametrize("function", [linear, rows])
def test_a_bad_number_is_refused_whenever_it_comes(function):
    tensors = problem()

    @torch.compile(backend="aot_eager")
    def step(temperature):
        return function(*tensors, temperature=temperature)

    for good in (1.5, 2.5, 3.5):
        step(good)
    for bad in (-2.5, 0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"temperature must be finite and greater than 0, got {bad}"):
            step(bad)


@pytest.mark.parametrize("items", [0, torch.tensor(0), torch.tensor([0.0])])
@pytest.mark.parametrize("function", [linear, rows])
def test_nothing_counts(function, items):
    tensors = problem()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(mask, items):
        return function(*tensors, mask=mask, num_items=items)

    loss, *grads = value_and_grads(step(torch.zeros(N, dtype=torch.bool), items), tensors)
    assert loss == 0 and all((g == 0).all() for g in grads)
    if isinstance(items, torch.Tensor):  # that tokens count is known when it is too late for an error
        for wrong in (items, items - 3):
            assert not step(MASK, wrong).isfinite()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_lent_accumulator(reduction):
    """Added to by the backward, with its factor; not at all without one."""
    hidden, head, *teacher = problem()
    buffer = torch.ones(V, H, dtype=torch.float64)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(hidden, head, buffer):
        loss = linear(hidden, head, *teacher, reduction=reduction, grad_head_accumulator=buffer)
        return loss.sum()

    expected = torch.autograd.grad(linear(hidden, head, *teacher, reduction=reduction).sum(), head)[0]
    step(hidden, head, buffer)
    assert (buffer == 1).all()
    (0.25 * step(hidden, head, buffer)).backward()
    torch.testing.assert_close(buffer - 1, 0.25 * expected, rtol=1e-5, atol=2e-7)
    assert head.grad is None and hidden.grad is not None


def test_the_factor_stays_in_fp32():
    hidden, head, *teacher = (x.detach().bfloat16() for x in problem())
    head.requires_grad_()
    step = torch.compile(lambda w: linear(hidden, w, *teacher), fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(step(head), head)
    for factor in (0.3, 1 / 3):
        (scaled,) = torch.autograd.grad(factor * step(head), head)
        assert torch.equal(scaled, (grad.float() * torch.tensor(factor)).bfloat16())
