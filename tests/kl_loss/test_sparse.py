"""linear_sparse_kl_loss and sparse_kl_loss as users call them: what the outcomes are, and what is refused."""

import math

import pytest
import torch

import minitron_kernels as mk
from kl_loss.problems import make_linear, relative
from minitron_kernels.ops.kl_loss import sparse_rows

N, H, V = 7, 16, 50
BACKENDS = ["reference", pytest.param("native", marks=pytest.mark.native)]


def full_rows(z, log_p, divergence="forward_kl", tau=1.0):
    """The KL of whole rows, in plain torch."""
    log_q, log_p = (z / tau).log_softmax(-1), (log_p / tau).log_softmax(-1)
    if divergence == "reverse_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def teacher(k, *, tau=1.0, seed=1, dtype=torch.float64, spread=2.0):
    """All log-probabilities [N, V] of a teacher, its k likeliest ids with theirs, and the rest at `tau`."""
    g = torch.Generator().manual_seed(seed)
    log_p = (torch.randn(N, V, generator=g, dtype=torch.float64) * spread).log_softmax(-1)
    logprobs, ids = log_p.topk(k, -1)
    rest = torch.ones(N, V, dtype=torch.bool).scatter(1, ids, False)
    tail = (log_p / tau).masked_fill(~rest, -math.inf).logsumexp(-1)
    return log_p.to(dtype), ids, logprobs.to(dtype), tail.to(dtype)


def student(dtype=torch.float64, seed=0):
    hidden, head, *_ = make_linear(N, H, H, V, dtype, seed=seed)
    return hidden.requires_grad_(), head.requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_all_tokens_as_ids_are_the_full_loss(backend, divergence, tau):
    hidden, head = student()
    log_p, ids, logprobs, tail = teacher(V, tau=tau)
    arguments = (hidden, head, ids, logprobs, {tau: tail})
    loss = mk.linear_sparse_kl_loss(*arguments, temperature=tau, divergence=divergence, backend=backend)
    truth = full_rows(hidden @ head.T, log_p, divergence, tau).mean()
    torch.testing.assert_close(loss, truth, rtol=1e-11, atol=0)
    for actual, expected in zip(
        torch.autograd.grad(loss, (hidden, head)), torch.autograd.grad(truth, (hidden, head)), strict=True
    ):
        assert relative(actual, expected.numpy()) < 1e-11


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lower_bound_that_is_exact_where_the_tail_agrees(backend):
    hidden, head = student()
    log_p, ids, logprobs, tail = teacher(5)
    with torch.no_grad():
        z = hidden @ head.T
        loss = mk.linear_sparse_kl_loss(hidden, head, ids, logprobs, tail, reduction="none", backend=backend)
        assert (loss <= full_rows(z, log_p)).all() and (loss > 0).all()
        # a teacher whose tail divides as the student's does
        named = torch.zeros(N, V, dtype=torch.bool).scatter(1, ids, True)
        agrees = torch.where(named, log_p, z.masked_fill(named, -math.inf).log_softmax(-1) + tail[:, None])
        torch.testing.assert_close(loss, full_rows(z, agrees), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_ids_leave_the_cross_entropy_alone(backend):
    """k = 0 and a tail of 1: nothing to learn from the teacher, and a fused linear cross-entropy is left."""
    hidden, head = student()
    labels = torch.arange(N) * 7 % V
    labels[3] = -100
    none = torch.zeros(N, 0, dtype=torch.int64), torch.zeros(N, 0, dtype=torch.float64), torch.zeros(N)
    record = mk.linear_sparse_kl_loss(
        hidden,
        head,
        *none,
        labels=labels,
        ce_weight=1.0,
        label_smoothing=0.2,
        return_parts=True,
        backend=backend,
    )
    truth = torch.nn.functional.cross_entropy(hidden @ head.T, labels, label_smoothing=0.2)
    torch.testing.assert_close(record.loss, truth, rtol=1e-11, atol=0)
    assert record.kl == 0 and record.num_tokens == N - 1
    for actual, expected in zip(
        torch.autograd.grad(record.loss, (hidden, head)),
        torch.autograd.grad(truth, (hidden, head)),
        strict=True,
    ):
        assert relative(actual, expected.numpy()) < 1e-11


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_kl_of_weight_0_is_left_out_though_it_is_infinite(backend, reduction):
    """Reverse KL is, where the ids have all of the teacher's probability."""
    hidden, head = student()
    log_p, ids, _, _ = teacher(5)
    logprobs = log_p.gather(1, ids).log_softmax(-1)
    labels = torch.arange(N) * 7 % V
    rest = (ids, logprobs, torch.full((N,), -math.inf, dtype=torch.float64))
    options = {"labels": labels, "kl_weight": 0.0, "ce_weight": 1.0, "divergence": "reverse_kl"}
    options |= {"reduction": reduction, "backend": backend}
    truth = torch.nn.functional.cross_entropy(hidden @ head.T, labels, reduction=reduction)
    expected = torch.autograd.grad(truth.sum(), (hidden, head))
    linear = mk.linear_sparse_kl_loss(hidden, head, *rest, **options)
    rows = mk.sparse_kl_loss(hidden @ head.T, *rest, **options)
    for loss in (linear, rows):
        torch.testing.assert_close(loss, truth, rtol=1e-11, atol=0)
        for actual, grad in zip(torch.autograd.grad(loss.sum(), (hidden, head)), expected, strict=True):
            assert relative(actual, grad.numpy()) < 1e-11


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_padded_row_is_the_row_without_padding(backend):
    hidden, head = student()
    log_p, ids, logprobs, _ = teacher(6)
    few = ids.clone()
    few[2, 3:] = -1
    few[4, :] = -1
    junk = logprobs.clone()
    junk[2, 3:], junk[4] = math.nan, math.inf
    rest = torch.ones(N, V + 1, dtype=torch.bool).scatter(1, few.where(few >= 0, V), False)[:, :V]
    tail = log_p.masked_fill(~rest, -math.inf).logsumexp(-1)
    # padding may stand anywhere, and ids in any order
    turned = few.flip(1), junk.flip(1), tail
    loss = mk.linear_sparse_kl_loss(hidden, head, *turned, reduction="none", backend=backend)
    alone = mk.linear_sparse_kl_loss(
        hidden[2:3], head, few[2:3, :3], logprobs[2:3, :3], tail[2:3], reduction="none", backend=backend
    )
    torch.testing.assert_close(loss[2], alone[0], rtol=1e-12, atol=0)
    assert loss[4] == 0
    (grad,) = torch.autograd.grad(loss[4], hidden)
    assert (grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampled_ids_have_the_gradient_of_the_full_loss_on_average(backend):
    """Over all samples of one id, weighted by how often each comes: q - p exactly."""
    hidden, head = student()
    log_p, *_ = teacher(1)
    expected = torch.autograd.grad(full_rows(hidden @ head.T, log_p).sum(), hidden)[0]
    average = torch.zeros_like(expected)
    for v in range(V):
        ids, weight = torch.full((N, 1), v), torch.zeros(N, 1, dtype=torch.float64)
        loss = mk.linear_sparse_kl_loss(hidden, head, ids, weight, None, reduction="none", backend=backend)
        (grad,) = torch.autograd.grad((loss * log_p[:, v].exp()).sum(), hidden)
        average += grad
    torch.testing.assert_close(average, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_sampled_ids_are_normalised(backend):
    hidden, head = student()
    _, ids, logprobs, _ = teacher(4)
    losses = [
        mk.linear_sparse_kl_loss(hidden, head, ids, logprobs + shift, None, backend=backend)
        for shift in (0.0, 3.0)
    ]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    weights = logprobs.softmax(-1)
    log_q = (hidden @ head.T).log_softmax(-1).gather(1, ids)
    torch.testing.assert_close(losses[0], (weights * (weights.log() - log_q)).sum(1).mean())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["id", "tail"])
def test_smoothing_over_a_masked_out_token(backend, where):
    """Of such a token log p is -inf, and so is the mean; its gradient is 0, and that of others finite."""
    hidden, head = student()
    _, ids, logprobs, tail = teacher(4)
    token = int(ids[2, 1]) if where == "id" else next(v for v in range(V) if not (ids == v).any())
    bias = torch.zeros(V, dtype=torch.float64)
    bias[token] = -math.inf
    bias.requires_grad_()
    labels = (torch.arange(N) + token + 1) % V
    setup = {
        "student_bias": bias,
        "labels": labels,
        "ce_weight": 1.0,
        "return_parts": True,
        "backend": backend,
    }
    setup |= {"kl_weight": 0.0, "reduction": "none"}
    plain = mk.linear_sparse_kl_loss(hidden, head, ids, logprobs, tail, **setup)
    smooth = mk.linear_sparse_kl_loss(hidden, head, ids, logprobs, tail, label_smoothing=0.1, **setup)
    assert plain.ce.isfinite().all() and (smooth.ce == math.inf).all()
    (grad,) = torch.autograd.grad(smooth.loss.sum(), bias)
    assert grad.isfinite().all() and grad[token] == 0 and (grad != 0).sum() == V - 1


OPTIONS = {
    "temperature": 2.0,
    "temperature_squared": True,
    "labels": torch.tensor([5, 1, 2, -100, 4, 49, 6]),
    "ce_weight": 0.5,
    "kl_weight": 2.0,
    "label_smoothing": 0.1,
    "token_weights": torch.linspace(0.5, 1, N),
    "return_parts": True,
    "student_softcap": 5.0,
}


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_from_logits(monkeypatch, dtype, reduction, divergence):
    """Some rows at a time, padding columns behind them, a masked-out token, against float64."""
    monkeypatch.setitem(sparse_rows._CHUNK_BYTES, "cpu", 3 * 4 * (V + 1))
    hidden, head = student()
    logits = torch.nn.functional.pad((hidden @ head.T).detach(), (0, 3), value=math.nan).to(dtype)
    logits[1, 7] = -math.inf
    _, ids, logprobs, tail = teacher(5, tau=2.0)
    ids[2, 1:] = -1
    tail[2] = torch.log(1 - logprobs[2, :1].exp().sum()) - 0.1
    setup = {**OPTIONS, "reduction": reduction, "divergence": divergence, "vocab_size": V}
    results = []
    for z, backend in ((logits, "native"), (logits.double(), "reference")):
        z = z.clone().requires_grad_()
        record = mk.sparse_kl_loss(z, ids, logprobs, {1.0: tail, 2.0: tail}, backend=backend, **setup)
        (grad,) = torch.autograd.grad((record.loss * torch.arange(1, N + 1)).sum(), z)
        results.append((record, grad))
    (record, grad), (truth, true_grad) = results
    rounds = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    for x, y in zip(record, truth, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=rounds, atol=rounds)
    assert (grad[:, V:] == 0).all() and grad[1, 7] == 0
    assert relative(grad[:, :V], true_grad[:, :V].numpy()) < max(rounds, 3e-3 * (dtype == torch.bfloat16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_smoothing_and_a_label_that_is_masked_out(backend):
    """The label's own part has no weight then; the mean over all tokens is infinite."""
    hidden, head = student()
    logits = (hidden @ head.T).detach()
    logits[1, 7] = -math.inf
    labels = torch.full((N,), 7)
    setup = {"labels": labels, "ce_weight": 1.0, "kl_weight": 0.0, "label_smoothing": 1.0}
    setup |= {"return_parts": True, "reduction": "none", "backend": backend}
    record = mk.sparse_kl_loss(logits, *teacher(3)[1:], **setup)
    assert record.ce[1] == math.inf and record.ce.isfinite().sum() == N - 1


@pytest.mark.native
def test_from_logits_and_from_hidden_states():
    hidden, head = student()
    _, ids, logprobs, tail = teacher(5, tau=2.0)
    a = mk.linear_sparse_kl_loss(hidden, head, ids, logprobs, {2.0: tail}, **OPTIONS)
    b = mk.sparse_kl_loss(hidden @ head.T, ids, logprobs, {1.0: tail, 2.0: tail}, **OPTIONS)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(a.loss.detach(), 2.0 * a.kl + 0.5 * a.ce)


def broken(**changes):
    hidden, head = student(torch.float32)
    _, ids, logprobs, tail = teacher(4, dtype=torch.float32)
    arguments = {
        "student_hidden": hidden,
        "student_head": head,
        "ids": ids,
        "logprobs": logprobs,
        "log_tail": tail,
    }
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return arguments


def at(row, column, value):
    def change(x):
        x = x.clone()
        x[row, column] = value
        return x

    return change


def tail_at(row, value):
    def change(x):
        x = x.clone()
        x[row] = value
        return x

    return change


BAD = [
    ({"ids": at(3, 1, V)}, ValueError, r"ids must be -1 or in \[0, 50\); got 50 in row 3"),
    ({"ids": at(5, 0, -2)}, ValueError, r"ids must be -1 or in \[0, 50\); got -2 in row 5"),
    ({"ids": lambda x: x[:, [0, 1, 2, 2]]}, ValueError, r"ids must differ within a token's; got .* in row 0"),
    ({"logprobs": at(2, 0, math.nan)}, ValueError, r"logprobs .* got nan in row 2"),
    ({"logprobs": at(2, 0, 0.5)}, ValueError, r"logprobs .* got 0.5 in row 2"),
    ({"log_tail": tail_at(6, math.nan)}, ValueError, r"must sum to 1; got nan in row 6"),
    ({"log_tail": tail_at(1, 0.0)}, ValueError, r"must sum to 1; got 1.\d* in row 1"),
    ({"log_tail": tail_at(1, -math.inf)}, ValueError, r"must sum to 1; got 0.\d* in row 1"),
    (
        {"log_tail": None, "logprobs": at(4, slice(None), -math.inf)},
        ValueError,
        r"weight above 0; got 0 in row 4",
    ),
    ({"log_tail": None, "divergence": "reverse_kl"}, ValueError, r"log_tail=None.*forward_kl"),
    ({"log_tail": None, "temperature": 2.0}, ValueError, r"log_tail=None.*temperature=1"),
    ({"temperature": 2.0}, ValueError, r"declared for temperature 1.0, but the loss is at 2.0"),
    ({"log_tail": lambda x: {0.0: x}}, ValueError, r"a temperature of log_tail must be finite and greater"),
    (
        {"log_tail": lambda x: {2.0: x + 9}, "temperature": 2.0},
        ValueError,
        r"at most log\(vocab_size\).* row 0",
    ),
    ({"log_tail": lambda x: x[:3]}, ValueError, r"log_tail must have shape \(7,\).*got \(3,\)"),
    ({"log_tail": 0.5}, TypeError, r"log_tail must be a torch.Tensor, got float"),
    ({"ids": lambda x: x[:, :3]}, ValueError, r"ids and logprobs differ in shape"),
    ({"ids": lambda x: x.float()}, TypeError, r"ids must be int64 or int32, got torch.float32"),
    ({"ids": lambda x: x[:3]}, ValueError, r"ids must be \[..., k\] with \(7,\) before k, got \(3, 4\)"),
    ({"logprobs": lambda x: x.long()}, TypeError, r"logprobs must be floating point"),
    ({"ce_weight": 1.0}, ValueError, r"ce_weight=1.0 needs labels"),
    ({"vocab_size": V + 1}, ValueError, r"vocab_size must be from 1 to 50"),
    ({"schedule": "other"}, ValueError, r"schedule must be one of"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[" ".join(c[0]) for c in BAD])
def test_what_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        mk.linear_sparse_kl_loss(**broken(**changes))


def test_entries_of_tokens_that_do_not_count_are_not_looked_at():
    good, bad = broken(), broken(ids=at(3, 0, V + 9), logprobs=at(3, 1, math.nan), log_tail=tail_at(3, 5.0))
    mask = torch.arange(N) != 3
    assert torch.equal(*(mk.linear_sparse_kl_loss(**x, mask=mask) for x in (good, bad)))
    weights = mask.float()
    assert torch.equal(*(mk.linear_sparse_kl_loss(**x, token_weights=weights) for x in (good, bad)))


@pytest.mark.native
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plans(device):
    """No logits of a teacher: a GEMM less, and half of the logits' memory."""
    shape = (512, 32768, 1024)
    plans = {
        schedule: [
            mk.plan_linear_kl_loss(
                *shape, Ht, sparse_ids=ids, schedule=schedule, device=device, workspace_bytes=1 << 32
            )
            for Ht, ids in ((1024, None), (0, 128))
        ]
        for schedule in ("store", "recompute")
    }
    assert [[plan.num_gemms for plan in pair] for pair in plans.values()] == [[4, 3], [6, 4]]
    dense, sparse = plans["store"]
    assert sparse.part_bytes[0] < 0.51 * dense.part_bytes[0] and sparse.flops == 0.75 * dense.flops
    with pytest.raises(ValueError, match="sparse_ids must be at least 0, and teacher_hidden_size 0"):
        mk.plan_linear_kl_loss(*shape, 1024, sparse_ids=128, device=device)
