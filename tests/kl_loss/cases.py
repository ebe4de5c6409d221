"""What every GPU backend of kl_loss and linear_kl_loss must pass; tests of a fixture `kernels` that the file
which imports them has: Triton under ttsem, CUDA C++ through the host shim, both on a GPU.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from kl_loss.oracle import oracle_linear, oracle_rows
from kl_loss.problems import make_linear, make_rows
from minitron_kernels.ops.kl_loss import linear_gpu
from minitron_kernels.ops.kl_loss.epilogues import Epilogues
from minitron_kernels.ops.kl_loss.options import LossOptions

BETAS = (0.0, 1.0, 0.3)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = (1.0, 1.0, 0.0, 1.0, 0.0, 0.0)  # inv_tau, scales and softcaps, label_smoothing
CAPPED = (0.5, 1.2, 6.0, 0.8, 9.0, 0.0)
INF = math.inf


@dataclass
class Kernels:
    """What is tested: ops of a backend, kl_loss_forward and so on, and its epilogues."""

    backend: str
    device: str
    forward: Callable
    backward: Callable
    epilogues: Epilogues
    forward_metrics: Callable | None = None


def matmul_fp32(a, b, out, accumulate):
    """What the GEMMs of a GPU compute, where torch has none with out_dtype; they refuse other dtypes."""
    assert a.dtype == b.dtype and out.dtype in (a.dtype, torch.float32), (a.dtype, b.dtype, out.dtype)
    product = a.float() @ b.float()
    out.copy_(out.float() + product if accumulate else product)


def numpy_of(x):
    return None if x is None else x.detach().double().cpu().numpy()


def named(options):
    names = ("inv_tau", "student_scale", "student_softcap", "teacher_scale", "teacher_softcap")
    return dict(zip(names, options[:5], strict=True))


def assert_near(actual, truth, bound, floor=0.0):
    """Frobenius error within `bound` of the truth, plus `floor`."""
    actual = numpy_of(actual)
    error, size = np.linalg.norm(actual - truth), np.linalg.norm(truth)
    assert error <= bound * size + floor, f"error {error:.3g}, truth {size:.3g}"


def assert_loss(loss, truth, rtol=3e-6):
    """Masses of parts of a row, known to 1e-7, leave a loss L an error of about 1e-7 sqrt(L)."""
    for value, expected in zip(numpy_of(loss), truth, strict=True):
        atol = 1e-13 + 1e-7 * np.sqrt(expected) if np.isfinite(expected) else 0.0
        np.testing.assert_allclose(value, expected, rtol=rtol, atol=atol)


def rows(kernels, student, teacher, *, beta=0.0, options=PLAIN, mask=None, vocab_size=None, weight=None):
    """Loss, stats, and gradient of sum(weight * loss)."""
    V = min(student.shape[1], teacher.shape[1]) if vocab_size is None else vocab_size
    rest = (V, (beta, *options))
    loss, stats = kernels.forward(student, teacher, mask, *rest)
    weight = torch.ones_like(loss) if weight is None else weight
    return loss, stats, kernels.backward(weight, stats, student, teacher, mask, *rest)


def check(kernels, student, teacher, *, weight=None, **options):
    loss, _, grad = rows(kernels, student, teacher, weight=weight, **options)
    oracle = {k: v for k, v in options.items() if k in ("beta", "vocab_size")} | named(
        options.get("options", PLAIN)
    )
    true_loss, true_grad = oracle_rows(numpy_of(student), numpy_of(teacher), **oracle)
    assert_loss(loss, true_loss)
    weight = np.ones(len(true_loss)) if weight is None else numpy_of(weight)
    truth = true_grad * weight[:, None]
    rounded = numpy_of(torch.from_numpy(truth).to(student.dtype))
    assert grad.dtype == student.dtype and grad.shape == student.shape
    floor = 1.1 * np.linalg.norm(rounded - truth) + 1e-6 * np.abs(weight).max()
    assert_near(grad, truth, 4e-6, floor)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(kernels, beta, dtype):
    weight = torch.tensor([1.0, -0.5, 2.0], device=kernels.device)
    for V, distance, rising in ((300, 1.0, False), (300, 0.05, False), (517, 1.0, True)):
        student, teacher = (
            x.to(kernels.device) for x in make_rows(3, V, dtype, distance=distance, rising=rising, seed=V)
        )
        check(kernels, student, teacher, beta=beta, weight=weight)


@pytest.mark.parametrize("beta", BETAS)
def test_rows_rising_and_falling(kernels, beta):
    """Every block raises the maximum of one side, and none that of the other."""
    rising = torch.linspace(-60.0, 60.0, 1023, device=kernels.device)[None]
    check(kernels, rising, rising.flip(1).contiguous(), beta=beta)
    check(kernels, rising.flip(1).contiguous(), rising, beta=beta)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("distance", [1e-2, 1e-3])
def test_rows_close_to_the_teacher(kernels, beta, distance):
    """KL from 5e-5 down to 5e-7."""
    g = torch.Generator().manual_seed(3)
    teacher = torch.randn(2, 1000, generator=g) * 3
    student = teacher + torch.randn(2, 1000, generator=g) * distance
    loss, _, grad = rows(kernels, student.to(kernels.device), teacher.to(kernels.device), beta=beta)
    true_loss, true_grad = oracle_rows(numpy_of(student), numpy_of(teacher), beta=beta)
    assert (loss >= 0).all()
    assert_loss(loss, true_loss)
    assert_near(grad, true_grad, 1e-5 * max(1.0, 0.02 / distance))


@pytest.mark.parametrize("beta", BETAS)
def test_rows_options_and_padding(kernels, beta):
    """Mixed dtypes, softcaps, odd rows, NaN in padding columns; gradients there are 0."""
    student, teacher = make_rows(3, 290, torch.float32, distance=2.0)
    # a block of padding alone
    wide_s = torch.full((3, 431), math.nan, dtype=torch.bfloat16, device=kernels.device)
    wide_t = torch.full((3, 295), math.nan, device=kernels.device)
    wide_s[:, 1:291], wide_t[:, :290] = student.to(kernels.device), teacher.to(kernels.device)
    view = wide_s[:, 1:]
    loss, _, grad = rows(kernels, view, wide_t, beta=beta, options=CAPPED, vocab_size=290)
    true_loss, true_grad = oracle_rows(
        numpy_of(view[:, :290]), numpy_of(wide_t[:, :290]), beta=beta, **named(CAPPED)
    )
    assert_loss(loss, true_loss)
    assert_near(grad[:, :290], true_grad, 4e-3)
    assert (grad[:, 290:] == 0).all()


@pytest.mark.parametrize("capped", ["student", "teacher"])
def test_options_of_one_side(kernels, capped):
    """Scales that differ, softcap and bias of one side alone: neither gets what is the other's."""
    options = (0.5, 1.2, 6.0, 0.8, 0.0, 0.0) if capped == "student" else (0.5, 1.2, 0.0, 0.8, 6.0, 0.0)
    student, teacher = (x.to(kernels.device) for x in make_rows(2, 150, torch.float32))
    check(kernels, student, teacher, beta=0.3, options=options)
    tensors = [x.to(kernels.device) for x in make_linear(5, H, HT, 150, torch.bfloat16)]
    bias = torch.linspace(-9, 9, 150, device=kernels.device)
    setup = {"beta": 0.3, "options": options, "biases": (None, bias) if capped == "student" else (bias, None)}
    truth = truth_of(tensors, vocab_size=150, **setup)
    if capped == "student":
        assert_linear(linear(kernels, tensors, schedule="recompute", **setup), truth, torch.bfloat16)
    loss = linear(kernels, tensors, needs_grad=(False, False, False), **setup)[0]
    np.testing.assert_allclose(numpy_of(loss), truth[0], rtol=1e-5)


def test_rows_within_a_softcap(kernels):
    """Logits far below the cap, close to the teacher's: tanh keeps their digits."""
    g = torch.Generator().manual_seed(3)
    teacher = torch.randn(2, 150, generator=g) * 0.3
    student = teacher + torch.randn(2, 150, generator=g) * 1e-3
    options = (1.0, 1.0, 50.0, 1.0, 50.0, 0.0)
    _, _, grad = rows(kernels, student.to(kernels.device), teacher.to(kernels.device), options=options)
    true_grad = oracle_rows(numpy_of(student), numpy_of(teacher), **named(options))[1]
    assert_near(grad, true_grad, 2e-4)


def test_rows_of_small_shares(kernels):
    """JSD at a small beta: a gradient far below the probabilities keeps its digits; below the smallest fp32
    nothing is infinite, though the teacher's share is next to 0.
    """
    student, teacher = (x.to(kernels.device) for x in make_rows(2, 150, torch.float32))
    _, _, grad = rows(kernels, student, teacher, beta=1e-4)
    assert_near(grad, oracle_rows(numpy_of(student), numpy_of(teacher), beta=1e-4)[1], 1e-5)
    student[0, 3:9], teacher[1, 3:9] = -INF, -INF
    loss, _, grad = rows(kernels, student, teacher, beta=1e-46)
    assert (loss.abs() < 1e-30).all() and (grad.abs() < 1e-30).all()


@pytest.mark.parametrize("beta", BETAS)
def test_rows_masked_out_tokens(kernels, beta):
    student, teacher = (x.to(kernels.device) for x in make_rows(6, 400, torch.float32))
    student[0, 3:9] = teacher[0, 3:9] = -INF  # in both: adds nothing
    teacher[1, 40:] = -INF  # whole blocks without a teacher
    student[2, 10:20] = -INF  # forward KL is infinite
    student[3, :200] = teacher[3, :200] = -INF  # the first block is empty
    student[4, :390], teacher[4, 390:] = -INF, -INF  # no token in common
    student[5] = -INF  # no token at all
    loss, _, grad = rows(kernels, student, teacher, beta=beta)
    true_loss, true_grad = oracle_rows(numpy_of(student), numpy_of(teacher), beta=beta)
    assert np.isnan(true_loss[5]) and np.isinf(true_loss[4]) == (beta in (0.0, 1.0))
    assert_loss(loss, true_loss)
    assert (grad[student == -INF] == 0).all()
    finite = np.isfinite(true_loss)
    assert_near(grad[torch.from_numpy(finite).to(grad.device)], true_grad[finite], 4e-6, 1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_rows_nan_and_masked(kernels, beta):
    student, teacher = (x.to(kernels.device) for x in make_rows(8, 300, torch.float32))
    student[1, 0], student[2, 299], teacher[3, 140] = math.nan, math.nan, math.nan
    student[4, 5], teacher[5, 200] = INF, INF
    teacher[6, :128], student[6, 3] = -INF, math.nan  # a block whose KL(T || S) is 0 by itself
    loss, _, grad = rows(kernels, student, teacher, beta=beta)
    assert loss.isnan().tolist() == [False, *[True] * 6, False]
    assert grad.isnan().any(1).tolist() == [False, *[True] * 6, False]
    mask = torch.tensor([True, *[False] * 6, True], device=kernels.device)
    wide = torch.stack([mask, ~mask], dim=1)  # a mask with a stride
    masked = rows(kernels, student, teacher, beta=beta, mask=wide[:, 0])
    for actual, expected in zip(masked, (loss, None, grad), strict=True):
        assert (actual[~mask] == 0).all()
        assert expected is None or torch.equal(actual[mask], expected[mask])


def test_rows_identities(kernels):
    for beta in BETAS:
        student, teacher = (x.to(kernels.device) for x in make_rows(2, 300, torch.float32))
        loss, _, grad = rows(kernels, student, student.clone(), beta=beta)
        assert (loss == 0).all() and (grad == 0).all()
        loss, _, grad = rows(kernels, student, teacher, beta=beta)
        assert grad.double().sum(1).abs().max() < 1e-6
        empty = rows(kernels, student[:0], teacher[:0], beta=beta)
        assert [tuple(x.shape) for x in empty] == [(0,), (0, 6), (0, 300)]


# ---- linear_kl_loss

N, H, HT, V, PADDED = 37, 40, 72, 269, 275
# several chunks; several groups of rows whose dz is kept; several tiles
BUDGET = {"store": 20_000, "recompute": 28_000}


def made_plans(monkeypatch, **numbers):
    """The plans that calls make from here on, with these numbers in place of their own."""
    made, plan = [], linear_gpu.plan

    def planned(*arguments):
        made.append(dataclasses.replace(plan(*arguments), **numbers))
        return made[-1]

    monkeypatch.setattr(linear_gpu, "plan", planned)
    return made


def linear(
    kernels,
    tensors,
    *,
    beta=0.0,
    options=PLAIN,
    biases=(None, None),
    mask=None,
    row_weight=None,
    stats=None,
    accumulator=None,
    needs_grad=(True, True, True),
    vocab_size=None,
    schedule="auto",
    budget=1 << 29,
    epilogues=None,
    of_tokens=linear_gpu.NO_METRICS,
):
    """Outputs of linear_kl_loss_, made as the op makes them and filled with NaN."""
    hidden, head = tensors[:2]
    dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype

    def output(wanted, *shape, dtype=torch.float32):
        return torch.full(shape if wanted else (0,), math.nan, dtype=dtype, device=kernels.device)

    rows_, width = hidden.shape
    outputs = (
        output(True, rows_),
        output(stats is None, rows_, 6),
        output(needs_grad[0], rows_, width, dtype=dtype),
        output(needs_grad[1] and accumulator is None, head.shape[0], width, dtype=dtype),
        output(needs_grad[2], head.shape[0]),
    )
    linear_gpu.linear_kl_loss_(
        outputs,
        (*tensors[:2], biases[0]),
        (*tensors[2:], biases[1]),
        mask,
        row_weight,
        stats,
        accumulator,
        needs_grad,
        head.shape[0] if vocab_size is None else vocab_size,
        LossOptions(beta, *options),
        schedule,
        budget,
        epilogues or kernels.epilogues,
        of_tokens,
    )
    return outputs


def problem(kernels, dtype, distance=3.0, rows_=N, padded=V):
    return [x.to(kernels.device) for x in make_linear(rows_, H, HT, padded, dtype, distance=distance)]


def truth_of(
    tensors, *, beta, options=PLAIN, biases=(None, None), row_weight=None, vocab_size=V, **of_labels
):
    hidden, head, teacher_hidden, teacher_head = map(numpy_of, tensors)
    return oracle_linear(
        hidden,
        head[:vocab_size],
        teacher_hidden,
        teacher_head[:vocab_size],
        student_bias=None if biases[0] is None else numpy_of(biases[0])[:vocab_size],
        teacher_bias=None if biases[1] is None else numpy_of(biases[1])[:vocab_size],
        row_weight=row_weight,
        beta=beta,
        label_smoothing=options[5],
        **of_labels,
        **named(options),
    )


def assert_linear(outputs, truth, dtype, needs_grad=(True, True, True), rtol=1e-5):
    np.testing.assert_allclose(numpy_of(outputs[0]), truth[0], rtol=rtol)
    for wanted, grad, expected in zip(needs_grad, outputs[2:], truth[1:], strict=True):
        if wanted:
            assert_near(grad[: len(expected)], expected, 1e-5 if dtype == torch.float32 else 3e-3)
            assert (grad[len(expected) :] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", ["store", "recompute"])
@pytest.mark.parametrize("beta", BETAS)
def test_linear(kernels, monkeypatch, schedule, beta, dtype):
    """Several chunks, groups of them and tiles; biases that raise the maximum from tile to tile; softcaps,
    padding.
    """
    tensors = problem(kernels, dtype, padded=PADDED)
    tensors[1][V:], tensors[3][V:] = math.nan, math.nan  # padding is not read
    bias = torch.linspace(-9, 9, PADDED, device=kernels.device)
    bias[5], bias[250:260] = -INF, -INF
    setup = {"beta": beta, "options": CAPPED, "biases": (bias, bias * 0.5), "vocab_size": V}
    weight = torch.full((), 1 / N, device=kernels.device, dtype=torch.float64)
    tile = V if schedule == "store" else 128
    made = made_plans(monkeypatch, chunk_rows=7, dz_rows=15, tile=tile)
    outputs = linear(kernels, tensors, row_weight=weight, schedule=schedule, budget=BUDGET[schedule], **setup)
    assert_linear(outputs, truth_of(tensors, row_weight=np.full(N, 1 / N), **setup), dtype)
    assert [plan.schedule for plan in made] == [schedule]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", ["store", "recompute"])
def test_linear_keeps_the_dz_of_all_rows(kernels, monkeypatch, schedule, dtype):
    """Several chunks, one GEMM each for a tile's gradients; masked rows, weights, an uneven last chunk."""
    tensors = problem(kernels, dtype, padded=PADDED)
    mask = torch.arange(N, device=kernels.device) % 5 > 0
    weight = torch.linspace(0.5, 1.5, N, device=kernels.device) / N
    made_plans(monkeypatch, chunk_rows=11, dz_rows=N, tile=V if schedule == "store" else 128)
    setup = {"beta": 0.3, "vocab_size": V}
    outputs = linear(kernels, tensors, mask=mask, row_weight=weight, schedule=schedule, **setup)
    truth = truth_of(tensors, row_weight=numpy_of(weight) * numpy_of(mask), **setup)
    assert_linear(outputs, (truth[0] * numpy_of(mask), *truth[1:]), dtype)


@pytest.mark.parametrize(
    ("schedule", "dtype"), [("store", torch.float16), ("recompute", torch.bfloat16), ("store", torch.float32)]
)
def test_linear_mask_stats_and_lent_accumulator(kernels, schedule, dtype):
    """Masked rows that hold NaN touch nothing; gradients from given stats; a buffer that is added to."""
    tensors = problem(kernels, dtype)
    mask = torch.ones(N, dtype=torch.bool, device=kernels.device)
    mask[::7] = False
    tensors[0][::7], tensors[2][7] = math.nan, math.nan
    clean = [tensors[0].nan_to_num(0), tensors[1], tensors[2].nan_to_num(0), tensors[3]]
    weight = torch.linspace(0.5, 1.5, N, device=kernels.device) / N
    counted = numpy_of(weight) * numpy_of(mask)
    setup = {"mask": mask, "beta": 0.3, "schedule": schedule, "budget": BUDGET[schedule]}
    _, stats, *_ = linear(kernels, tensors, needs_grad=(False, False, False), mask=mask, beta=0.3)
    accumulator = torch.full((V, H), 2.0, device=kernels.device)
    outputs = linear(kernels, tensors, row_weight=weight, stats=stats, accumulator=accumulator, **setup)
    truth = truth_of(clean, beta=0.3, row_weight=counted)
    assert (outputs[2][::7] == 0).all()
    for actual, expected in (
        (outputs[2], truth[1]),
        (accumulator - 2.0, truth[2]),
        (outputs[4], truth[3]),
    ):
        assert_near(actual, expected, 3e-3, 1e-5)
    loss, _, hidden, _, _ = linear(
        kernels, tensors, row_weight=weight, needs_grad=(True, False, False), **setup
    )
    np.testing.assert_allclose(numpy_of(loss), truth[0] * numpy_of(mask), rtol=1e-5)
    assert_near(hidden, truth[1], 3e-3)


def test_linear_close_to_the_teacher(kernels):
    """KL about 1e-3, where logits rounded to bf16 would cost tens of percent of the gradient."""
    tensors = problem(kernels, torch.bfloat16, distance=0.05)
    loss, *grads = truth_of(tensors, beta=0.0)
    assert loss.mean() < 4e-3
    for schedule in ("store", "recompute"):
        actual, _, *made = linear(kernels, tensors, schedule=schedule, budget=BUDGET[schedule])
        assert actual.double().mean().item() == pytest.approx(loss.mean(), rel=1e-5)
        for grad, truth in zip(made, grads, strict=True):
            assert_near(grad, truth, 3e-3)
    fused = linear(kernels, tensors, needs_grad=(False, False, False))[0]
    assert fused.double().mean().item() == pytest.approx(loss.mean(), rel=1e-5)


def test_linear_mixed_dtypes_and_no_rows(kernels):
    tensors = problem(kernels, torch.bfloat16)
    tensors[1] = tensors[1].float()
    tensors[3] = tensors[3].float()
    assert_linear(linear(kernels, tensors), truth_of(tensors, beta=0.0), torch.bfloat16)
    loss = linear(kernels, tensors, needs_grad=(False, False, False))[0]
    np.testing.assert_allclose(numpy_of(loss), truth_of(tensors, beta=0.0)[0], rtol=1e-5)
    empty = linear(kernels, [tensors[0][:0], tensors[1], tensors[2][:0], tensors[3]])
    assert empty[0].shape == (0,) and (empty[3] == 0).all() and (empty[4] == 0).all()


def test_repeats_bit_for_bit(kernels):
    tensors = problem(kernels, torch.bfloat16)
    for needs_grad in ((True, True, True), (False, False, False)):
        first, second = (linear(kernels, tensors, needs_grad=needs_grad) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
