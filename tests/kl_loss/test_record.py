"""return_parts, ce_weight, label_smoothing, token_weights on the CPU against the definition in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import minitron_kernels as mk
from kl_loss.oracle import oracle_linear, oracle_metrics, oracle_rows
from kl_loss.problems import (
    GRADIENT_BOUND,
    force_operands,
    force_plan,
    make_linear,
    make_rows,
    relative,
    threads,
    to_numpy,
)
from kl_loss.record_truth import (
    BACKENDS,
    CASES,
    WEIGHTS,
    Batch,
    arguments,
    assert_gradients,
    both,
    linear_truth,
    rows_truth,
    run_linear,
)

pytestmark = pytest.mark.native


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_rows(backend, dtype, case):
    """Three blocks of a row, each raising the maximum, and padding."""
    N, V = 23, 2501
    batch = Batch(N, V)
    student, teacher = make_rows(N, V + 6, dtype, rising=True)
    learning = student.clone().requires_grad_()
    record = mk.kl_loss(
        learning, teacher[:, : V + 2], vocab_size=V, return_parts=True, backend=backend,
        **WEIGHTS, **arguments(case), **batch.options,
    )  # fmt: skip
    record.loss.backward()
    kl, metrics, grad = rows_truth(*to_numpy(student, teacher), batch, case, vocab_size=V)
    batch.assert_record(record, kl, metrics, dtype)
    assert relative(learning.grad, grad) <= GRADIENT_BOUND[dtype]
    assert (learning.grad[:, V:] == 0).all() and (learning.grad[~torch.from_numpy(batch.counted)] == 0).all()


ENGINES = [
    (torch.float64, None),
    (torch.float32, None),
    (torch.bfloat16, "bf16"),
    (torch.bfloat16, "portable_bf16"),
    (torch.bfloat16, "f32"),
]


@pytest.mark.parametrize(("dtype", "operands"), ENGINES)
@pytest.mark.parametrize("schedule", ["store", "recompute"])
@pytest.mark.parametrize("case", CASES)
def test_linear(monkeypatch, dtype, operands, schedule, case):
    """Chunks that do not divide, tiles kept and made twice, a bias that raises the maximum tile by tile."""
    force_operands(monkeypatch, operands)
    made = force_plan(monkeypatch, chunk_rows=64, tile=128, tile_group=3, stored_tiles=5)
    N, V = 171, 1157
    batch, tensors = Batch(N, V), make_linear(N, 35, 43, V, dtype)
    bias = torch.linspace(-9, 9, V, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    record, grads = run_linear(
        tensors, bias, schedule=schedule, backend="native", **WEIGHTS, **arguments(case), **batch.options
    )
    kl, metrics, truths = linear_truth(tensors, batch, case, bias)
    assert made[0].num_chunks > 1
    batch.assert_record(record, kl, metrics, dtype)
    assert_gradients(grads, truths, dtype)


@pytest.mark.parametrize("case", CASES)
def test_linear_reference(case):
    batch, tensors = Batch(300, 90), make_linear(300, 20, 24, 90, torch.float64)
    options = {"backend": "reference", **WEIGHTS, **arguments(case), **batch.options}
    record, grads = run_linear(tensors, torch.zeros(90, dtype=torch.float64), **options)
    kl, metrics, truths = linear_truth(tensors, batch, case)
    batch.assert_record(record, kl, metrics, torch.float64)
    assert_gradients(grads, truths, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_simd_level(simd_level, dtype):
    N, V = 70, 333
    batch, tensors = Batch(N, V), make_linear(N, 33, 40, V, dtype)
    for case in (CASES[0], CASES[1], CASES[5]):
        record, grads = run_linear(tensors, **WEIGHTS, **arguments(case), **batch.options)
        kl, metrics, truths = linear_truth(tensors, batch, case)
        batch.assert_record(record, kl, metrics, dtype)
        assert_gradients(grads, truths, dtype)
        student, teacher = make_rows(N, V, dtype)
        learning = student.clone().requires_grad_()
        record = mk.kl_loss(
            learning, teacher, return_parts=True, **WEIGHTS, **arguments(case), **batch.options
        )
        record.loss.backward()
        kl, metrics, grad = rows_truth(*to_numpy(student, teacher), batch, case)
        batch.assert_record(record, kl, metrics, dtype)
        assert relative(learning.grad, grad) <= GRADIENT_BOUND[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", 13])
def test_reductions(backend, reduction):
    """The loss is the sum of its parts, each reduced alike; and so are the gradients."""
    N, V = 60, 70
    batch, tensors = Batch(N, V), make_linear(N, 16, 20, V, torch.float64)
    how = {"reduction": reduction} if isinstance(reduction, str) else {"num_items": reduction}
    how |= {"temperature": 2.0, "temperature_squared": True, **batch.options}
    divisor = {"mean": batch.counted.sum(), "sum": 1, "none": 1, 13: 13}[reduction]
    w = batch.row_weight() * batch.counted.sum() / divisor
    incoming = torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    incoming = incoming if reduction == "none" else torch.tensor(0.7, dtype=torch.float64)
    case = ("forward_kl", 2.0, 0.0, None)
    kl, (ce, entropy, logprob, _), _ = linear_truth(tensors, batch, case)
    for function, learning in both(backend, tensors):
        record = function(*learning, return_parts=True, **WEIGHTS, **how)
        for term, rows in zip(record[1:5], (4 * kl, ce, entropy, logprob), strict=True):
            expected = w * rows if reduction == "none" else (w * rows).sum()
            np.testing.assert_allclose(term.numpy(), expected, rtol=1e-12)
        expected = WEIGHTS["kl_weight"] * record.kl + WEIGHTS["ce_weight"] * record.ce
        assert torch.allclose(record.loss, expected, rtol=1e-12)
        assert torch.equal(function(*learning, **WEIGHTS, **how), record.loss)
        record.loss.backward(incoming)
        total = w * np.broadcast_to(incoming.numpy(), N)
        if len(learning) == 2:
            _, *truths = oracle_linear(
                *to_numpy(*tensors), inv_tau=0.5, row_weight=4 * 0.3 * total, ce_weight=0.7 * total,
                labels=batch.targets,
            )  # fmt: skip
        else:
            zs, zt = to_numpy(learning[0], tensors[2] @ tensors[3].T)
            dz = 4 * 0.3 * oracle_rows(zs, zt, inv_tau=0.5)[1] + 0.7 * oracle_metrics(zs, batch.targets)[3]
            truths = [dz * total[:, None]]
        for x, truth in zip(learning, truths, strict=False):
            assert relative(x.grad, truth) <= 1e-11


@pytest.mark.parametrize("backend", BACKENDS)
def test_against_plain_torch(backend):
    """What one would write with F.cross_entropy and F.kl_div, to the last bits."""
    N, V, tau = 40, 50, 2.0
    tensors = make_linear(N, 16, 20, V, torch.float64)
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(2))
    labels[::4] = -100
    own = [x.clone().requires_grad_() for x in tensors[:2]]
    z, t = own[0] @ own[1].T, tensors[2] @ tensors[3].T
    ce = F.cross_entropy(z, labels, label_smoothing=0.1)
    log_s, log_t = (torch.log_softmax(x[labels >= 0] / tau, -1) for x in (z, t))
    kl = F.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
    *expected, of_logits = torch.autograd.grad(0.5 * kl + 1.5 * ce, [*own, z])
    weights = {"kl_weight": 0.5, "ce_weight": 1.5, "label_smoothing": 0.1}
    for function, learning in both(backend, tensors):
        record = function(*learning, labels=labels, temperature=tau, return_parts=True, **weights)
        assert record.kl.item() == pytest.approx(kl.item(), rel=1e-12)
        assert record.ce.item() == pytest.approx(ce.item(), rel=1e-12)
        grads = torch.autograd.grad(record.loss, learning)
        truths = expected if len(learning) == 2 else [of_logits]
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-14) for a, b in zip(grads, truths, strict=True))


@pytest.mark.parametrize("schedule", ["store", "recompute"])
def test_bits(monkeypatch, schedule):
    """Any number of threads gives the same; and the KL beside other parts is the KL alone."""
    N, V = 200, 1500
    batch, tensors = Batch(N, V), make_linear(N, 32, 40, V, torch.float32)
    for temperature in (1.0, 2.0):
        results = []
        for count in (1, 2, 3):
            with threads(count):
                force_plan(monkeypatch, chunk_rows=128, tile=128, tile_group=4, stored_tiles=7)
                options = {"temperature": temperature, "schedule": schedule, **batch.options}
                record, grads = run_linear(tensors, **WEIGHTS, **options)
                results.append([*record, *grads[:2]])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        parts, grads = run_linear(tensors, **options)
        plain = [x.clone().requires_grad_() for x in tensors[:2]]
        loss = mk.linear_kl_loss(*plain, *tensors[2:], **options)
        loss.backward()
        assert torch.equal(loss, parts.loss) and torch.equal(parts.kl, loss)
        assert all(torch.equal(a, b.grad) for a, b in zip(grads[:2], plain, strict=True))


def test_bits_of_rows():
    student, teacher = make_rows(30, 3000, torch.float32)
    batch = Batch(30, 3000)
    for temperature in (1.0, 2.0):
        options = {"temperature": temperature, **batch.options}
        plain, parts = (student.clone().requires_grad_() for _ in range(2))
        loss = mk.kl_loss(plain, teacher, **options)
        record = mk.kl_loss(parts, teacher, return_parts=True, **options)
        loss.backward(), record.loss.backward()
        assert torch.equal(loss, record.loss) and torch.equal(plain.grad, parts.grad)


@pytest.mark.parametrize("schedule", ["store", "recompute"])
def test_a_lent_accumulator(monkeypatch, schedule):
    """Its gradients are made in the backward, from the metrics that the forward wrote."""
    force_plan(monkeypatch, chunk_rows=64, tile=64, tile_group=2, stored_tiles=3)
    N, V = 130, 300
    batch, tensors = Batch(N, V), make_linear(N, 24, 30, V, torch.float64)
    for case in (CASES[1], CASES[2]):
        buffer = torch.full((V, 24), 2.0, dtype=torch.float64)
        record, grads = run_linear(
            tensors, grad_head_accumulator=buffer, schedule=schedule, **WEIGHTS, **arguments(case),
            **batch.options,
        )  # fmt: skip
        kl, metrics, truths = linear_truth(tensors, batch, case)
        batch.assert_record(record, kl, metrics, torch.float64)
        assert grads[1] is None
        assert_gradients([grads[0], buffer - 2.0, None], truths, torch.float64)


def test_compile():
    torch._dynamo.reset()
    N, V = 24, 70
    batch = Batch(N, V)
    for function, learning in both("native", make_linear(N, 16, 20, V, torch.float64)):

        def step(*tensors, function=function, **options):
            record = function(*tensors, return_parts=True, **options)
            return (*record, *torch.autograd.grad(record.loss, tensors))

        options = {"temperature": 2.0, "label_smoothing": 0.1, **WEIGHTS, **batch.options}
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        record = compiled(*learning, return_parts=True, **options)
        grads = torch.autograd.grad(record.loss, learning)
        for a, b in zip((*record, *grads), step(*learning, **options), strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)
    torch._dynamo.reset()


def test_opcheck():
    ops, opcheck = torch.ops.minitron_kernels, torch.library.opcheck
    student, teacher = make_rows(6, 50, torch.float32)
    labels = torch.tensor([1, 2, 3, 4, 49, -1])
    mask, numbers = labels >= 0, [0.0, 0.5, 1.0, 0.0, 1.0, 0.0, 0.1]
    weight = torch.rand(6)
    _, stats, metrics = ops.kl_loss_forward_metrics(student, teacher, mask, labels, 50, numbers)
    opcheck(ops.kl_loss_forward_metrics.default, (student, teacher, mask, labels, 50, numbers))
    given = (weight, stats, student, teacher, mask, 50, numbers, labels, metrics, weight)
    opcheck(ops.kl_loss_backward.default, given)
    opcheck(
        ops.kl_rows_forward_metrics.default, (student, teacher, mask, labels, 50, numbers, None, "native")
    )
    tensors = make_linear(6, 16, 20, 50, torch.float32)
    rest = (True, True, False, True, 50, numbers, None, "native", "store", 1 << 24, None, None, False, ())
    inputs = (*tensors[:2], None, *tensors[2:], None, None, None, mask, weight, None, None, labels, weight)
    opcheck(ops.linear_kl_loss.default, (*inputs, None, *rest))


@pytest.mark.parametrize("function", ["kl_loss", "linear_kl_loss"])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": None, "ce_weight": 1.0}, ValueError, "ce_weight=1.0 needs labels"),
        ({"ce_weight": -1.0}, ValueError, "ce_weight must be"),
        ({"kl_weight": -0.5}, ValueError, "kl_weight must be"),
        ({"kl_weight": math.nan}, ValueError, "kl_weight must be"),
        ({"ce_weight": math.inf}, ValueError, "ce_weight must be"),
        ({"ce_weight": "1"}, TypeError, "ce_weight must be"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\]"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\]"),
        ({"label_smoothing": math.nan}, ValueError, "label_smoothing must be"),
        ({"ce_weight": 1.0, "labels": 30}, ValueError, r"labels .* \[0, 30\), got 30 at position 0"),
        ({"return_parts": True, "labels": 30}, ValueError, r"labels .* \[0, 30\), got 30 at position 0"),
        ({"token_weights": torch.ones(5)}, ValueError, r"token_weights must have one entry per token"),
        ({"token_weights": torch.ones(6, dtype=torch.int64)}, TypeError, "token_weights must be floating"),
        ({"token_weights": torch.ones(6).requires_grad_()}, ValueError, r"pass token_weights\.detach\(\)"),
        ({"token_weights": [1.0] * 6}, TypeError, "token_weights must be a torch.Tensor"),
    ],
)
def test_errors(function, changes, error, message):
    tensors = make_linear(6, 16, 20, 40, torch.float32)
    if function == "kl_loss":
        tensors = [tensors[0] @ tensors[1].T, tensors[2] @ tensors[3].T]
    options = {"labels": torch.zeros(6, dtype=torch.int64), "vocab_size": 30, **changes}
    if isinstance(options["labels"], int):
        options["labels"] = torch.full((6,), options["labels"])
    with pytest.raises(error, match=message):
        getattr(mk, function)(*tensors, **options)
