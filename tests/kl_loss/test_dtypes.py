"""Every combination of dtypes of the operands, at every engine, is right or refused."""

import itertools

import numpy as np
import pytest
import torch

import minitron_kernels as mk
from kl_loss.oracle import oracle_linear, oracle_rows
from kl_loss.problems import GRADIENT_BOUND, force_operands, make_linear, make_rows, relative, to_numpy
from minitron_kernels.ops.kl_loss import engines_cpu
from minitron_kernels.ops.kl_loss.engines_cpu import operand_type

pytestmark = pytest.mark.native
NARROW = (torch.float32, torch.bfloat16, torch.float16)
N, H, HT, V = 37, 33, 40, 139  # odd: a pair of bf16 channels or tokens is left over


def check_linear(dtypes, *, schedule, biased, seed):
    """Losses, gradients, and the loss without gradients, against float64."""
    drawn = make_linear(N, H, HT, V, torch.float64, seed=seed)
    tensors = [x.to(dtype) for x, dtype in zip(drawn, dtypes, strict=True)]
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    bias = torch.linspace(-2, 2, V, dtype=wide) if biased else None
    loss, *truth = oracle_linear(
        *to_numpy(*tensors), student_bias=to_numpy(bias)[0], teacher_bias=to_numpy(bias)[0]
    )
    biases = {"student_bias": bias, "teacher_bias": bias}
    with torch.no_grad():
        rows = mk.linear_kl_loss(*tensors, reduction="none", **biases)
    hidden, head = (x.clone().requires_grad_() for x in tensors[:2])
    student_bias = bias.clone().requires_grad_() if biased else None
    total = mk.linear_kl_loss(
        hidden,
        head,
        *tensors[2:],
        student_bias=student_bias,
        teacher_bias=bias,
        reduction="sum",
        schedule=schedule,
    )
    total.backward()
    assert total.dtype == rows.dtype == wide
    np.testing.assert_allclose(rows.numpy(), loss, rtol=1e-5)
    assert total.item() == pytest.approx(loss.sum(), rel=1e-5)
    for x, expected in zip((hidden, head, student_bias), truth, strict=True):
        if x is not None:
            assert x.grad.dtype == x.dtype
            assert relative(x.grad, expected) <= GRADIENT_BOUND[x.dtype]


@pytest.mark.parametrize("schedule,biased", [("store", False), ("recompute", True)])
def test_every_combination(schedule, biased):
    """What this CPU prefers; each call with numbers of its own, so that those of another would show."""
    combinations = [*itertools.product(NARROW, repeat=4), (torch.float64,) * 4]
    for seed, dtypes in enumerate(combinations):
        check_linear(dtypes, schedule=schedule, biased=biased, seed=seed)


@pytest.mark.parametrize("engine", ["f32", "bf16", "portable_bf16", "portable_amx"])
def test_every_engine(monkeypatch, engine):
    """fp32 operands serve all; bf16 ones what is bf16 throughout, and refuse the rest."""
    force_operands(monkeypatch, engine)
    for seed, dtypes in enumerate(itertools.product(NARROW, repeat=4)):
        for schedule in ("store", "recompute"):
            if engine == "f32" or set(dtypes) == {torch.bfloat16}:
                check_linear(dtypes, schedule=schedule, biased=True, seed=seed)
                continue
            tensors = [
                x.to(dtype) for x, dtype in zip(make_linear(N, H, HT, V, torch.float64), dtypes, strict=True)
            ]
            first = next(i for i, dtype in enumerate(dtypes) if dtype != torch.bfloat16)
            name = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")[first]
            with pytest.raises(RuntimeError, match=f"operands cannot take {name}"):
                mk.linear_kl_loss(*tensors, schedule=schedule)


def test_bf16_operands_only_where_all_are(monkeypatch):
    monkeypatch.setattr(engines_cpu, "_bf16_engine", lambda: "bf16")
    for dtypes in itertools.product(NARROW, repeat=4):
        assert operand_type(*dtypes) == ("bf16" if set(dtypes) == {torch.bfloat16} else "f32")
    assert operand_type(*[torch.float64] * 4) == "f64"
    planned = {
        dtypes: mk.plan_linear_kl_loss(64, 100, 8, 8, dtype=dtypes[0], teacher_dtype=dtypes[1]).engine
        for dtypes in itertools.product(NARROW, (*NARROW, None))
    }
    for (own, other), engine in planned.items():
        assert engine == ("bf16" if own == torch.bfloat16 and other in (own, None) else "f32")


def test_float64_needs_float64():
    tensors = make_linear(N, H, HT, V, torch.float64)
    for which in range(4):
        mixed = [x.float() if i == which else x for i, x in enumerate(tensors)]
        with pytest.raises(TypeError, match="float64"):
            mk.linear_kl_loss(*mixed)
    for engine, dtype in (("f64", torch.float32), ("f32", torch.float64)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="cannot take"):
            force_operands(patch, engine)
            mk.linear_kl_loss(*(x.to(dtype) for x in tensors))
    with pytest.raises(ValueError, match="engine must be one of"):
        mk.plan_linear_kl_loss(64, 100, 8, 8, engine="bf17")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_rows(backend, simd_level):
    for dtypes in [*itertools.product(NARROW, repeat=2), (torch.float64,) * 2]:
        student, teacher = (x.to(t) for x, t in zip(make_rows(5, 131, torch.float64), dtypes, strict=True))
        student.requires_grad_()
        for beta in (0.0, 1.0, 0.3):
            loss = mk.kl_loss(student, teacher, divergence=beta, reduction="none", backend=backend)
            (grad,) = torch.autograd.grad(loss.sum(), student)
            truth, expected = oracle_rows(*to_numpy(student, teacher), beta=beta)
            np.testing.assert_allclose(loss.detach().numpy(), truth, rtol=1e-5)
            assert grad.dtype == student.dtype
            assert relative(grad, expected) <= GRADIENT_BOUND[student.dtype]
    with pytest.raises(TypeError, match="float64"):
        mk.kl_loss(student, teacher.float(), backend=backend)
