"""kl_loss's CUDA kernels, run on the host by the shim: values, bounds, traffic, thread order, faults."""

import itertools
import math

import numpy as np
import pytest
import torch

from kl_loss.cases import assert_loss
from kl_loss.oracle import oracle_rows
from tools.faults import Fault
from tools.host_shim import (
    FORWARD,
    REVERSE,
    SANITIZE,
    WITHOUT_BFLOAT16,
    WITHOUT_HALF,
    assert_clean_under_sanitizers,
    load,
    missing_tool,
    run_sanitized,
)

pytestmark = pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))

BETAS = (0.0, 0.3, 0.5, 1.0)
DTYPES = (torch.float32, torch.bfloat16) if SANITIZE else (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What is allocated and not written is NaN: outputs, states, logits, sums."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def shim():
    return load("kl_loss", WITHOUT_HALF, sanitize=True) if SANITIZE else load("kl_loss")


def run(
    shim, student, teacher, *, beta=0.0, mask=None, vocab_size=None, inv_tau=1.0, grad_loss=None, **options
):
    """(loss, stats, gradient) of the shim's two ops."""
    V = min(student.shape[1], teacher.shape[1]) if vocab_size is None else vocab_size
    keys = ("student_scale", "student_softcap", "teacher_scale", "teacher_softcap")
    rest = [V, [beta, inv_tau, *(options.get(k, float(k.endswith("scale"))) for k in keys)]]
    loss, stats = shim.ops.kl_loss_forward(student, teacher, mask, *rest)
    if grad_loss is None:
        grad_loss = torch.ones(student.shape[0])
    grad = shim.ops.kl_loss_backward(grad_loss, stats, student, teacher, mask, *rest)
    return loss, stats, grad


def assert_gradient(grad, truth, near=1.0, weight=1.0):
    """No worse than the truth rounded to the gradient's dtype, beyond fp32's own error. p_S - p_T carries
    1e-6 of p, however small the difference is: `near` loosens the bound where the two all but agree.
    """
    rounded = torch.from_numpy(truth).to(grad.dtype).double().numpy()
    size, unavoidable = np.linalg.norm(truth), np.linalg.norm(rounded - truth)
    error = np.linalg.norm(grad.double().numpy() - truth)
    bound = 1.1 * unavoidable + 4e-6 * near * size + 1e-6 * weight
    assert error <= bound, f"gradient off by {error / size:.1e}, {unavoidable / size:.1e} by rounding alone"


def check(shim, student, teacher, *, near=1.0, **options):
    """Loss and gradient against the oracle."""
    loss, _, grad = run(shim, student, teacher, **options)
    weight = options.pop("grad_loss", torch.ones(student.shape[0])).double().numpy()
    true_loss, true_grad = oracle_rows(student.double().numpy(), teacher.double().numpy(), **options)
    assert_loss(loss, true_loss)
    assert grad.dtype == student.dtype and grad.shape == student.shape
    assert_gradient(grad, true_grad * weight[:, None], near, np.abs(weight).max())


def normal(*shape, dtype=torch.float32, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("close", [False, True])
def test_values(shim, student_dtype, teacher_dtype, beta, close):
    for V in (1, 2, 7, 8, 31, 257, 4099):
        teacher = normal(2, V, dtype=teacher_dtype)
        student = (teacher.float() + normal(2, V, seed=1, scale=0.05)) if close else normal(2, V, seed=2)
        check(shim, student.to(student_dtype), teacher, beta=beta, grad_loss=torch.tensor([1.0, -0.5]))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("distance", [0.05, 1e-2, 1e-3])
def test_accuracy_where_the_student_is_close(shim, beta, distance):
    """KL from 1e-3 down to 5e-7: the loss keeps its digits, the gradient what fp32 allows."""
    teacher = normal(2, 4099, seed=3)
    student = teacher + normal(2, 4099, seed=4, scale=distance)
    loss, _, grad = run(shim, student, teacher, beta=beta)
    true_loss, true_grad = oracle_rows(student.double().numpy(), teacher.double().numpy(), beta=beta)
    assert (loss >= 0).all()
    assert_loss(loss, true_loss, rtol=1e-6)
    error = np.linalg.norm(grad.double().numpy() - true_grad) / np.linalg.norm(true_grad)
    assert error <= 1e-5 * max(1.0, 0.02 / distance)


HAND = {  # (tau, beta): loss and gradient at teacher ln [1, 2, 1], student 0
    (1, 0.0): (0.058891518, [0.083333, -0.166667, 0.083333]),
    (1, 1.0): (0.056633013, [0.077016, -0.154033, 0.077016]),
    (1, 0.5): (0.014362592, [0.019815, -0.039631, 0.019815]),
    (2, 0.0): (0.014220593, [0.020220, -0.040440, 0.020220]),
    (2, 1.0): (0.013810359, [0.019254, -0.038508, 0.019254]),
    (2, 0.5): (0.003498650, [0.004919, -0.009838, 0.004919]),
}


@pytest.mark.parametrize(("tau", "beta"), HAND)
def test_hand_oracle(shim, tau, beta):
    loss, _, grad = run(
        shim, torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 1.0]]).log(), beta=beta, inv_tau=1 / tau
    )
    assert loss.item() == pytest.approx(HAND[tau, beta][0], abs=1e-8)
    assert grad[0].tolist() == pytest.approx(HAND[tau, beta][1], abs=6e-7)


@pytest.mark.parametrize("beta", BETAS)
def test_options(shim, beta):
    student, teacher = normal(3, 601), normal(3, 601, seed=5)
    for inv_tau, scale, cap in itertools.product((1.0, 0.5), (1.0, 0.7), (0.0, 5.0)):
        check(shim, student, teacher, beta=beta, inv_tau=inv_tau, student_scale=scale, student_softcap=cap)
        check(shim, student, teacher, beta=beta, inv_tau=inv_tau, teacher_scale=scale, teacher_softcap=cap)


@pytest.mark.parametrize("beta", BETAS)
def test_rising_and_extreme_data(shim, beta):
    """Every run of every thread raises the running maximum; differences of logits beyond exp's range."""
    for dtype in (torch.float32, torch.bfloat16):
        V = 16387
        rising = torch.linspace(-60.0, 60.0, V)[None].to(dtype)
        check(shim, rising, rising.float().flip(1).to(dtype), beta=beta)
        check(shim, rising, normal(1, V, dtype=dtype), beta=beta)
        check(shim, normal(1, V, dtype=dtype), rising, beta=beta)
    wide = normal(2, 513, scale=60.0)
    check(shim, wide, normal(2, 513, seed=6, scale=60.0), beta=beta)
    huge = torch.full((1, 40), torch.finfo(torch.float32).min)  # a mask by a large number instead of -inf
    huge[0, :9] = normal(1, 9)[0]
    if beta != 1.0:
        check(shim, torch.where(huge < -1e30, huge, huge + normal(1, 40)), huge, beta=beta)
        check(shim, normal(1, 40, seed=17), huge, beta=beta)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16])
def test_layouts(shim, student_dtype, teacher_dtype, beta):
    """Rows that start anywhere, any stride, padding that holds NaN: nothing but the V columns is read."""
    V = 77
    for s_start, t_start, s_pad, t_pad in [
        (0, 0, 0, 0),
        (1, 1, 0, 0),
        (3, 0, 2, 5),
        (0, 2, 8, 3),
        (5, 7, 1, 1),
    ]:
        store_s = torch.full((3, s_start + V + s_pad + 3), math.nan, dtype=student_dtype)
        store_t = torch.full((3, t_start + V + t_pad + 2), math.nan, dtype=teacher_dtype)
        student = store_s[:, s_start : s_start + V + s_pad]
        teacher = store_t[:, t_start : t_start + V + t_pad]
        student[:, :V] = normal(3, V)
        teacher[:, :V] = normal(3, V, seed=7)
        with shim.trace(student=student[:, :V], teacher=teacher[:, :V]) as trace:
            loss, stats = shim.ops.kl_loss_forward(student, teacher, None, V, [beta, 1.0, 1.0, 0.0, 1.0, 0.0])
            for output in (loss, stats):
                stores = trace.take_stores(output)
                assert stores.never == stores.twice == 0
            assert stores.elsewhere == 0
        weight = torch.tensor([2.0])
        with shim.trace(student=student[:, :V], teacher=teacher[:, :V], stats=stats, weight=weight) as trace:
            grad = shim.ops.kl_loss_backward(
                weight.expand(3), stats, student, teacher, None, V, [beta, 1.0, 1.0, 0.0, 1.0, 0.0]
            )
            stores = trace.take_stores(grad)
            assert stores.never == stores.twice == stores.elsewhere == 0
        true_loss, true_grad = oracle_rows(
            student[:, :V].double().numpy(), teacher[:, :V].double().numpy(), beta=beta
        )
        assert_loss(loss, true_loss)
        assert (grad[:, V:] == 0).all()
        assert_gradient(grad[:, :V], 2 * true_grad)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_masked_out_tokens(shim, beta, softcap):
    V = 300
    student, teacher = normal(4, V), normal(4, V, seed=8)
    student[0, 3:9] = teacher[0, 3:9] = -math.inf  # in both: adds nothing
    teacher[1, 40:] = -math.inf  # a teacher of few tokens
    student[2, 10:20] = -math.inf  # forward KL is infinite
    student[3, :200] = teacher[3, :200] = -math.inf  # whole runs
    with np.errstate(all="ignore"):
        loss, _, grad = run(shim, student, teacher, beta=beta, student_softcap=softcap)
        true_loss, true_grad = oracle_rows(
            student.double().numpy(), teacher.double().numpy(), beta=beta, student_softcap=softcap
        )
    assert_loss(loss, true_loss)
    assert (grad[student == -math.inf] == 0).all()
    if beta == 0.0:
        assert loss[2] == math.inf and torch.isfinite(grad).all()
    finite = np.isfinite(true_loss)
    assert finite.sum() >= 3
    assert_gradient(grad[torch.from_numpy(finite)], true_grad[finite])


@pytest.mark.parametrize("beta", BETAS)
def test_nan_is_never_hidden(shim, beta):
    V = 700
    clean_s, clean_t = normal(1, V), normal(1, V, seed=9)
    for side, column in itertools.product((0, 1), (0, 5, 350, V - 1)):
        logits = [clean_s.clone(), clean_t.clone()]
        logits[side][0, column] = math.nan
        loss, _, grad = run(shim, *logits, beta=beta)
        assert loss.isnan().all() and grad.isnan().any()
    for side in (0, 1):  # a row without any possible token, and one with an infinite one
        for value in (-math.inf, math.nan):
            logits = [clean_s.clone(), clean_t.clone()]
            logits[side][:] = value
            assert run(shim, *logits, beta=beta)[0].isnan().all()
        logits = [clean_s.clone(), clean_t.clone()]
        logits[side][0, 77] = math.inf
        assert run(shim, *logits, beta=beta)[0].isnan().all()
    both = torch.full((1, V), -math.inf)
    assert run(shim, both, both, beta=beta)[0].isnan().all()


@pytest.mark.parametrize("beta", BETAS)
def test_masked_rows_are_not_read(shim, beta):
    student, teacher = normal(4, 130), normal(4, 130, seed=10)
    mask = torch.tensor([True, False, True, False])
    student[1], teacher[3] = math.nan, math.nan
    with shim.trace(student=student[::2], teacher=teacher[::2], mask=mask):
        loss, stats = shim.ops.kl_loss_forward(student, teacher, mask, 130, [beta, 1.0, 1.0, 0.0, 1.0, 0.0])
    true_loss, _ = oracle_rows(student[::2].double().numpy(), teacher[::2].double().numpy(), beta=beta)
    np.testing.assert_allclose(loss[::2].numpy(), true_loss, rtol=3e-6)
    assert (loss[1::2] == 0).all() and (stats[1::2] == 0).all()
    grad = run(shim, student, teacher, beta=beta, mask=mask)[2]
    assert (grad[1::2] == 0).all() and grad[::2].isfinite().all() and (grad[::2] != 0).any()
    wide = torch.stack([mask, mask], dim=1)  # a mask with a stride
    assert torch.equal(run(shim, student, teacher, beta=beta, mask=wide[:, 0])[2], grad)


def test_identities(shim):
    for beta in BETAS:
        student, teacher = normal(3, 1000), normal(3, 1000, seed=11)
        loss, _, grad = run(shim, student, student.clone(), beta=beta)
        assert (loss == 0).all() and (grad == 0).all()
        loss, _, grad = run(shim, student, teacher, beta=beta)
        assert grad.double().sum(1).abs().max() < 1e-6
        shifted = run(shim, student + 8.0, teacher - 16.0, beta=beta)[0]
        torch.testing.assert_close(shifted, loss, rtol=3e-6, atol=0)
    assert run(shim, torch.zeros(0, 5), torch.zeros(0, 5))[2].shape == (0, 5)


def test_order_of_threads_changes_no_bit(shim):
    V = 4099
    student, teacher = normal(2, V, dtype=torch.bfloat16), normal(2, V, seed=12)
    for beta in (0.0, 0.5):
        expected = run(shim, student, teacher, beta=beta)
        for order in (REVERSE, 2, 3, 4, 5, 6):
            with shim.order(order):
                actual = run(shim, student, teacher, beta=beta)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_one_row_split_over_blocks(shim):
    """Few rows and a large vocabulary: several blocks of the backward share a row, its padding, and a row
    that does not count.
    """
    V, columns = 40_003, 50_000
    student, teacher = (normal(2, columns, dtype=torch.bfloat16, seed=seed) for seed in (0, 13))
    check(shim, student, teacher, beta=0.0, vocab_size=V)
    mask = torch.tensor([True, False])
    loss, stats, _ = run(shim, student, teacher, mask=mask, vocab_size=V)
    logits = {"student": student[:1, :V], "teacher": teacher[:1, :V]}
    with shim.trace(**logits, stats=stats, loss=loss, mask=mask) as trace:
        grad = shim.ops.kl_loss_backward(
            loss, stats, student, teacher, mask, V, [0.0, 1.0, 1.0, 0.0, 1.0, 0.0]
        )
        stores = trace.take_stores(grad)
    assert stores.never == stores.twice == stores.elsewhere == 0
    assert (grad[0, V:] == 0).all() and (grad[1] == 0).all()


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_traffic(shim, student_dtype, teacher_dtype, beta):
    """Forward: each logit once, JSD twice. Backward: each logit and each gradient once. 16 bytes wide."""
    N, V = 3, 4096
    student, teacher = normal(N, V, dtype=student_dtype), normal(N, V, dtype=teacher_dtype, seed=14)
    S, T = N * V * student.element_size(), N * V * teacher.element_size()
    rest = (None, V, [beta, 1.0, 1.0, 0.0, 1.0, 0.0])
    passes = 2 if beta == 0.5 else 1
    with shim.trace(student=student, teacher=teacher) as trace:
        loss, stats = shim.ops.kl_loss_forward(student, teacher, *rest)
        assert trace.loads("student").bytes == passes * S and trace.loads("student").narrow == 0
        assert trace.loads("teacher").bytes == passes * T and trace.loads("teacher").narrow == 0
        assert trace.take_stores(loss).bytes == 4 * N
        assert trace.take_stores(stats).bytes == 24 * N
        assert trace.most_shared_bytes() == 640 + (256 if beta == 0.5 else 0)
    with shim.trace(student=student, teacher=teacher, stats=stats, loss=loss) as trace:
        grad = shim.ops.kl_loss_backward(loss, stats, student, teacher, *rest)
        assert trace.loads("student").bytes == S and trace.loads("student").narrow == 0
        assert trace.loads("teacher").bytes == T and trace.loads("teacher").narrow == 0
        stores = trace.take_stores(grad)
        assert stores.bytes == S and stores.narrow == stores.elsewhere == 0
        assert trace.most_shared_bytes() == 0


def test_bad_input(shim):
    good = torch.zeros(2, 8)

    def forward(student=good, teacher=good, mask=None, vocab_size=8):
        return shim.ops.kl_loss_forward(student, teacher, mask, vocab_size, [0.0, 1.0, 1.0, 0.0, 1.0, 0.0])

    for arguments, message in [
        ({"student": torch.zeros(8)}, r"student_logits must be \[N, V\]"),
        ({"teacher": torch.zeros(8, 2).t()}, "teacher_logits must have stride 1"),
        ({"teacher": torch.zeros(3, 8)}, "teacher_logits has 3 rows, student_logits 2"),
        ({"vocab_size": 9}, "vocab_size 9 is not in"),
        ({"vocab_size": 0}, "vocab_size 0 is not in"),
        ({"student": good.double()}, "student_logits must be float32, bfloat16 or float16"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask must be bool"),
        ({"mask": torch.ones(2)}, "mask must be bool"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            forward(**arguments)


# ---- the rungs themselves: a planted fault must turn them red


def check_rising(shim):
    rising = torch.linspace(-60.0, 60.0, 16387)[None]
    check(shim, rising, rising.flip(1))


def check_orders(shim):
    student, teacher = normal(1, 4099), normal(1, 4099, seed=15)
    for order in (FORWARD, REVERSE, 2, 3, 4, 5, 6):
        with shim.order(order):
            check(shim, student, teacher)


def check_bounds(shim):
    store = torch.zeros(2, 64)
    view = store[:, :40]
    with shim.trace(student=view, teacher=view):
        shim.ops.kl_loss_forward(view, view, None, 40, [0.0, 1.0, 1.0, 0.0, 1.0, 0.0])


def check_alignment(shim):
    store = torch.zeros(1, 41)
    run(shim, store[:, 1:], store[:, 1:])


def check_traffic(shim):
    test_traffic(shim, torch.float32, torch.float32, 0.0)


def check_padding(shim):
    student, teacher = normal(2, 90), normal(2, 90, seed=16)
    loss, stats, _ = run(shim, student, teacher, vocab_size=64)
    with shim.trace(student=student, teacher=teacher, stats=stats, loss=loss) as trace:
        grad = shim.ops.kl_loss_backward(
            loss, stats, student, teacher, None, 64, [0.0, 1.0, 1.0, 0.0, 1.0, 0.0]
        )
        assert trace.take_stores(grad).never == 0


REDUCE, VEC, MATH = "common/cuda/reduce.cuh", "common/cuda/vec.cuh", "kl_loss/cuda/divergence.cuh"
KERNELS = "kl_loss/cuda/row_kernels.cuh"
PASS_ONE = "  RowStats stat = state.stats();\n"
ANOTHER_PASS = "  stat.kl = row_state(pairs, state, partial_states).kl;\n"
VECTOR_LOAD = (
    "  if (aligned) {\n#pragma unroll\n    for (int i = 0; i < N; i += kPerAccess) {\n      const uint4 v"
)
ZERO_PADDING = "columns - options.vocab_size, begin, step);"
FAULTS = {  # name: the check, what is done to the source, what the failure must say
    "no rescale": (
        check_rising,
        Fault(MATH, "return {top, mass(top) + other.mass(top)};", "return {top, sum + other.sum};"),
        "Not equal to tolerance",
    ),
    "no barrier": (check_orders, Fault(REDUCE, "  __syncthreads();\n", ""), "Not equal to tolerance"),
    "divergent barrier": (
        check_orders,
        Fault(REDUCE, "  __syncthreads();\n", "  if (warp != 1 || lane < 16) __syncthreads();\n"),
        "deadlock in block",
    ),
    "out of bounds": (
        check_bounds,
        Fault(VEC, "rest = n - runs * kRun;", "rest = n - runs * kRun + 1;"),
        "load outside of the allowed regions",
    ),
    "misaligned": (
        check_alignment,
        Fault(VEC, "if (head > n) head = n;", "head = 0;"),
        "misaligned 16-byte access",
    ),
    "another pass": (
        check_traffic,
        Fault(KERNELS, PASS_ONE, PASS_ONE + ANOTHER_PASS),
        r"assert \(?98304 == ",
    ),
    "scalar loads": (
        check_traffic,
        Fault(VEC, VECTOR_LOAD, VECTOR_LOAD.replace("aligned", "false")),
        "narrow",
    ),
    "padding not zeroed": (check_padding, Fault(KERNELS, ZERO_PADDING, f"-1 + {ZERO_PADDING}"), "never"),
}


@pytest.mark.skipif(SANITIZE, reason="the faults are planted in the plain build")
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(shim, name):
    check_it, fault, message = FAULTS[name]
    check_it(shim)
    broken = load("kl_loss", fault, WITHOUT_HALF, WITHOUT_BFLOAT16)
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check_it(broken)


# ---- the same tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a process that preloads these

SANITIZED = "layouts or masked_out or masked or bad_input or hand"
HEAP_OVERRUN = """
import torch
from tools.host_shim import *
overrun = Fault("common/cuda/vec.cuh", "rest = n - runs * kRun;", "rest = n - runs * kRun + 1;")
shim = load("kl_loss", overrun, WITHOUT_HALF, WITHOUT_BFLOAT16, sanitize=True)
shim.ops.kl_loss_forward(torch.zeros(1, 40), torch.zeros(1, 40), None, 40, [0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
"""


@pytest.mark.skipif(SANITIZE, reason="this is the child")
def test_under_sanitizers():
    assert_clean_under_sanitizers(__file__, SANITIZED)


@pytest.mark.skipif(SANITIZE, reason="this is the child")
def test_sanitizers_find_a_planted_overrun():
    done = run_sanitized("-c", HEAP_OVERRUN)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-4000:]
