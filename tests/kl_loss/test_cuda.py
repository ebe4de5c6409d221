"""kl_loss's CUDA kernels, run on the host by the shim: values, what is read and written, bad input."""

import itertools
import math

import numpy as np
import pytest
import torch

from kl_loss.cases import PLAIN, assert_loss
from kl_loss.oracle import oracle_rows
from kl_loss.shim_rows import (  # noqa: F401
    BETAS,
    DTYPES,
    assert_gradient,
    check,
    normal,
    poisoned_memory_fixture,
    run,
    shim_fixture,
)
from tools.host_shim import SANITIZE, assert_clean_under_sanitizers, assert_overrun_is_found, missing_tool

pytestmark = pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))


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
            loss, stats = shim.ops.kl_loss_forward(student, teacher, None, V, [beta, *PLAIN])
            for output in (loss, stats):
                stores = trace.take_stores(output)
                assert stores.never == stores.twice == 0
            assert stores.elsewhere == 0
        weight = torch.tensor([2.0])
        with shim.trace(student=student[:, :V], teacher=teacher[:, :V], stats=stats, weight=weight) as trace:
            grad = shim.ops.kl_loss_backward(
                weight.expand(3), stats, student, teacher, None, V, [beta, *PLAIN]
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
        loss, stats = shim.ops.kl_loss_forward(student, teacher, mask, 130, [beta, *PLAIN])
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


def test_bad_input(shim):
    good = torch.zeros(2, 8)

    def forward(student=good, teacher=good, mask=None, vocab_size=8):
        return shim.ops.kl_loss_forward(student, teacher, mask, vocab_size, [0.0, *PLAIN])

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


# ---- the same tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a process that preloads these

SANITIZED = "layouts or masked_out or masked or bad_input or hand"


HEAP_OVERRUN = """
import torch
from kl_loss.faults import CUDA_ROWS
from tools.host_shim import *
_, overrun, _ = CUDA_ROWS["out of bounds"]
shim = load("kl_loss", overrun, WITHOUT_HALF, WITHOUT_BFLOAT16, sanitize=True)
shim.ops.kl_loss_forward(torch.zeros(1, 40), torch.zeros(1, 40), None, 40, [0.0, 1, 1, 0, 1, 0, 0])
"""


@pytest.mark.skipif(SANITIZE, reason="this is the child")
def test_under_sanitizers():
    assert_clean_under_sanitizers(__file__, SANITIZED)


@pytest.mark.skipif(SANITIZE, reason="this is the child")
def test_sanitizers_find_a_planted_overrun():
    assert_overrun_is_found(HEAP_OVERRUN)
