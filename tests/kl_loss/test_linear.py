"""linear_kl_loss: values and gradients of both schedules and every operand type, options, reproducibility."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minitron_kernels as mk
from kl_loss.oracle import oracle_linear
from kl_loss.problems import (
    BETA,
    GRADIENT_BOUND,
    HAS_BF16,
    assert_no_worse,
    force_operands,
    force_plan,
    make_linear,
    relative,
    to_numpy,
)

pytestmark = pytest.mark.native
SCHEDULES = ["store", "recompute"]
# tensors' dtype, operands' type (None: what this CPU prefers)
CASES = [
    (torch.float64, None),
    (torch.float32, None),
    (torch.bfloat16, "bf16"),
    (torch.bfloat16, "portable_bf16"),
    (torch.bfloat16, "f32"),
    (torch.float16, None),
]


def run(tensors, *, student_bias=None, teacher_bias=None, **options):
    """Loss and the gradients to student hidden, head and bias."""
    hidden, head = (x.detach().clone().requires_grad_() for x in tensors[:2])
    bias = None if student_bias is None else student_bias.clone().requires_grad_()
    loss = mk.linear_kl_loss(
        hidden, head, *tensors[2:], student_bias=bias, teacher_bias=teacher_bias, **options
    )
    # fp16 needs the usual loss scale: gradients of a mean lie below its smallest number
    scale = 2.0**12 if tensors[0].dtype == torch.float16 else 1.0
    (loss.sum() * scale).backward()
    grads = [None if x is None else x.grad for x in (hidden, head, bias)]
    if scale != 1.0:
        grads = [None if g is None else g.float() / scale for g in grads]
    return (loss.detach(), *grads)


def truth_of(tensors, *, student_bias=None, teacher_bias=None, row_weight=None, **options):
    return oracle_linear(
        *to_numpy(*tensors),
        student_bias=to_numpy(student_bias)[0],
        teacher_bias=to_numpy(teacher_bias)[0],
        row_weight=row_weight,
        **options,
    )


def assert_matches(result, truth, dtype, loss_rtol=1e-5):
    loss, *grads = result
    assert loss.item() == pytest.approx(truth[0], rel=loss_rtol)
    for name, grad, expected in zip(("hidden", "head", "bias"), grads, truth[1:], strict=True):
        if grad is not None:
            assert relative(grad, expected) <= GRADIENT_BOUND[dtype], name


@pytest.mark.parametrize("dtype,operands", CASES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", 0.3])
def test_against_float64(monkeypatch, dtype, operands, schedule, divergence):
    """Odd sizes: no panel, tile or pair is full; biases that raise the maximum from tile to tile."""
    force_operands(monkeypatch, operands)
    N, H, Ht, V = 97, 67, 83, 1157
    tensors = make_linear(N, H, Ht, V, dtype)
    bias = torch.linspace(-9, 9, V, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    options = {"student_bias": bias, "teacher_bias": bias.flip(0) * 0.5}
    result = run(tensors, schedule=schedule, divergence=divergence, temperature=1.5, **options)
    loss, *grads = truth_of(
        tensors,
        beta=BETA.get(divergence, divergence),
        inv_tau=1 / 1.5,
        row_weight=np.full(N, 1 / N),
        **options,
    )
    assert_matches(result, (loss.mean(), *grads), dtype)


@pytest.mark.parametrize("dtype,operands", CASES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_close_to_the_teacher(monkeypatch, dtype, operands, schedule, temperature):
    """KL about 1e-3, where logits rounded to bf16 cost 17 to 51 % of the gradient."""
    force_operands(monkeypatch, operands)
    N, V = 128, 4096
    tensors = make_linear(N, 128, 160, V, dtype, distance=0.05)
    loss, *grads = truth_of(tensors, inv_tau=1 / temperature, row_weight=np.full(N, 1 / N))
    assert 1e-4 < loss.mean() < 4e-3
    result = run(tensors, schedule=schedule, temperature=temperature)
    assert result[0].item() == pytest.approx(loss.mean(), rel=1e-5)
    if dtype == torch.float32:  # the logits' last bits: no worse than PyTorch's own
        own = [x.clone().requires_grad_(i < 2) for i, x in enumerate(tensors)]
        log_s, log_t = (
            torch.log_softmax(x @ w.T / temperature, -1) for x, w in ((own[0], own[1]), (own[2], own[3]))
        )
        torch.nn.functional.kl_div(log_s, log_t, log_target=True, reduction="batchmean").backward()
        for grad, baseline, truth in zip(result[1:3], own[:2], grads[:2], strict=True):
            assert_no_worse(grad, baseline.grad, truth, floor=1e-5)
    else:
        for grad, truth in zip(result[1:3], grads[:2], strict=True):
            assert relative(grad, truth) <= GRADIENT_BOUND[dtype]


@pytest.mark.parametrize("operands", ["bf16", "portable_bf16", "f32"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_chunks_of_rows_and_tile_groups(monkeypatch, operands, schedule):
    """Rows in several chunks, tiles in several groups; head gradients then add up in fp32."""
    force_operands(monkeypatch, operands)
    N, H, V = 700, 48, 2500
    tensors = make_linear(N, H, 56, V, torch.bfloat16)
    made = force_plan(monkeypatch, chunk_rows=192, tile_group=3)
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        loss, *grads = truth_of(tensors, beta=BETA[divergence], row_weight=np.full(N, 1 / N))
        options = {"divergence": divergence, "schedule": schedule}
        bias = torch.zeros(V)
        result = run(tensors, student_bias=bias, **options)
        assert_matches(result, (loss.mean(), *grads), torch.bfloat16)
        rows = run(tensors, reduction="none", **options)[0]
        assert np.allclose(rows.numpy(), loss, rtol=2e-5)
        assert made[-1].num_chunks == 4 and made[-1].part_bytes[-1] > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_softcap_scale_padding_and_masked_out_tokens(schedule, divergence):
    N, V, vocab_size = 40, 400, 389
    tensors = make_linear(N, 32, 48, V, torch.float32)
    bias = torch.randn(V, generator=torch.Generator().manual_seed(1))
    bias[5], bias[300:310] = -float("inf"), -float("inf")
    teacher_bias = bias.clone()
    teacher_bias[17] = -float("inf")
    tensors[1][vocab_size:] = float("nan")  # padding is not read
    shared = {"student_bias": bias, "teacher_bias": teacher_bias}
    if divergence == "forward_kl":
        teacher_bias[:17] = -float("inf")
    loss, *grads = truth_of(
        [tensors[0], tensors[1][:vocab_size], tensors[2], tensors[3][:vocab_size]],
        student_bias=bias[:vocab_size],
        teacher_bias=teacher_bias[:vocab_size],
        row_weight=np.full(N, 4.0),
        beta=BETA[divergence],
        inv_tau=0.5,
        student_scale=1.2,
        student_softcap=6.0,
        teacher_scale=0.8,
        teacher_softcap=8.0,
    )
    result = run(
        tensors,
        divergence=divergence,
        schedule=schedule,
        vocab_size=vocab_size,
        temperature=2.0,
        temperature_squared=True,
        reduction="sum",
        student_logit_scale=1.2,
        student_softcap=6.0,
        teacher_logit_scale=0.8,
        teacher_softcap=8.0,
        **shared,
    )
    assert result[0].item() == pytest.approx(4 * loss.sum(), rel=1e-5)
    assert relative(result[1], grads[0]) <= 1e-5
    for grad, truth in zip(result[2:], grads[1:], strict=True):
        assert relative(grad[:vocab_size], truth) <= 1e-5
        assert (grad[vocab_size:] == 0).all() and (grad[5] == 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_masked_tokens_are_skipped(schedule):
    """As if they were not there, to the bit, even where they hold NaN."""
    N = 150
    hidden, head, teacher_hidden, teacher_head = make_linear(N, 32, 40, 700, torch.bfloat16)
    labels = torch.randint(0, 700, (N,), generator=torch.Generator().manual_seed(2))
    labels[::3] = -100
    keep = labels != -100
    hidden[~keep] = float("nan")
    loss, dx, dw, _ = run((hidden, head, teacher_hidden, teacher_head), labels=labels, schedule=schedule)
    expected = run((hidden[keep], head, teacher_hidden[keep], teacher_head), schedule=schedule)
    assert torch.equal(loss, expected[0]) and torch.equal(dw, expected[2])
    assert torch.equal(dx[keep], expected[1]) and (dx[~keep] == 0).all()
    rows = run((hidden, head, teacher_hidden, teacher_head), mask=keep, reduction="none", schedule=schedule)[
        0
    ]
    assert (rows[~keep] == 0).all() and rows[keep].mean().item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("empty", ["masked", "no rows"])
def test_nothing_to_learn_from(empty):
    N = 4 if empty == "masked" else 0
    tensors = make_linear(N, 16, 16, 100, torch.float32)
    mask = torch.zeros(N, dtype=torch.bool)
    bias = torch.zeros(100)
    for reduction in ("mean", "sum", "none"):
        loss, *grads = run(tensors, mask=mask, reduction=reduction, student_bias=bias)
        assert (loss == 0).all() and all((g == 0).all() for g in grads)
    with torch.no_grad():
        assert mk.linear_kl_loss(*tensors, mask=mask).item() == 0.0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_nan_is_not_hidden(schedule, dtype):
    tensors = make_linear(70, 16, 24, 300, dtype)
    tensors[2][65, 3] = float("nan")
    loss, dx, dw, _ = run(tensors, reduction="none", schedule=schedule)
    assert loss.isnan().nonzero().tolist() == [[65]]
    assert dx[65].isnan().all() and not dx[:65].isnan().any() and dw.isnan().all()
    with torch.no_grad():
        assert mk.linear_kl_loss(*tensors).isnan()


@pytest.mark.parametrize(
    "dtype,operands",
    [
        (torch.bfloat16, "bf16"),
        (torch.bfloat16, "portable_bf16"),
        (torch.bfloat16, "f32"),
        (torch.float32, None),
    ],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_same_bits_every_time_and_for_any_thread_count(monkeypatch, dtype, operands, schedule):
    force_operands(monkeypatch, operands)
    tensors = make_linear(200, 96, 64, 3000, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5, 1):
            torch.set_num_threads(count)
            results.append(run(tensors, schedule=schedule, workspace_bytes=40 << 20))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][:3], other[:3], strict=True))


def test_schedules_and_forward_only_agree():
    tensors = make_linear(100, 64, 80, 2000, torch.float32, distance=0.1)
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        stored, recomputed = (run(tensors, schedule=s, divergence=divergence) for s in SCHEDULES)
        assert all(torch.equal(a, b) for a, b in zip(stored[:3], recomputed[:3], strict=True))
        with torch.no_grad():
            alone = mk.linear_kl_loss(*tensors, divergence=divergence)
        assert alone.item() == pytest.approx(stored[0].item(), rel=1e-5)


@pytest.mark.parametrize(
    "dtype,operands",
    [
        (torch.float64, None),
        (torch.float32, None),
        (torch.bfloat16, "bf16"),
        (torch.bfloat16, "portable_bf16"),
        (torch.float16, None),
    ],
)
def test_every_simd_level(monkeypatch, simd_level, dtype, operands):
    force_operands(monkeypatch, operands)
    for divergence in ("forward_kl", "jsd"):
        tensors = make_linear(75, 51, 64, 517, dtype)
        loss, *grads = truth_of(tensors, beta=BETA[divergence], row_weight=np.full(75, 1 / 75))
        bias = torch.zeros(517, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        result = run(tensors, divergence=divergence, student_bias=bias)
        assert_matches(result, (loss.mean(), *grads), dtype)


def test_gradients_only_where_wanted():
    tensors = make_linear(64, 32, 32, 500, torch.float32)
    full = run(tensors, student_bias=torch.zeros(500))
    for wanted in range(3):
        parts = [tensors[0].clone(), tensors[1].clone(), torch.zeros(500)]
        parts[wanted].requires_grad_()
        mk.linear_kl_loss(parts[0], parts[1], *tensors[2:], student_bias=parts[2]).backward()
        grads = [p.grad for p in parts]
        assert torch.equal(grads.pop(wanted), full[1 + wanted]) and grads == [None, None]


def test_per_token_loss_takes_any_incoming_gradient():
    N = 96
    tensors = make_linear(N, 32, 40, 900, torch.float64)
    weight = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        hidden, head = (x.clone().requires_grad_() for x in tensors[:2])
        bias = torch.zeros(900, dtype=torch.float64, requires_grad=True)
        rows = mk.linear_kl_loss(
            hidden.reshape(4, 24, 32),
            head,
            tensors[2].reshape(4, 24, 40),
            tensors[3],
            student_bias=bias,
            reduction="none",
            divergence=divergence,
            temperature=2.0,
            temperature_squared=True,
        )
        assert rows.shape == (4, 24)
        (rows.reshape(-1) * weight).sum().backward()
        _, *grads = truth_of(tensors, beta=BETA[divergence], inv_tau=0.5, row_weight=4 * weight.numpy())
        for grad, truth in zip((hidden.grad, head.grad, bias.grad), grads, strict=True):
            assert relative(grad, truth) <= 1e-11


def test_reference_backend_agrees():
    tensors = make_linear(300, 24, 32, 200, torch.float32)
    mask = torch.arange(300) % 4 != 0
    options = {"mask": mask, "student_softcap": 4.0, "divergence": 0.3, "temperature": 1.3}
    for reduction in ("mean", "none"):
        native = run(tensors, reduction=reduction, **options)
        reference = run(tensors, reduction=reduction, backend="reference", **options)
        for a, b in zip(native[:3], reference[:3], strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    N=st.integers(1, 140),
    H=st.integers(1, 70),
    Ht=st.integers(1, 70),
    V=st.integers(2, 400),
    case=st.sampled_from([case for case in CASES if case[1] != "bf16" or HAS_BF16]),
    schedule=st.sampled_from(SCHEDULES),
    beta=st.sampled_from([0.0, 1.0, 0.4]),
    seed=st.integers(0, 9),
)
def test_any_shape(N, H, Ht, V, case, schedule, beta, seed):
    dtype, operands = case
    with pytest.MonkeyPatch.context() as patch:
        force_operands(patch, operands)
        tensors = make_linear(N, H, Ht, V, dtype, seed=seed)
        result = run(tensors, schedule=schedule, divergence=beta)
    loss, *grads = truth_of(tensors, beta=beta, row_weight=np.full(N, 1 / N))
    assert result[0].item() == pytest.approx(loss.mean(), rel=2e-5, abs=1e-7)
    # a probability close to 1 carries a few roundings of fp32; a gradient carries them times its operand
    for grad, truth, operand in zip(result[1:3], grads[:2], (tensors[1], tensors[0]), strict=True):
        bound = 2e-2 * np.abs(truth).max() + 8 * 2.0**-24 * operand.abs().max().item()
        assert np.abs(grad.double().numpy() - truth).max() <= bound
