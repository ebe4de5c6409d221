"""return_parts and ce_weight where terms are infinite, masked out, nearly 0 or not there."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import minitron_kernels as mk
from kl_loss.oracle import oracle_metrics
from kl_loss.problems import force_plan, make_linear, make_rows, relative, to_numpy
from kl_loss.record_truth import BACKENDS, WEIGHTS, both

pytestmark = pytest.mark.native


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_weight_on_the_kl(backend, reduction):
    """The gradient is the cross-entropy's alone, even where the KL is infinite."""
    N, V = 20, 40
    tensors = make_linear(N, 16, 20, V, torch.float64)
    labels = torch.arange(N) % V
    teacher_bias = torch.zeros(V, dtype=torch.float64)
    teacher_bias[7] = -math.inf
    for divergence, bias in (("forward_kl", None), ("reverse_kl", teacher_bias), ("jsd", None)):
        hidden, head = (x.clone().requires_grad_() for x in tensors[:2])
        options = {"labels": labels, "divergence": divergence, "teacher_bias": bias, "backend": backend}
        weights = {"kl_weight": 0.0, "ce_weight": 1.0, "reduction": reduction}
        loss = mk.linear_kl_loss(hidden, head, *tensors[2:], **options, **weights)
        own = [x.clone().requires_grad_() for x in tensors[:2]]
        expected = F.cross_entropy(own[0] @ own[1].T, labels, reduction=reduction)
        assert torch.allclose(loss, expected, rtol=1e-12)
        if backend == "reference" and bias is not None:
            continue  # autograd multiplies the infinite KL's gradient by 0
        loss.sum().backward(), expected.sum().backward()
        assert all(relative(a.grad, b.grad.numpy()) < 1e-12 for a, b in zip((hidden, head), own, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("temperature", "smoothing"), [(1.0, 0.0), (2.0, 0.0), (1.0, 1.0)])
def test_masked_out_tokens(backend, temperature, smoothing):
    """They add nothing to the entropy and get no gradient; as a label such a token costs infinitely much."""
    N, V = 12, 1100
    student, teacher = make_rows(N, V, torch.float64)
    gone = torch.zeros(V, dtype=torch.bool)
    gone[:1030:2] = True  # half of the first block
    gone[1040:1048] = True  # a vector
    student[:, gone] = teacher[:, gone] = -math.inf
    student[4, :1030] = teacher[4, :1030] = -math.inf  # a block without any
    labels = torch.full((N,), 1035)
    labels[2] = 1042
    options = {"labels": labels, "temperature": temperature, "backend": backend, "return_parts": True}
    options["label_smoothing"] = smoothing
    if smoothing == 1 and backend == "reference":
        return  # 0 * inf, as in F.cross_entropy
    ce, entropy, logprob, dz = oracle_metrics(*to_numpy(student), labels.numpy(), label_smoothing=smoothing)
    assert np.isinf(ce).sum() == (N if smoothing else 1) and np.isfinite(entropy).all()
    learning = student.clone().requires_grad_()
    record = mk.kl_loss(learning, teacher, ce_weight=1.0, kl_weight=0.0, reduction="none", **options)
    for term, rows in zip(record[2:5], (ce, entropy, logprob), strict=True):
        np.testing.assert_allclose(term.numpy(), rows, rtol=1e-11)
    finite = torch.isfinite(record.ce)
    record.loss[finite].sum().backward() if backend == "reference" else record.loss.sum().backward()
    assert not learning.grad.isnan().any() and (learning.grad[:, gone] == 0).all()
    assert relative(learning.grad[finite], dz[finite.numpy()]) < 1e-12
    if backend == "native":  # p of the tokens that are left
        assert relative(learning.grad[2], dz[2]) < 1e-12


@pytest.mark.parametrize("schedule", ["store", "recompute"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_masked_out_tiles(monkeypatch, schedule, temperature):
    """A tile whose tokens are all masked out; a label in it; a NaN that stays in its row."""
    force_plan(monkeypatch, tile=64, tile_group=2)
    N, V = 70, 250
    tensors = make_linear(N, 16, 20, V, torch.float64)
    tensors[0][9] = math.nan
    bias = torch.zeros(V, dtype=torch.float64)
    bias[:64] = bias[70:75] = -math.inf
    labels = torch.arange(N) % 100 + 100
    labels[3], labels[4] = 20, 72
    X, W, *_ = to_numpy(*tensors)
    ce, entropy, logprob, dz = oracle_metrics(X @ W.T + bias.numpy(), labels.numpy())
    hidden, head, student_bias = (x.clone().requires_grad_() for x in (*tensors[:2], bias))
    record = mk.linear_kl_loss(
        hidden, head, *tensors[2:], student_bias=student_bias, teacher_bias=bias, labels=labels,
        temperature=temperature, schedule=schedule, kl_weight=0.0, ce_weight=1.0, reduction="none",
        return_parts=True,
    )  # fmt: skip
    for term, rows in zip(record[2:5], (ce, entropy, logprob), strict=True):
        np.testing.assert_allclose(term.numpy(), rows, rtol=1e-11)
    assert np.isinf(ce[3]) and np.isinf(ce[4]) and np.isnan(ce[9]) and np.isfinite(ce).sum() == N - 3
    record.loss.sum().backward()
    keep = np.arange(N) != 9
    assert relative(hidden.grad[torch.from_numpy(keep)], (dz @ W)[keep]) < 1e-11


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [0.0, 4096.0])
def test_digits(backend, offset):
    """Logits far from 0, and a label that is nearly certain: nothing is subtracted that should not be."""
    g = torch.Generator().manual_seed(0)
    student = torch.randn(8, 2000, generator=g).round(decimals=1) * 8
    student[:, 3] = student.amax(1) + 12
    student, labels = student + offset, torch.full((8,), 3)
    record = mk.kl_loss(
        student, student, labels=labels, label_smoothing=0.1, reduction="none", return_parts=True,
        backend=backend,
    )  # fmt: skip
    ce, entropy, logprob, _ = oracle_metrics(*to_numpy(student), labels.numpy(), label_smoothing=0.1)
    np.testing.assert_allclose(record.ce.numpy(), ce, rtol=1e-6)
    floor = 2e-7 if backend == "native" else 1e-6  # an ulp of 1 in the sum of exponentials
    np.testing.assert_allclose(record.entropy.numpy(), entropy, rtol=1e-5, atol=floor)
    np.testing.assert_allclose(record.label_logprob.numpy(), logprob, rtol=1e-5, atol=floor)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_counts(backend):
    for N in (5, 0):
        tensors = make_linear(max(N, 1), 16, 20, 40, torch.float32)
        tensors[0], tensors[2] = tensors[0][:N], tensors[2][:N]
        tensors[0][:] = math.nan
        for function, learning in both(backend, tensors):
            labels = torch.full((N,), -100)
            record = function(*learning, labels=labels, return_parts=True, **WEIGHTS)
            assert all(term.item() == 0 for term in record)
            record.loss.backward()
            assert all((x.grad == 0).all() for x in learning)


def test_without_labels():
    tensors = make_linear(20, 16, 20, 40, torch.float32)
    for function, learning in both("native", tensors):
        record = function(*learning, return_parts=True)
        assert record.ce is None and record.label_logprob is None and record.num_tokens.item() == 20
        assert torch.equal(record.loss, function(*learning)) and record.entropy > 0
        with torch.no_grad():
            assert torch.equal(function(*learning, return_parts=True).entropy, record.entropy)
