"""Every combination of operand dtypes is computed from the values given, whatever the kept workspace held."""

import itertools

import numpy as np
import pytest
import torch
from _oracle import oracle_linear, oracle_rows
from _problems import force_operands, make_linear, make_rows, relative, to_numpy

import minitron_kernels as mk
from minitron_kernels.ops.kl_loss.plan import operand_type

pytestmark = pytest.mark.native
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
QUADRUPLES = list(itertools.product(FLOATS, repeat=4))
# of a gradient, by the dtype that it is rounded to
ROUNDED = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 1e-3}


def check_linear(dtypes, seed, with_bias, schedule, operands):
    N, H, Ht, V = 37, 33, 45, 203
    tensors = [
        x.to(dtype) for x, dtype in zip(make_linear(N, H, Ht, V, dtypes[0], seed=seed), dtypes, strict=True)
    ]
    bias = torch.linspace(-2, 2, V).to(torch.float64 if torch.float64 in dtypes else torch.float32)
    bias = bias.requires_grad_() if with_bias else None
    hidden, head = (x.requires_grad_() for x in tensors[:2])
    loss = mk.linear_kl_loss(*tensors, student_bias=bias, reduction="sum", schedule=schedule)
    loss.backward()
    rows, *grads = oracle_linear(*to_numpy(*tensors), student_bias=to_numpy(bias)[0])
    wide = torch.float64 in dtypes
    assert loss.item() == pytest.approx(rows.sum(), rel=1e-11 if wide else 1e-5)
    for x, truth in zip((hidden, head, bias), grads, strict=True):
        if x is None:
            continue
        assert x.grad.dtype == x.dtype
        bound = 3e-3 if operands else ROUNDED[x.dtype]
        assert relative(x.grad, truth) <= bound, (dtypes, x.dtype)
    with torch.no_grad():
        again = mk.linear_kl_loss(*tensors, student_bias=bias, reduction="none", schedule=schedule)
    np.testing.assert_allclose(again.double().numpy(), rows, rtol=1e-11 if wide else 1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", ["store", "recompute"])
@pytest.mark.parametrize("engine", [None, "portable"])
def test_quadruples(monkeypatch, engine, schedule):
    """In turn, each with other values: a packing that did nothing would use those of the call before."""
    force_operands(monkeypatch, engine)
    for seed, dtypes in enumerate(QUADRUPLES):
        check_linear(dtypes, seed, seed % 2 == 1, schedule, None)
    check_linear((torch.float64,) * 4, 99, True, schedule, None) if engine is None else None


@pytest.mark.parametrize("engine", ["bf16", "portable_bf16"])
def test_bf16_operands(monkeypatch, engine):
    force_operands(monkeypatch, engine)
    for seed in range(2):
        check_linear((torch.bfloat16,) * 4, seed, seed == 1, "store", engine)


def test_bf16_operands_are_for_bf16_alone(monkeypatch):
    """An engine that cannot hold an operand's values refuses it; it does not round or skip it."""
    force_operands(monkeypatch, "portable_bf16")
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")
    for index, name in enumerate(names):
        for dtype in (torch.float32, torch.float16):
            tensors = make_linear(5, 8, 8, 70, torch.bfloat16)
            tensors[index] = tensors[index].to(dtype)
            with pytest.raises(RuntimeError, match=f"portable_bf16 cannot take {name}"):
                mk.linear_kl_loss(*tensors)


def test_bf16_operands_are_chosen_where_all_four_are_bf16():
    for dtypes in QUADRUPLES:
        chosen = operand_type(*dtypes)
        assert chosen == "f32" or set(dtypes) == {torch.bfloat16}


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_pairs_of_logits(backend):
    for seed, (one, other) in enumerate([*itertools.product(FLOATS, repeat=2), (torch.float64,) * 2]):
        student, teacher = make_rows(5, 301, torch.float64, seed=seed)
        student, teacher = student.to(one).requires_grad_(), teacher.to(other)
        loss = mk.kl_loss(student, teacher, reduction="none", backend=backend)
        loss.sum().backward()
        rows, grad = oracle_rows(*to_numpy(student, teacher))
        wide = one == torch.float64
        np.testing.assert_allclose(loss.detach().double().numpy(), rows, rtol=1e-11 if wide else 3e-5)
        assert student.grad.dtype == one and relative(student.grad, grad) <= ROUNDED[one]
