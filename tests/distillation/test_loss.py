"""DistillationLoss against full logits and full states in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from distillation.hidden_oracle import hidden_loss, kl_loss
from minitron_kernels.distillation import DenseSignal, DistillationLoss, HiddenStatesLoss, SparseSignal

LAYERS = {0: 1, 1: 3}
V, H, HT = 17, 6, 9


def signals(dtype=torch.float64, shape=(2, 5), seed=0):
    """A student that needs gradients, and a teacher; the tensors that need them."""
    torch.manual_seed(seed)
    head = torch.randn(V, H, dtype=dtype).requires_grad_()
    xs = [torch.randn(*shape, H, dtype=dtype).requires_grad_() for _ in range(3)]
    student = DenseSignal(xs[0], head, layers={i: x for i, x in zip(LAYERS, xs[1:], strict=True)})
    layers = {j: torch.randn(*shape, HT, dtype=dtype) for j in LAYERS.values()}
    teacher = DenseSignal(
        torch.randn(*shape, HT, dtype=dtype), torch.randn(V, HT, dtype=dtype), softcap=5.0, layers=layers
    )
    return student, teacher, [head, *xs]


def logits_of(signal):
    z = signal.hidden @ signal.head.T
    return z if signal.softcap is None else signal.softcap * (z / signal.softcap).tanh()


def sparse_of(teacher, k=5):
    log_p = logits_of(teacher).float().log_softmax(-1)
    logprobs, ids = log_p.topk(k)
    tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return SparseSignal(ids, logprobs, tail, teacher.layers)


def hidden_module(dtype=torch.float64, **options):
    torch.manual_seed(7)
    return HiddenStatesLoss(LAYERS, student_width=H, teacher_width=HT, **options).to(dtype)


def labels_of(shape=(2, 5)):
    labels = torch.arange(shape[0] * shape[1]).view(shape) % V
    labels[0, :2] = -100
    return labels


def oracle(student, teacher, weight, labels, count, alpha, kl_weight=1.0, ce_weight=0.0, layers=LAYERS):
    """(loss, kl, hidden, alpha) of full tensors; alpha None: dynamic."""
    valid = labels != -100
    logits = logits_of(student)
    kl = kl_loss(logits, logits_of(teacher), valid, count)
    pairs = [(student.layers[i], teacher.layers[j]) for i, j in layers.items()]
    hidden = hidden_loss(pairs, valid=valid, num_items=count, weight=weight)
    if alpha is None:
        alpha = (kl_weight * kl / hidden).detach()
    loss = kl_weight * kl + alpha * hidden
    if ce_weight:
        loss = loss + ce_weight * F.cross_entropy(logits[valid], labels[valid], reduction="sum") / count
    return loss, kl, hidden, alpha


@pytest.mark.parametrize("hidden_weight", [0.5, "dynamic"])
def test_loss_and_gradients(hidden_weight):
    student, teacher, leaves = signals()
    labels = labels_of()
    for options in ({}, {"kl_weight": 0.7, "ce_weight": 0.3}):
        for count in (None, 3.5):
            loss = DistillationLoss(
                hidden_states=hidden_module(), hidden_weight=hidden_weight, backend="reference", **options
            )
            weight = loss.hidden_states.map.weight
            record = loss(student, teacher, labels, num_items=count)
            alpha = None if hidden_weight == "dynamic" else hidden_weight
            truth = oracle(student, teacher, weight, labels, count or 8, alpha, **options)
            torch.testing.assert_close(record.loss, truth[0])
            torch.testing.assert_close(record.kl, truth[1].detach())
            torch.testing.assert_close(record.hidden, truth[2].detach())
            torch.testing.assert_close(record.hidden_weight, torch.as_tensor(truth[3]).double())
            assert record.num_tokens == 8
            assert not any(x is not None and x.requires_grad for x in record[1:])
            actual = torch.autograd.grad(record.loss, [*leaves, weight])
            wanted = torch.autograd.grad(truth[0], [*leaves, weight])
            for grad, right in zip(actual, wanted, strict=True):
                torch.testing.assert_close(grad, right)


def test_kernels_and_a_sparse_teacher():
    student, teacher, leaves = signals(torch.float32)
    sparse = sparse_of(teacher, k=V)  # all tokens: the whole KL
    loss = DistillationLoss(hidden_states=hidden_module(torch.float32))
    weight = loss.hidden_states.map.weight
    for signal in (teacher, sparse):
        record = loss(student, signal, labels_of())
        truth = oracle(student, teacher, weight, labels_of(), 8, None)[0]
        torch.testing.assert_close(record.loss, truth, rtol=1e-4, atol=1e-5)
        actual = torch.autograd.grad(record.loss, [*leaves, weight])
        wanted = torch.autograd.grad(truth, [*leaves, weight])
        for grad, right in zip(actual, wanted, strict=True):
            torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-5)


def test_without_hidden_states_nothing_is_added():
    student, teacher, _ = signals(torch.float32)
    loss = DistillationLoss()
    record = loss(student, teacher, labels_of())
    assert record.hidden is None and record.hidden_weight is None
    assert torch.equal(record.loss.detach(), record.kl)
    assert loss.student_layers == loss.teacher_layers == () and not list(loss.parameters())
    assert repr(loss) == "DistillationLoss()"


def test_dynamic_weight_of_what_is_zero_or_not_finite():
    student, teacher, leaves = signals()
    loss = DistillationLoss(hidden_states=HiddenStatesLoss({0: 0}), backend="reference")
    same = DenseSignal(teacher.hidden, teacher.head, layers={0: student.layers[0].detach()})
    record = loss(DenseSignal(student.hidden, student.head, layers=student.layers), same)
    assert record.hidden == 0 and record.hidden_weight == 0 and torch.equal(record.loss.detach(), record.kl)
    grads = torch.autograd.grad(record.loss, leaves[:3])
    assert all(grad.isfinite().all() for grad in grads) and not grads[2].any()
    record = loss(student, same, torch.full((2, 5), -100), num_items=4)  # no token counts
    assert record.loss == record.hidden == record.hidden_weight == 0
    assert loss._weight(torch.tensor(torch.inf), torch.tensor(0.5)) == 0
    student.layers[0].data[1, 1, 0] = torch.nan  # not hidden by a weight of 0
    assert loss(student, same).loss.isnan()
