"""Both losses at the edges of what floats hold: blocks that underflow, −inf, one token with all the mass."""

import numpy as np
import pytest
import torch

import minitron_kernels as mk
from kl_loss.edges import (
    INF,
    TEMPERATURES,
    assert_losses,
    assert_rows,
    bias_edges,
    finite_rows,
    grad_bound,
    grad_is_defined,
    linear_of,
    masked_out_rows,
    truth,
)
from kl_loss.problems import BETA, force_operands, make_linear

pytestmark = pytest.mark.native
DIVERGENCES = {**BETA, 0.3: 0.3}
PRECISION = {
    torch.float32: {"ulp": 2.0**-23},
    torch.float64: {"ulp": 2.0**-46},  # NumPy's sums of the truth are no better
    torch.bfloat16: {"ulp": 2.0**-23, "rounding": 2.0**-8},
}
SMALLEST = {torch.float64: 2.0**-1022}


def truth_of(rows, dtype, **options):
    smallest = SMALLEST.get(dtype)
    return truth(
        rows.student, rows.teacher, **options, **({} if smallest is None else {"smallest": smallest})
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", ["native", "native, float64", "reference, float64"])
def test_rows(kind, divergence, temperature):
    """1024 logits of a row are read at a time; V = 1 and 2 beside that."""
    dtype = torch.float64 if "float64" in kind else torch.float32
    options = {"beta": DIVERGENCES[divergence], "temperature": temperature}
    for V, block in ((1, 64), (2, 1), (300, 64), (2100, 1024)):
        for rows in (finite_rows(V, block), masked_out_rows(V, block)):
            student = rows.student.to(dtype).requires_grad_()
            loss = mk.kl_loss(
                student,
                rows.teacher.to(dtype),
                divergence=divergence,
                temperature=temperature,
                reduction="none",
                backend=kind.split(",")[0],
            )
            loss.sum().backward()
            expected = truth_of(rows, dtype, **options)
            assert_rows(rows.names, loss, student.grad, expected, **options, **PRECISION[dtype])


def test_the_reference_in_fp32_has_the_same_infinities():
    for make in (finite_rows, masked_out_rows):
        rows = make(300, 64)
        for divergence in DIVERGENCES:
            losses = [
                mk.kl_loss(rows.student, rows.teacher, divergence=divergence, reduction="none", backend=b)
                for b in ("native", "reference")
            ]
            kinds = [torch.stack([x.isnan(), x.isinf(), x.isfinite()]) for x in losses]
            assert torch.equal(*kinds)


def test_rows_at_every_simd_level(simd_level):
    for divergence, beta in DIVERGENCES.items():
        rows = finite_rows(300, 64)
        student = rows.student.clone().requires_grad_()
        loss = mk.kl_loss(student, rows.teacher, divergence=divergence, reduction="none")
        loss.sum().backward()
        options = {"beta": beta, "temperature": 1.0}
        assert_rows(rows.names, loss, student.grad, truth_of(rows, torch.float32, **options), **options)


@pytest.mark.parametrize("beta", [1e-9, 1e-4, 1 - 1e-4, 1 - 1e-9])
def test_mixtures_of_almost_one_model(beta):
    """1 - beta in fp32 has few digits or none, and no log-ratio to a mixture that lost a model is finite."""
    for rows in (finite_rows(300, 64), masked_out_rows(300, 64)):
        student = rows.student.clone().requires_grad_()
        loss = mk.kl_loss(student, rows.teacher, divergence=beta, reduction="none")
        loss.sum().backward()
        options = {"beta": beta, "temperature": 1.0}
        assert_rows(rows.names, loss, student.grad, truth_of(rows, torch.float32, **options), **options)


def mixture_truth(student, teacher, beta):
    """Losses of rows and d (their sum) / d student, by log1p and expm1 in float64: no digit is lost."""
    s, t = student.double().requires_grad_(), teacher.double()
    log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
    s_over_m = -torch.log1p(beta * torch.expm1(log_t - log_s))
    t_over_m = log_t - log_s + s_over_m
    loss = (beta * log_t.exp() * t_over_m + (1 - beta) * log_s.exp() * s_over_m).sum(-1)
    loss.sum().backward()
    return loss.detach(), s.grad


def mixture_beside_truth(beta, distance, backend):
    """Losses and gradients of models so far apart, each beside its truth."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(16, 1000, generator=generator) * 2
    teacher = student + distance * torch.randn(16, 1000, generator=generator)
    loss, grad = mixture_truth(student, teacher, beta)
    student.requires_grad_()
    got = mk.kl_loss(student, teacher, divergence=beta, reduction="none", backend=backend)
    got.sum().backward()
    return (got.detach().double(), loss), (student.grad.double(), grad)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("distance", [1.0, 0.01])
@pytest.mark.parametrize("beta", [1e-8, 1e-5, 1e-3, 0.3, 1 - 1e-3, 1 - 1e-5, 1 - 1e-8])
def test_a_share_near_0_leaves_loss_and_gradient_their_digits(beta, distance, backend, simd_level):
    """They are then many digits smaller than the probabilities that they are made of."""
    (got, loss), (got_grad, grad) = mixture_beside_truth(beta, distance, backend)
    assert ((got - loss).abs() / loss).max() < 1e-5
    assert (got_grad - grad).norm() / grad.norm() < 1e-5


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("distance", [1e-4, 1e-5])
@pytest.mark.parametrize("beta", [1e-8, 1e-5, 0.5, 1 - 1e-5])
def test_a_mixture_close_to_its_models(beta, distance, backend, simd_level):
    """Its loss goes with the square of log-ratios, and no term of it is below 0."""
    (got, loss), (got_grad, grad) = mixture_beside_truth(beta, distance, backend)
    # log-sum-exps are rounded to fp32, and the loss has the square of that
    allowed = 1e-5 * loss + 3e-14 * beta * (1 - beta)
    assert ((got - loss).abs() <= allowed).all()
    assert (got_grad - grad).norm() / grad.norm() < 1e-5


def test_a_mixture_of_models_that_all_but_agree_is_not_negative(simd_level):
    for V in (2, 17, 1000):
        for distance in (1e-5, 1e-6, 1e-7, 1e-8):
            generator = torch.Generator().manual_seed(V)
            teacher = torch.randn(64, V, generator=generator)
            student = teacher + distance * torch.randn(64, V, generator=generator)
            for beta in (1e-5, 0.1, 0.5):
                assert (mk.kl_loss(student, teacher, divergence=beta, reduction="none") >= 0).all()


ENGINES = [
    (torch.float32, None),
    (torch.bfloat16, "bf16"),
    (torch.bfloat16, "portable_bf16"),
    (torch.float64, None),
]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("schedule", ["store", "recompute"])
@pytest.mark.parametrize("dtype,engine", ENGINES)
def test_linear(monkeypatch, dtype, engine, schedule, divergence, temperature):
    """Losses per token, with their gradients, and without."""
    force_operands(monkeypatch, engine)
    rows = finite_rows(300, 64)
    hidden, head, *teacher = linear_of(rows, dtype)
    options = {"beta": DIVERGENCES[divergence], "temperature": temperature}
    expected = truth_of(rows, dtype, **options)
    call = {"divergence": divergence, "temperature": temperature, "schedule": schedule, "reduction": "none"}
    with torch.no_grad():
        assert_losses(rows.names, mk.linear_kl_loss(hidden, head, *teacher, **call), expected)
    hidden.requires_grad_(), head.requires_grad_()
    loss = mk.linear_kl_loss(hidden, head, *teacher, **call)
    loss.sum().backward()
    precision = PRECISION[dtype]
    assert_rows(rows.names, loss, head.grad.T, expected, **options, **{**precision, "ulp": 2.0**-23})
    if dtype != torch.bfloat16:  # whose dX adds products of rounded dz with logits of 1e4
        weights = head.detach().double().numpy()
        errors = np.abs(hidden.grad.double().numpy() - expected.grad @ weights)
        terms = np.abs(expected.grad) @ np.abs(weights)
        bound = grad_bound(expected, **options)[:, None] * np.linalg.norm(weights, axis=0)
        assert (errors <= bound + 1e-5 * terms).all()


@pytest.mark.parametrize("schedule,engine", [("store", None), ("recompute", "portable_bf16")])
def test_one_token_at_a_time(monkeypatch, schedule, engine):
    """N = 1, and the loss of a call that makes gradients, which is summed another way than without them."""
    force_operands(monkeypatch, engine)
    rows = finite_rows(300, 64)
    dtype = torch.bfloat16 if engine else torch.float32
    hidden, head, teacher_hidden, teacher_head = linear_of(rows, dtype)
    for divergence, beta in DIVERGENCES.items():
        for temperature in TEMPERATURES:
            losses = torch.stack(
                [
                    mk.linear_kl_loss(
                        hidden[n : n + 1].clone().requires_grad_(),
                        head,
                        teacher_hidden[n : n + 1],
                        teacher_head,
                        divergence=divergence,
                        temperature=temperature,
                        schedule=schedule,
                    )
                    for n in range(len(rows.names))
                ]
            )
            assert_losses(rows.names, losses, truth_of(rows, dtype, beta=beta, temperature=temperature))


@pytest.mark.parametrize("V,tile", [(1, 64), (2, 64), (1100, 128), (16500, 256)])
def test_linear_at_the_borders_of_other_tiles(V, tile):
    rows = finite_rows(V, tile)
    tensors = linear_of(rows)
    tensors[1].requires_grad_()
    for divergence, beta in BETA.items():
        options = {"beta": beta, "temperature": 1.0}
        expected = truth_of(rows, torch.float32, **options)
        loss = mk.linear_kl_loss(*tensors, divergence=divergence, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), tensors[1])
        assert_rows(rows.names, loss, grad.T, expected, **options)


@pytest.mark.parametrize("V,tile", [(300, 64), (64, 64), (129, 64)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_biases(divergence, V, tile):
    """Whole tiles and parts of them masked out, or almost, in one model or both."""
    tensors = make_linear(5, 24, 32, V, torch.float32)
    zs, zt = (x.double() @ w.double().T for x, w in (tensors[:2], tensors[2:]))
    options = {"beta": DIVERGENCES[divergence], "temperature": 1.0}
    for name, student_bias, teacher_bias in bias_edges(V, tile):
        biases = {"student_bias": student_bias, "teacher_bias": teacher_bias}
        expected = truth(
            zs if student_bias is None else zs + student_bias.double(),
            zt if teacher_bias is None else zt + teacher_bias.double(),
            **options,
        )
        names = [f"{name}, row {n}" for n in range(5)]
        call = {"divergence": divergence, "reduction": "none", **biases}
        with torch.no_grad():
            alone = mk.linear_kl_loss(*tensors, **call)
        assert_losses(names, alone, expected, ulp=2.0**-20)  # the logits are those of an fp32 GEMM
        for schedule in ("store", "recompute"):
            hidden, head = (x.clone().requires_grad_() for x in tensors[:2])
            loss = mk.linear_kl_loss(hidden, head, *tensors[2:], schedule=schedule, **call)
            assert_losses(names, loss, expected, ulp=2.0**-20)
            if grad_is_defined(expected, options["beta"]).all():
                loss.sum().backward()
                for grad, true in (
                    (hidden.grad, expected.grad @ tensors[1].double().numpy()),
                    (head.grad, expected.grad.T @ tensors[0].double().numpy()),
                ):
                    assert np.linalg.norm(grad.double().numpy() - true) <= 1e-5 * np.linalg.norm(true) + 1e-6
                masked_out = None if student_bias is None else student_bias == -INF
                if masked_out is not None:
                    assert (head.grad[masked_out] == 0).all()


def test_no_possible_token():
    """A row without one has no loss: NaN, with gradients and without."""
    tensors = make_linear(3, 16, 16, 100, torch.float32)
    nothing = torch.full((100,), -INF)
    for biases in ({"student_bias": nothing}, {"teacher_bias": nothing}):
        for divergence in DIVERGENCES:
            with torch.no_grad():
                assert mk.linear_kl_loss(*tensors, divergence=divergence, **biases).isnan()
            hidden = tensors[0].clone().requires_grad_()
            assert mk.linear_kl_loss(hidden, *tensors[1:], divergence=divergence, **biases).isnan()
