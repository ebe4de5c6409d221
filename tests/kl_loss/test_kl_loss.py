"""kl_loss on rows of logits: values, gradients, identities."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minitron_kernels as mk
from kl_loss.oracle import oracle_rows
from kl_loss.problems import BETA, DTYPES, assert_gradient, make_rows, relative, to_numpy

pytestmark = pytest.mark.native
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", 0.2]


def value_and_grad(student, teacher, **options):
    student = student.detach().clone().requires_grad_()
    loss = mk.kl_loss(student, teacher, **options)
    loss.sum().backward()
    return loss.detach(), student.grad


# minitron.md's hand oracle: teacher ln[1, 2, 1], student 0, no temperature-squared factor
HAND = {
    (1.0, "forward_kl"): (0.058891518, [0.083333, -0.166667, 0.083333]),
    (1.0, "reverse_kl"): (0.056633013, [0.077016, -0.154033, 0.077016]),
    (1.0, "jsd"): (0.014362592, [0.019815, -0.039631, 0.019815]),
    (2.0, "forward_kl"): (0.014220593, [0.020220, -0.040440, 0.020220]),
    (2.0, "reverse_kl"): (0.013810359, [0.019254, -0.038508, 0.019254]),
    (2.0, "jsd"): (0.003498650, [0.004919, -0.009838, 0.004919]),
}


@pytest.mark.parametrize("temperature,divergence", HAND)
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_hand_oracle(temperature, divergence, backend, dtype):
    teacher = torch.tensor([[1.0, 2.0, 1.0]], dtype=dtype).log()
    loss, grad = value_and_grad(
        torch.zeros(1, 3, dtype=dtype),
        teacher,
        temperature=temperature,
        divergence=divergence,
        backend=backend,
    )
    value, gradient = HAND[temperature, divergence]
    assert loss.item() == pytest.approx(value, abs=5e-9 if dtype == torch.float64 else 1e-7)
    assert grad[0].tolist() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("rising", [False, True])
def test_against_float64(dtype, divergence, rising, simd_level):
    for N, V in [(3, 1), (9, 7), (5, 63), (4, 64), (3, 1025), (2, 5003)]:
        student, teacher = make_rows(N, V, dtype, rising=rising, seed=V)
        loss, grad = value_and_grad(
            student, teacher, divergence=divergence, temperature=1.5, reduction="none"
        )
        truth, truth_grad = oracle_rows(
            *to_numpy(student, teacher), beta=BETA.get(divergence, divergence), inv_tau=1 / 1.5
        )
        assert np.allclose(loss.numpy(), truth, rtol=2e-6, atol=2e-7)
        assert_gradient(grad, truth_grad, dtype, probability_norm=N**0.5)


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 3e-3)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_close_to_the_teacher(dtype, bound, divergence):
    student, teacher = make_rows(16, 4096, torch.float32, distance=0.04)
    teacher = teacher.to(dtype)
    student = (teacher.float() + torch.randn(16, 4096) * 0.04).to(dtype)
    loss, grad = value_and_grad(student, teacher, divergence=divergence, reduction="none")
    truth, truth_grad = oracle_rows(*to_numpy(student, teacher), beta=BETA.get(divergence, divergence))
    assert (loss > 0).all()
    assert abs(loss.double().sum().item() / truth.sum() - 1) <= 1e-5
    assert relative(grad, truth_grad) <= bound


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_softcap_scale_and_padding(divergence, simd_level):
    student, teacher = make_rows(6, 300, torch.float32, distance=2.0)
    teacher = torch.cat([teacher, torch.full((6, 20), float("nan"))], 1)  # padding is not read
    loss, grad = value_and_grad(
        student,
        teacher,
        divergence=divergence,
        vocab_size=290,
        student_softcap=5.0,
        teacher_softcap=7.0,
        student_logit_scale=1.5,
        teacher_logit_scale=0.5,
        temperature=2.0,
        temperature_squared=True,
        reduction="sum",
    )
    truth, truth_grad = oracle_rows(
        *to_numpy(student, teacher),
        beta=BETA.get(divergence, divergence),
        inv_tau=0.5,
        student_scale=1.5,
        student_softcap=5.0,
        teacher_scale=0.5,
        teacher_softcap=7.0,
        vocab_size=290,
    )
    assert loss.item() == pytest.approx(4 * truth.sum(), rel=2e-6)
    assert relative(grad, 4 * truth_grad) <= 1e-5
    assert (grad[:, 290:] == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_identities(divergence):
    student, teacher = make_rows(8, 999, torch.float32)
    loss, grad = value_and_grad(teacher, teacher, divergence=divergence, reduction="none")
    assert (loss.abs() <= 1e-7).all() and grad.abs().max() <= 1e-7
    loss, grad = value_and_grad(student, teacher, divergence=divergence, reduction="none")
    assert (grad.double().sum(1).abs() <= 1e-6).all()
    shifted, _ = value_and_grad(student + 3.0, teacher - 5.0, divergence=divergence, reduction="none")
    assert torch.allclose(loss, shifted, rtol=1e-4, atol=1e-6)
    assert torch.equal(
        value_and_grad(student, teacher, divergence=divergence)[1],
        value_and_grad(student, teacher, divergence=divergence)[1],
    )


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_masked_out_tokens(backend):
    inf = float("inf")
    student = torch.tensor([[0.0, 1.0, -inf, 2.0], [0.0, 1.0, -inf, 2.0]])
    teacher = torch.tensor([[1.0, -inf, -inf, 0.5], [1.0, 0.0, 0.5, 0.0]])
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        loss, grad = value_and_grad(
            student, teacher, divergence=divergence, reduction="none", backend=backend
        )
        truth, truth_grad = oracle_rows(*to_numpy(student, teacher), beta=BETA[divergence])
        assert loss.tolist() == pytest.approx(truth.tolist(), rel=1e-6)
        if np.isfinite(truth[0]):
            assert grad[0].tolist() == pytest.approx(truth_grad[0].tolist(), abs=1e-6)
    assert value_and_grad(student, teacher, reduction="none", backend=backend)[0][1] == inf
    capped = mk.kl_loss(student[:1], teacher[:1], student_softcap=2.0, teacher_softcap=2.0, backend=backend)
    assert capped.isfinite()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_nan_propagates_but_masked_rows_do_not_count(backend):
    student, teacher = make_rows(4, 100, torch.float32)
    student[1, 50] = float("nan")
    teacher[2, 99] = float("nan")
    loss, _ = value_and_grad(student, teacher, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, True, True, False]
    mask = torch.tensor([True, False, False, True])
    loss, grad = value_and_grad(student, teacher, mask=mask, backend=backend)
    kept = value_and_grad(student[mask], teacher[mask], backend=backend)
    assert loss.item() == pytest.approx(kept[0].item(), rel=1e-6)
    assert torch.equal(grad[mask], kept[1]) and (grad[~mask] == 0).all()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_labels_mask_and_reductions(backend):
    student, teacher = (x.reshape(2, 3, 50) for x in make_rows(6, 50, torch.float32))
    labels = torch.tensor([[1, -100, 2], [-100, 49, 0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rows = mk.kl_loss(student, teacher, labels=labels, mask=mask, reduction="none", backend=backend)
    counts = (labels != -100) & mask
    every = mk.kl_loss(student, teacher, reduction="none", backend=backend)
    assert rows.shape == (2, 3) and torch.equal(rows, torch.where(counts, every, 0.0))
    options = {"labels": labels, "mask": mask, "backend": backend}
    assert mk.kl_loss(student, teacher, **options).item() == pytest.approx(rows.sum().item() / 3)
    assert mk.kl_loss(student, teacher, reduction="sum", **options).item() == pytest.approx(rows.sum().item())
    for num_items in (12, torch.tensor(12)):
        assert mk.kl_loss(student, teacher, num_items=num_items, **options).item() == pytest.approx(
            rows.sum().item() / 12
        )
    none = mk.kl_loss(student, teacher, mask=torch.zeros(2, 3, dtype=torch.bool), backend=backend)
    assert none.item() == 0.0
    empty = torch.empty(0, 50)
    assert mk.kl_loss(empty, empty, backend=backend).item() == 0.0
    assert mk.kl_loss(empty, empty, reduction="sum", backend=backend).item() == 0.0
    assert mk.kl_loss(empty, empty, reduction="none", backend=backend).shape == (0,)


def test_strides_and_mixed_dtypes():
    student, teacher = make_rows(5, 70, torch.float32)
    wide = torch.zeros(5, 200)
    wide[:, 3:73] = student
    column_major = teacher.T.contiguous().T
    expected = value_and_grad(student, teacher)
    loss, grad = value_and_grad(wide[:, 3:73], column_major)
    assert torch.equal(loss, expected[0]) and torch.equal(grad, expected[1])
    view = wide[:, 3:73].requires_grad_()
    mk.kl_loss(view, column_major).backward()
    assert torch.equal(view.grad, expected[1])
    mixed = mk.kl_loss(student.bfloat16(), teacher)
    assert mixed.item() == pytest.approx(mk.kl_loss(student.bfloat16().float(), teacher).item(), rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    N=st.integers(0, 5),
    V=st.integers(1, 300),
    offset=st.integers(0, 17),
    beta=st.sampled_from([0.0, 1.0, 0.5, 0.05, 0.95]),
    temperature=st.floats(0.3, 5.0),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape_and_alignment(N, V, offset, beta, temperature, dtype, seed):
    storage = [torch.zeros(N * (V + offset) + offset, dtype=dtype) for _ in range(2)]
    views = [s[offset:].as_strided((N, V), (V + offset, 1)) for s in storage]
    for view, x in zip(views, make_rows(N, V, dtype, seed=seed), strict=True):
        view.copy_(x)
    loss, grad = value_and_grad(*views, divergence=beta, temperature=temperature, reduction="none")
    truth, truth_grad = oracle_rows(*to_numpy(*views), beta=beta, inv_tau=1 / temperature)
    assert np.allclose(loss.numpy(), truth, rtol=1e-5, atol=1e-6)
    assert np.allclose(grad.double().numpy(), truth_grad, rtol=1e-2, atol=1e-5)
