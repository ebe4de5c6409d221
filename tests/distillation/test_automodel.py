"""KDLoss for NeMo AutoModel, against its formula and, where it is installed, against its own KDLoss.

pip install --no-deps nemo-automodel==0.7.0 brings it.
"""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from minitron_kernels.distillation.trainers.automodel import KDLoss

HAS_AUTOMODEL = importlib.util.find_spec("nemo_automodel") is not None
V = 61


def formula(student, teacher, labels, num_batch_labels=None, *, ignore_index, temperature, dtype=None):
    """As published: softmax in fp32, mean over valid tokens or sum / num_batch_labels, times τ²."""
    keep = (labels != ignore_index).reshape(-1)
    s, t = (
        (x.reshape(-1, x.shape[-1])[keep].to(dtype or torch.float32) / temperature).log_softmax(-1)
        for x in (student, teacher)
    )
    kl = F.kl_div(s, t, reduction="none", log_target=True).sum(-1) * temperature**2
    return kl.sum() / (max(int(keep.sum()), 1) if num_batch_labels is None else num_batch_labels)


def theirs(*arguments, ignore_index, temperature, **options):
    from nemo_automodel.components.loss.kd_loss import KDLoss as Theirs

    return Theirs(ignore_index=ignore_index, temperature=temperature, **options)(*arguments)


needs_automodel = pytest.mark.skipif(not HAS_AUTOMODEL, reason="pip install --no-deps nemo-automodel==0.7.0")
OTHERS = [formula, pytest.param(theirs, marks=needs_automodel)]


def problem(shape=(3, 5), *, close=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    teacher = 2 * torch.randn((*shape, V), generator=g)
    student = teacher + torch.randn((*shape, V), generator=g) * (1e-2 if close else 2)
    labels = torch.randint(V, shape, generator=g)
    labels[torch.rand(shape, generator=g) < 0.4] = -7
    return student, teacher, labels


def loss_and_grad(function, student, teacher, labels, *rest, **options):
    x = student.detach().clone().requires_grad_()
    loss = function(x, teacher, labels, *rest, **options)
    (0.5 * loss).backward()
    return loss.detach(), x.grad


def ours(*arguments, **options):
    return KDLoss(**options)(*arguments)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("num_batch_labels", [None, 17, torch.tensor(17)])
@pytest.mark.parametrize("shape", [(15,), (3, 5)])
def test_loss_and_gradient_in_fp32(other, temperature, num_batch_labels, shape):
    options = {"ignore_index": -7, "temperature": temperature}
    operands = (*problem(shape), num_batch_labels)
    expected = loss_and_grad(other, *operands, **options)
    for extra in ({}, {"fp32_upcast": False, "chunk_size": 4}):
        for a, e in zip(loss_and_grad(ours, *operands, **options, **extra), expected, strict=True):
            assert a.dtype == e.dtype and a.shape == e.shape
            torch.testing.assert_close(a, e, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("other", OTHERS)
def test_nothing_valid_is_a_zero_with_a_gradient(other):
    student, teacher, labels = problem()
    operands = student, teacher, torch.full_like(labels, -7), 5
    for function in (other, ours):
        loss, grad = loss_and_grad(function, *operands, ignore_index=-7, temperature=1.0)
        assert loss == 0 and (grad == 0).all()


@needs_automodel
@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("fp32_upcast", [True, False])
def test_bf16_close_to_the_teacher(temperature, fp32_upcast):
    """The loss is 10 times as near to float64 as theirs; the gradient differs by bf16's own rounding at most.

    Without their upcast, and τ ≠ 1, their gradient is of rounded logits: ours is 10 times as near.
    """
    student, teacher, labels = problem((64, 8), close=True)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    options = {"ignore_index": -7, "temperature": temperature}
    truth = loss_and_grad(formula, student.double(), teacher.double(), labels, dtype=torch.float64, **options)
    their = loss_and_grad(theirs, student, teacher, labels, fp32_upcast=fp32_upcast, **options)
    our = loss_and_grad(ours, student, teacher, labels, fp32_upcast=fp32_upcast, **options)
    errors = [
        [((x.double() - t).norm() / t.norm()).item() for x, t in zip(result, truth, strict=True)]
        for result in (their, our)
    ]
    print(f"τ {temperature} upcast {fp32_upcast}: loss, gradient: theirs {errors[0]}, ours {errors[1]}")
    assert errors[1][0] <= max(errors[0][0] / 4, 2e-7)
    assert errors[1][1] <= 1.05 * errors[0][1]
    if temperature != 1 and not fp32_upcast:
        assert errors[1][1] <= errors[0][1] / 10


def test_attributes_are_read_at_every_call():
    operands = problem()
    loss = KDLoss(ignore_index=-7)
    loss(*operands)
    loss.temperature, loss.ignore_index = 3.0, int(operands[2][0, 0])
    expected = formula(*operands, ignore_index=loss.ignore_index, temperature=3.0)
    torch.testing.assert_close(loss(*operands), expected, rtol=1e-5, atol=0)


def test_refusals():
    student, teacher, labels = problem()
    with pytest.raises(ValueError, match="temperature"):
        KDLoss(temperature=0)
    with pytest.raises(TypeError, match="ignore_index"):
        KDLoss(ignore_index=0.5)
    with pytest.raises(ValueError, match="vocab_size"):
        KDLoss()(student, teacher[..., :-1], labels)
    with pytest.raises(ValueError, match="one entry per token"):
        KDLoss()(student, teacher, labels[:-1])
