"""The CPU engines whose operands lie in tiles, AMX and AVX512_BF16: their portable twins everywhere, they
themselves where the CPU has them.

A twin is the same packing, the same loops and the same edges with plain vectors in place of the instructions.
Scratch memory is NaN before each call (tests/tools/poison.py), so padding that nobody wrote, or that is
multiplied by what nobody wrote, turns the results to NaN.
"""

import re

import numpy as np
import pytest
import torch

import minitron_kernels as mk
from kl_loss.oracle import oracle_linear, oracle_sparse
from kl_loss.problems import (
    BETA,
    GRADIENT_BOUND,
    force_operands,
    force_plan,
    make_linear,
    relative,
    threads,
    to_numpy,
)
from minitron_kernels import _native
from minitron_kernels.ops.kl_loss import engines_cpu, linear_cpu, plan_cpu

pytestmark = pytest.mark.native
SCHEDULES = ["store", "recompute"]
TWINS = ["portable_amx", "portable_avx512_bf16"]
REAL = ["amx", "avx512_bf16"]
BF16 = torch.bfloat16


def why_not(engine):
    return torch.ops.minitron_kernels.why_no_engine(engine)


def run(tensors, *, student_bias=None, **options):
    """Loss and the gradients to student hidden, head and bias."""
    hidden, head = (x.detach().clone().requires_grad_() for x in tensors[:2])
    bias = None if student_bias is None else student_bias.clone().requires_grad_()
    loss = mk.linear_kl_loss(hidden, head, *tensors[2:], student_bias=bias, **options)
    loss.sum().backward()
    return loss.detach(), hidden.grad, head.grad, None if bias is None else bias.grad


def assert_matches(result, truth, loss_rtol=1e-5):
    assert result[0].sum().item() == pytest.approx(truth[0].sum(), rel=loss_rtol)
    for name, grad, expected in zip(("hidden", "head", "bias"), result[1:], truth[1:], strict=True):
        if grad is not None:
            assert relative(grad, expected) <= GRADIENT_BOUND[BF16], name


@pytest.mark.parametrize("engine", [*TWINS, *REAL])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("divergence", list(BETA))
def test_every_option(monkeypatch, engine, schedule, divergence):
    """Sizes that fill no tile, chunks that do not divide, tiles kept and made twice, -inf, masked NaN."""
    force_operands(monkeypatch, engine)
    made = force_plan(monkeypatch, chunk_rows=128, tile=128, tile_group=3, stored_tiles=4)
    N, V, vocab_size = 197, 1100, 1037
    tensors = make_linear(N, 67, 83, V, BF16)
    keep = torch.arange(N) % 5 != 2
    tensors[0][~keep] = float("nan")
    tensors[1][vocab_size:] = float("nan")  # padding of the vocabulary is not read
    student_bias = torch.linspace(-9, 9, V)  # raises the maximum from tile to tile
    student_bias[5], student_bias[128:256] = -float("inf"), -float("inf")
    teacher_bias = student_bias.flip(0) * 0.5
    teacher_bias[5], teacher_bias[128:256], teacher_bias[900:] = -float("inf"), -float("inf"), 0
    if divergence == "reverse_kl":  # finite only where the student may go
        teacher_bias = torch.where(teacher_bias.isinf() & ~student_bias.isinf(), 0, teacher_bias)
    if divergence == "forward_kl":
        teacher_bias = torch.where(student_bias.isinf(), student_bias, teacher_bias)
    x, w, y, u = to_numpy(*tensors)
    loss, dx, dw, db = oracle_linear(
        x[keep], w[:vocab_size], y[keep], u[:vocab_size],
        student_bias=student_bias[:vocab_size].double().numpy(),
        teacher_bias=teacher_bias[:vocab_size].double().numpy(),
        row_weight=np.full(int(keep.sum()), 4.0), beta=BETA[divergence], inv_tau=0.5, student_scale=1.2,
        student_softcap=6.0, teacher_scale=0.8, teacher_softcap=8.0,
    )  # fmt: skip
    options = {
        "teacher_bias": teacher_bias, "mask": keep, "divergence": divergence, "schedule": schedule,
        "vocab_size": vocab_size, "temperature": 2.0, "temperature_squared": True, "reduction": "sum",
        "student_logit_scale": 1.2, "student_softcap": 6.0, "teacher_logit_scale": 0.8,
        "teacher_softcap": 8.0,
    }  # fmt: skip
    result = run(tensors, student_bias=student_bias, **options)
    assert made[0].num_chunks == 2
    assert (result[1][~keep] == 0).all() and (result[2][vocab_size:] == 0).all()
    cut = result[0] / 4, result[1][keep], result[2][:vocab_size], result[3][:vocab_size]
    assert_matches(cut, (loss, dx, dw, db))
    with torch.no_grad():
        alone = mk.linear_kl_loss(*tensors, student_bias=student_bias, **options)
    assert alone.item() == pytest.approx(4 * loss.sum(), rel=1e-5)


SIZES = [
    # tokens, H, Ht, V: rows and columns of a tile, its k, panels, the chain of products
    (1, 1, 2, 1),
    (3, 0, 2, 70),
    (3, 2, 0, 70),
    (1, 31, 33, 15),
    (2, 32, 16, 16),
    (15, 15, 31, 17),
    (16, 17, 32, 31),
    (17, 33, 64, 32),
    (33, 47, 65, 33),
    (63, 63, 255, 48),
    (64, 64, 256, 63),
    (65, 65, 257, 65),
    (96, 96, 288, 79),
    (130, 127, 511, 95),
    (257, 129, 513, 96),
    (300, 256, 96, 129),
    (513, 257, 40, 209),
]


@pytest.mark.parametrize("engine", [*TWINS, *REAL])
def test_around_every_size(monkeypatch, engine):
    """Loss per token and gradients in both schedules, which agree to the bit."""
    force_operands(monkeypatch, engine)
    for seed, (N, H, Ht, V) in enumerate(SIZES):
        tensors = make_linear(N, H, Ht, V, BF16, seed=seed)
        truth = oracle_linear(*to_numpy(*tensors), row_weight=np.ones(N))
        stored, again = (run(tensors, schedule=schedule, reduction="none") for schedule in SCHEDULES)
        assert all(torch.equal(a, b) for a, b in zip(stored[:3], again[:3], strict=True)), (N, H, Ht, V)
        np.testing.assert_allclose(stored[0].numpy(), truth[0], rtol=2e-5, atol=1e-6)
        for grad, expected in zip(stored[1:3], truth[1:3], strict=True):  # few elements: half an ulp of each
            error = np.linalg.norm(grad.double().numpy() - expected)
            assert error <= 2.0**-7 * np.linalg.norm(expected) + 1e-6, (N, H, Ht, V)


@pytest.mark.parametrize("engine", [*TWINS, *REAL])
@pytest.mark.parametrize("accumulator", [False, True])
def test_same_bits_for_any_thread_count(monkeypatch, engine, accumulator):
    """Chunks add up a head gradient of odd width in fp32, in the workspace or in the caller's buffer."""
    force_operands(monkeypatch, engine)
    force_plan(monkeypatch, chunk_rows=64, tile=64, tile_group=3, stored_tiles=5)
    N, H, V = 150, 45, 700
    tensors, results = make_linear(N, H, 40, V, BF16), []
    truth = oracle_linear(*to_numpy(*tensors), row_weight=np.full(N, 1 / N))
    for count in (1, 2, 3):
        for schedule in SCHEDULES:
            hidden, head = (x.detach().clone().requires_grad_() for x in tensors[:2])
            buffer = torch.ones(V, H + 3)[:, :H] if accumulator else None
            with threads(count):
                loss = mk.linear_kl_loss(
                    hidden, head, *tensors[2:], schedule=schedule, grad_head_accumulator=buffer
                )
                loss.backward()
            results.append((loss.detach(), hidden.grad, buffer - 1 if accumulator else head.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    for grad, expected in zip(results[0][1:], truth[1:3], strict=True):
        assert relative(grad, expected) <= GRADIENT_BOUND[BF16]


@pytest.mark.parametrize("engine", [*TWINS, *REAL])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_record_and_sparse_teacher(monkeypatch, engine, schedule):
    """Cross-entropy and the record's parts; a teacher of few ids, one of them in a tile's last entry."""
    force_operands(monkeypatch, engine)
    force_plan(monkeypatch, chunk_rows=64, tile=64, tile_group=2, stored_tiles=2)
    N, H, V, k = 77, 50, 333, 4
    tensors = make_linear(N, H, 39, V, BF16)
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(3))
    x, w = (t.double().requires_grad_() for t in tensors[:2])
    log_s = torch.log_softmax(x @ w.T, -1)
    ce = -log_s.gather(1, labels[:, None]).squeeze(1)
    entropy = -(log_s.exp() * log_s).sum(-1)
    log_t = torch.log_softmax(tensors[2].double() @ tensors[3].double().T, -1)
    kl = (log_t.exp() * (log_t - log_s)).sum(-1)
    (0.4 * kl + 0.6 * ce).mean().backward()
    hidden, head = (t.detach().clone().requires_grad_() for t in tensors[:2])
    record = mk.linear_kl_loss(
        hidden, head, *tensors[2:], labels=labels, kl_weight=0.4, ce_weight=0.6, return_parts=True,
        reduction="mean", schedule=schedule,
    )  # fmt: skip
    record.loss.backward()
    for name, value in (("kl", kl), ("ce", ce), ("entropy", entropy)):
        assert getattr(record, name).mean().item() == pytest.approx(value.mean().item(), rel=2e-5), name
    for grad, expected in ((hidden.grad, x.grad), (head.grad, w.grad)):
        assert relative(grad, expected.numpy()) <= GRADIENT_BOUND[BF16]

    ids = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(n))[:k] for n in range(N)])
    ids[0, 0] = 63 if not (ids[0] == 63).any() else ids[0, 0]
    logprobs = log_t.gather(1, ids).float()
    tail = torch.log1p(-logprobs.double().exp().sum(-1)).float()
    ordered = ids.sort(-1)
    outcomes = torch.cat([logprobs.gather(1, ordered.indices), tail[:, None]], 1).double().numpy()
    truth = oracle_sparse(
        *to_numpy(*tensors[:2]), ordered.values.numpy(), outcomes, row_weight=np.full(N, 1 / N),
        ce_weight=np.zeros(N), labels=labels.numpy(), beta=0.0,
    )  # fmt: skip
    hidden, head = (t.detach().clone().requires_grad_() for t in tensors[:2])
    loss = mk.linear_sparse_kl_loss(hidden, head, ids, logprobs, tail, schedule=schedule)
    loss.backward()
    assert loss.item() == pytest.approx(truth[0].mean(), rel=2e-5)
    for grad, expected in zip((hidden.grad, head.grad), truth[2:4], strict=True):
        assert relative(grad, expected) <= GRADIENT_BOUND[BF16]


@pytest.mark.parametrize("engine", TWINS)
def test_every_simd_level(monkeypatch, simd_level, engine):
    """Packing and twins are compiled once per level."""
    force_operands(monkeypatch, engine)
    tensors = make_linear(75, 51, 64, 217, BF16)
    truth = oracle_linear(*to_numpy(*tensors), row_weight=np.full(75, 1 / 75))
    result = run(tensors)
    assert_matches((result[0] * 75, *result[1:3], None), (truth[0], *truth[1:3], None))


@pytest.mark.parametrize("engine", REAL)
def test_an_engine_that_cannot_run_says_why(monkeypatch, engine):
    """A named engine never falls back; where it can run it computes what its twin does."""
    tensors = make_linear(40, 33, 33, 90, BF16)
    for module in (linear_cpu, plan_cpu):
        monkeypatch.setattr(module, "operand_type", lambda *dtypes: engine)
    if why := why_not(engine):
        with pytest.raises(ValueError, match=re.escape(f"cannot run: {why}")):
            mk.linear_kl_loss(*tensors)
        return
    real = run(tensors)
    force_operands(monkeypatch, f"portable_{engine}")
    for own, twin in zip(real[:3], run(tensors)[:3], strict=True):
        assert relative(own, twin.double().numpy()) <= 2.0**-8


def test_the_engine_that_is_chosen():
    """The fastest that can run, and the report names it or says what stands in the way."""
    chosen, report = engines_cpu.operand_type(BF16), _native.build_info()["gemm"]
    assert chosen == mk.plan_linear_kl_loss(64, 100, 8, 8, dtype=BF16).engine
    assert chosen in ("amx", "avx512_bf16", "bf16", "f32")
    if not why_not("amx"):
        assert chosen == "amx" and "AMX" in report
    else:
        assert chosen != "amx" and f"AMX: {why_not('amx')}" in report
    if chosen == "avx512_bf16":
        assert not why_not("avx512_bf16")
    with pytest.raises(RuntimeError, match="no engine brgemm"):
        why_not("brgemm")


def test_plans_that_tiles_do_not_fit():
    """A tile of the vocabulary holds at least one of k; only bf16 lies in tiles."""
    layout = torch.ops.minitron_kernels.linear_kl_loss_layout
    numbers = mk.plan_linear_kl_loss(64, 100, 8, 8, dtype=BF16, engine="portable_amx").numbers
    assert layout(64, 100, 8, 8, 4, True, True, False, numbers)
    for wrong in ([*numbers[:2], 30, *numbers[3:]], [*numbers[:5], 1, *numbers[6:]]):
        with pytest.raises(ValueError, match="plan out of range"):
            layout(64, 100, 8, 8, 4, True, True, False, wrong)
