"""return_parts, ce_weight, label_smoothing, token_weights on the CPU against the definition in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import minitron_kernels as mk
from kl_loss.oracle import oracle_linear, oracle_metrics, oracle_rows
from kl_loss.problems import (
    BETA,
    GRADIENT_BOUND,
    force_operands,
    force_plan,
    make_linear,
    make_rows,
    relative,
    threads,
    to_numpy,
)

pytestmark = pytest.mark.native
BACKENDS = ["native", "reference"]
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}  # of losses
# divergence, temperature, label smoothing, softcap
CASES = [
    ("forward_kl", 1.0, 0.0, None),
    ("forward_kl", 2.0, 0.1, None),
    ("reverse_kl", 1.0, 0.1, 6.0),
    ("reverse_kl", 0.5, 0.0, None),
    ("jsd", 1.0, 0.1, None),
    ("jsd", 2.0, 0.0, 6.0),
    ("forward_kl", 1.0, 1.0, None),
]
WEIGHTS = {"kl_weight": 0.3, "ce_weight": 0.7}


class Batch:
    """Labels, mask and token weights of N tokens, and what they make of a loss."""

    def __init__(self, N, V, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, V, (N,), generator=g)
        self.labels[::5] = -100
        self.mask = torch.rand(N, generator=g) < 0.8
        self.weights = torch.rand(N, generator=g)
        self.weights[3::7] = 0.0
        self.counted = ((self.labels >= 0) & self.mask).numpy()
        self.weights[torch.from_numpy(~self.counted)] = math.nan  # nobody may look
        self.options = {"labels": self.labels, "mask": self.mask, "token_weights": self.weights}
        self.targets = np.where(self.counted, self.labels.numpy(), -1)

    def row_weight(self):
        """Each token's factor in a mean."""
        weights = np.where(self.counted, self.weights.double().numpy(), 0.0)
        return weights / max(self.counted.sum(), 1)

    def assert_record(self, record, kl, metrics, dtype):
        """Against rows of the oracle."""
        ce, entropy, label_logprob, _ = metrics
        w, near = self.row_weight(), {"rel": BOUND[dtype], "abs": 0}
        expected = {"kl": kl, "ce": ce, "entropy": entropy, "label_logprob": label_logprob}
        for name, rows in expected.items():
            term = getattr(record, name)
            assert term.item() == pytest.approx((w * rows).sum(), **near), name
            assert not term.requires_grad and term.shape == ()
        loss = WEIGHTS["kl_weight"] * (w * kl).sum() + WEIGHTS["ce_weight"] * (w * ce).sum()
        assert record.loss.item() == pytest.approx(loss, **near)
        assert record.num_tokens.dtype == torch.int64 and record.num_tokens.item() == self.counted.sum()


def definition(case):
    divergence, temperature, smoothing, softcap = case
    return {
        "beta": BETA[divergence],
        "inv_tau": 1 / temperature,
        "student_softcap": softcap or 0.0,
        "label_smoothing": smoothing,
    }


def arguments(case):
    names = ("divergence", "temperature", "label_smoothing", "student_softcap")
    return dict(zip(names, case, strict=True))


def rows_truth(zs, zt, batch, case, **more):
    options = {**definition(case), **more}
    kl, dz = oracle_rows(zs, zt, **{k: v for k, v in options.items() if k != "label_smoothing"})
    metrics = oracle_metrics(zs, batch.targets, **options)
    grad = WEIGHTS["kl_weight"] * dz + WEIGHTS["ce_weight"] * metrics[3]
    return kl, metrics, grad * batch.row_weight()[:, None]


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


def linear_truth(tensors, batch, case, bias=None, weights=WEIGHTS, **more):
    """KL and metrics of rows, gradients to hidden, head and bias."""
    options, w = {**definition(case), **more}, batch.row_weight()
    arrays, b = to_numpy(*tensors), 0.0 if bias is None else to_numpy(bias)[0]
    kl, *grads = oracle_linear(
        *arrays, student_bias=None if bias is None else b, row_weight=weights["kl_weight"] * w,
        ce_weight=weights["ce_weight"] * w, labels=batch.targets, **options,
    )  # fmt: skip
    return kl, oracle_metrics(arrays[0] @ arrays[1].T + b, batch.targets, **options), grads


def run_linear(tensors, bias=None, **options):
    """The record, and the gradients to hidden, head and bias."""
    hidden, head = (x.clone().requires_grad_() for x in tensors[:2])
    bias = None if bias is None else bias.clone().requires_grad_()
    record = mk.linear_kl_loss(hidden, head, *tensors[2:], student_bias=bias, return_parts=True, **options)
    record.loss.sum().backward()
    return record, [None if x is None else x.grad for x in (hidden, head, bias)]


def assert_gradients(grads, truths, dtype):
    for name, grad, truth in zip(("hidden", "head", "bias"), grads, truths, strict=True):
        if grad is not None:
            assert relative(grad, truth) <= GRADIENT_BOUND[dtype], name


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


def both(backend, tensors):
    """Each loss as a function of what learns, and what learns."""

    def linear(hidden, head, **options):
        return mk.linear_kl_loss(hidden, head, *tensors[2:], backend=backend, **options)

    def rows(logits, **options):
        return mk.kl_loss(logits, tensors[2] @ tensors[3].T, backend=backend, **options)

    logits = (tensors[0] @ tensors[1].T).detach()
    return (linear, [x.clone().requires_grad_() for x in tensors[:2]]), (rows, [logits.requires_grad_()])


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
    rest = (True, True, False, True, 50, numbers, None, "native", "store", 1 << 24, None)
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


def test_shift_labels():
    labels = torch.tensor([[1, 2, 3, 4], [5, -100, 7, 8]])
    before = labels.clone()
    shifted = mk.shift_labels(labels)
    assert shifted.tolist() == [[2, 3, 4, -100], [-100, 7, 8, -100]] and torch.equal(labels, before)
    assert mk.shift_labels(labels.int(), ignore_index=-1).dtype == torch.int32
    assert mk.shift_labels(labels, ignore_index=-1)[0].tolist() == [2, 3, 4, -1]
    for shape in ((0,), (2, 0), (1,), (2, 1)):
        shifted = mk.shift_labels(torch.ones(shape, dtype=torch.int64))
        assert shifted.shape == shape and (shifted == -100).all()
    for wrong, error in ((torch.ones(3), TypeError), ([1, 2], TypeError), (torch.tensor(1), ValueError)):
        with pytest.raises(error, match="labels must be"):
            mk.shift_labels(wrong)


def test_shift_labels_is_what_transformers_do():
    """The loss of shifted labels is that of logits shifted against them."""
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 9, 30, generator=g), torch.randint(0, 30, (2, 9), generator=g)
    labels[0, :3] = -100
    record = mk.kl_loss(logits, logits, labels=mk.shift_labels(labels), return_parts=True)
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 30), labels[:, 1:].reshape(-1))
    assert record.ce.item() == pytest.approx(expected.item(), rel=1e-6)
