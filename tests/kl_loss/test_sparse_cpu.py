"""linear_sparse_kl_loss on the CPU: every engine and schedule against the definition in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kl_loss.oracle import oracle_metrics, oracle_sparse
from kl_loss.problems import (
    BETA,
    GRADIENT_BOUND,
    assert_no_worse,
    force_operands,
    force_plan,
    make_linear,
    relative,
    threads,
    to_numpy,
)
from minitron_kernels.ops.kl_loss import plan_cpu
from minitron_kernels.ops.kl_loss.linear import Teacher, linear_kl_rows
from minitron_kernels.ops.kl_loss.linear_op import linear_kl_loss_op
from minitron_kernels.ops.kl_loss.options import loss_options

pytestmark = pytest.mark.native
SCHEDULES = ["store", "recompute"]
ENGINES = [
    (torch.float64, None),
    (torch.float32, None),
    (torch.bfloat16, "bf16"),
    (torch.bfloat16, "portable_bf16"),
    (torch.bfloat16, "f32"),
    (torch.float16, None),
]
# divergence, temperature, label smoothing, softcap
CASES = [
    ("forward_kl", 1.0, 0.0, None),
    ("forward_kl", 2.0, 0.1, 6.0),
    ("reverse_kl", 1.0, 0.1, None),
    ("jsd", 0.5, 0.0, None),
    (0.3, 1.0, 0.0, 6.0),
]
KL, CE = 0.4, 0.6  # weights of a mixed loss
BOUND = {torch.float64: 1e-12}


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_teacher(N, V, k, dtype, *, seed=0, borders=()):
    """Ids of each row, `borders` among them, fewer in some rows and none in row 3; log-probabilities."""
    rng = np.random.default_rng(seed)
    ids = np.full((N, k), -1)
    for n in range(N):
        often = [0, k, k, k // 2, k][n % 5] if n != 3 else 0
        chosen = rng.permutation([*borders[:often], *rng.choice(V, often, replace=False)])
        chosen = np.unique(chosen)[: min(often, k)] if n % 2 else np.unique(chosen)[-often:][:often]
        ids[n, : len(chosen)] = chosen
    outcomes = rng.normal(size=(N, k + 1)) * 2
    outcomes[:, :-1][ids < 0] = -np.inf
    return torch.from_numpy(ids), torch.from_numpy(outcomes).to(wide(dtype))


def options_of(case):
    divergence, temperature, smoothing, softcap = case
    return loss_options(
        divergence=divergence,
        temperature=temperature,
        student_softcap=softcap,
        teacher_softcap=None,
        student_logit_scale=1.0,
        teacher_logit_scale=1.0,
        label_smoothing=smoothing,
    )


def definition(case):
    divergence, temperature, smoothing, softcap = case
    return {
        "beta": BETA.get(divergence, divergence),
        "inv_tau": 1 / temperature,
        "label_smoothing": smoothing,
        "student_softcap": softcap or 0.0,
    }


def run(
    student, teacher, case, *, mask=None, bias=None, weights=None, labels=None, schedule="auto", lent=None
):
    """The loss, the terms of tokens, and gradients to hidden, head and bias of a mixed loss."""
    hidden, head = (x.clone().requires_grad_() for x in student)
    bias = None if bias is None else bias.clone().requires_grad_()
    V, (kl, ce) = head.shape[0], weights
    result, terms = linear_kl_rows(
        (hidden, head, bias), Teacher(ids=teacher[0], outcomes=teacher[1]), mask, kl, lent, V,
        options_of(case), "native", schedule, 1 << 28, labels=labels, ce_weight=ce, needs_metrics=True,
    )  # fmt: skip
    # fp16 needs the usual loss scale: gradients of a mean lie below its smallest number
    scale = 2.0**12 if head.dtype == torch.float16 else 1.0
    (result * scale).backward()
    grads = [None if x is None or x.grad is None else x.grad for x in (hidden, head, bias)]
    return result, terms, [g if g is None or scale == 1.0 else g.float() / scale for g in grads]


def check(dtype, result, terms, grads, student, teacher, case, counted, weights, labels, bias=None):
    """Against oracles."""
    X, W = to_numpy(*student)
    b = None if bias is None else to_numpy(bias)[0]
    w = [np.where(counted, x.double().expand(len(X)).numpy(), 0.0) for x in weights]
    targets = np.where(counted, labels.numpy(), -1)
    loss, _, *truths = oracle_sparse(
        X, W, teacher[0].numpy(), to_numpy(teacher[1])[0], student_bias=b, row_weight=w[0], ce_weight=w[1],
        labels=targets, **definition(case),
    )  # fmt: skip
    metrics = oracle_metrics(X @ W.T + (0.0 if b is None else b), targets, **definition(case))
    bound = BOUND.get(dtype, 1e-5)
    for term, rows in zip(terms, (loss, *metrics[:3]), strict=True):
        np.testing.assert_allclose(
            term.detach().double().numpy()[counted], rows[counted], rtol=bound, atol=bound / 10
        )
        assert (term[~torch.from_numpy(counted)] == 0).all()
    total = (w[0] * loss)[counted].sum() + (w[1] * metrics[0])[counted].sum()
    assert result.item() == pytest.approx(total, rel=bound)
    for name, grad, truth in zip(("hidden", "head", "bias"), grads, truths, strict=True):
        if grad is not None:
            assert relative(grad, truth) <= GRADIENT_BOUND[dtype], name


def per_token(N, dtype):
    g = torch.Generator().manual_seed(5)
    return [(torch.rand(N, generator=g) * x / N).to(wide(dtype)) for x in (KL, CE)]


def labels_of(ids, V, seed=0):
    """Of every third token, one of its ids."""
    labels = torch.randint(0, V, ids.shape[:1], generator=torch.Generator().manual_seed(seed))
    if ids.shape[1]:
        labels[::3] = torch.where(ids[::3, 0] >= 0, ids[::3, 0], labels[::3])
    return labels


@pytest.mark.parametrize(("dtype", "operands"), ENGINES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(monkeypatch, dtype, operands, schedule, case):
    """Ids at the borders of tiles, chunks that do not divide, tiles kept and made twice, a rising bias."""
    force_operands(monkeypatch, operands)
    made = force_plan(monkeypatch, chunk_rows=64, tile=128, tile_group=3, stored_tiles=5)
    N, V = 171, 1157
    student = make_linear(N, 35, 43, V, dtype)[:2]
    teacher = make_teacher(N, V, 9, dtype, borders=[0, 127, 128, 255, 256, V - 1])
    bias = torch.linspace(-9, 9, V, dtype=wide(dtype))
    mask, labels, weights = torch.arange(N) % 6 > 0, labels_of(teacher[0], V), per_token(N, dtype)
    of_kernel = torch.where(mask, labels, -1)
    got = run(
        student, teacher, case, mask=mask, bias=bias, weights=weights, labels=of_kernel, schedule=schedule
    )
    assert made[0].num_chunks == 3 and made[0].num_gemms == {"store": 3, "recompute": 4}[schedule]
    check(dtype, *got, student, teacher, case, mask.numpy(), weights, labels, bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_simd_level(simd_level, dtype):
    N, V = 75, 333
    student, teacher = make_linear(N, 33, 40, V, dtype)[:2], make_teacher(N, V, 9, dtype)
    labels, weights = labels_of(teacher[0], V), per_token(N, dtype)
    for case in (*CASES[:2], CASES[3]):
        got = run(student, teacher, case, weights=weights, labels=labels)
        check(dtype, *got, student, teacher, case, np.ones(N, bool), weights, labels)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [0, 1, 150])
def test_none_and_all_tokens_as_ids(case, k):
    """Without ids there is one outcome, and nothing to learn from; with all of them no tail."""
    N, V = 70, 150
    student = make_linear(N, 16, 20, V, torch.float64)[:2]
    ids = torch.arange(k).expand(N, k).contiguous()
    outcomes = torch.randn(N, k + 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outcomes[:, -1] = -math.inf if k == V else outcomes[:, -1]
    labels, weights = labels_of(ids, V), per_token(N, torch.float64)
    for ce in (weights[1], None):
        got = run(student, (ids, outcomes), case, weights=(weights[0], ce), labels=labels)
        if k == 0 and ce is None:
            assert got[1].kl.abs().max() < 1e-28 and got[2][0].abs().max() < 1e-14
            continue
        of = weights[0], weights[1] if ce is not None else torch.zeros(N)
        check(torch.float64, *got, student, (ids, outcomes), case, np.ones(N, bool), of, labels)


@pytest.mark.parametrize(("dtype", "operands"), ENGINES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_close_to_the_teacher(monkeypatch, dtype, operands, schedule):
    """KL about 1e-3 of k + 1 outcomes: no digits are lost in the tail."""
    force_operands(monkeypatch, operands)
    N, V, k = 128, 4096, 64
    tensors = make_linear(N, 128, 160, V, dtype, distance=0.05)
    Y, U = (x.double() for x in tensors[2:])
    log_p = (Y @ U.T).log_softmax(-1)
    logprobs, ids = log_p.topk(k, -1)
    ids, order = ids.sort(-1)
    rest = torch.ones(N, V, dtype=torch.bool).scatter(1, ids, False)
    tail = log_p.masked_fill(~rest, -math.inf).logsumexp(-1, keepdim=True)
    outcomes = torch.cat((logprobs.gather(1, order), tail), 1).to(wide(dtype))
    weights = torch.full((N,), 1 / N, dtype=wide(dtype)), None
    case = CASES[0]
    loss, _, *truths = oracle_sparse(
        *to_numpy(*tensors[:2]), ids.numpy(), to_numpy(outcomes)[0], row_weight=weights[0].numpy()
    )
    assert 1e-4 < loss.mean() < 4e-3
    result, _, grads = run(tensors[:2], (ids, outcomes), case, weights=weights, schedule=schedule)
    assert result.item() == pytest.approx(loss.mean(), rel=1e-5)
    if dtype == torch.float32:  # the logits' last bits: no worse than PyTorch's own
        own = [x.clone().requires_grad_() for x in tensors[:2]]
        z = own[0] @ own[1].T
        of_student = torch.cat((z.gather(1, ids), z.masked_fill(~rest, -math.inf).logsumexp(1)[:, None]), 1)
        torch.nn.functional.kl_div(
            of_student.log_softmax(-1), outcomes.log_softmax(-1), log_target=True, reduction="batchmean"
        ).backward()
        for grad, baseline, truth in zip(grads[:2], own, truths[:2], strict=True):
            assert_no_worse(grad, baseline.grad, truth, floor=1e-5)
    else:
        for grad, truth in zip(grads[:2], truths[:2], strict=True):
            assert relative(grad, truth) <= GRADIENT_BOUND[dtype]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_number_of_threads_gives_the_same_bits(monkeypatch, schedule):
    N, V = 200, 1500
    student, teacher = make_linear(N, 32, 40, V, torch.float32)[:2], make_teacher(N, V, 20, torch.float32)
    labels, weights, results = labels_of(teacher[0], V), per_token(N, torch.float32), []
    for count in (1, 2, 3):
        with threads(count):
            force_plan(monkeypatch, chunk_rows=128, tile=128, tile_group=4, stored_tiles=7)
            result, terms, grads = run(
                student, teacher, CASES[1], weights=weights, labels=labels, schedule=schedule
            )
            results.append([result, *terms, *grads[:2]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", [CASES[1], CASES[2]])
def test_a_lent_accumulator(monkeypatch, schedule, case):
    """Gradients of the backward, out of the outcomes and metrics that the forward wrote."""
    force_plan(monkeypatch, chunk_rows=64, tile=64, tile_group=2, stored_tiles=3)
    N, V = 130, 300
    student, teacher = make_linear(N, 24, 30, V, torch.float64)[:2], make_teacher(N, V, 7, torch.float64)
    labels, weights = labels_of(teacher[0], V), per_token(N, torch.float64)
    lent = torch.full((V, 24), 2.0, dtype=torch.float64)
    mask = torch.arange(N) % 4 > 0
    result, terms, grads = run(
        student, teacher, case, mask=mask, weights=weights, labels=torch.where(mask, labels, -1),
        schedule=schedule, lent=lent,
    )  # fmt: skip
    assert grads[1] is None
    grads[1] = lent - 2.0
    check(torch.float64, result, terms, grads, student, teacher, case, mask.numpy(), weights, labels)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_out_tokens(monkeypatch, schedule, temperature, smoothing):
    """As ids, labels, a whole tile, a whole tail; and a NaN that stays in its row."""
    force_plan(monkeypatch, tile=64, tile_group=2)
    N, V = 70, 250
    student = make_linear(N, 16, 20, V, torch.float64)[:2]
    student[0][9] = math.nan
    bias = torch.zeros(V, dtype=torch.float64)
    bias[:64] = bias[70:75] = -math.inf
    ids, outcomes = make_teacher(N, V, 5, torch.float64)
    ids[:] = torch.tensor([3, 71, 100, 120, 200])
    outcomes[:, :2] = -math.inf  # as impossible to the teacher as to the student
    outcomes[:, 2:5] = torch.randn(N, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels = torch.arange(N) % 100 + 100
    labels[3], labels[4], labels[5] = 20, 71, 120
    case, weights = ("forward_kl", temperature, smoothing, None), per_token(N, torch.float64)
    _, terms, grads = run(
        student, (ids, outcomes), case, bias=bias, weights=weights, labels=labels, schedule=schedule
    )
    X, W = to_numpy(*student)
    truth = oracle_sparse(
        X, W, ids.numpy(), outcomes.numpy(), student_bias=bias.numpy(), row_weight=weights[0].numpy(),
        ce_weight=weights[1].numpy(), labels=labels.numpy(), **definition(case),
    )  # fmt: skip
    metrics = oracle_metrics(X @ W.T + bias.numpy(), labels.numpy(), **definition(case))
    for term, rows in zip(terms, (truth[0], *metrics[:3]), strict=True):
        np.testing.assert_allclose(term.detach().numpy(), rows, rtol=1e-11)
    assert np.isinf(metrics[0][3]) and np.isinf(metrics[0][4]) and np.isnan(metrics[0][9])
    keep = torch.arange(N) != 9
    assert relative(grads[0][keep], truth[2][keep.numpy()]) < 1e-11

    # no other token is possible than the ids
    bias[:] = -math.inf
    bias[ids[0]] = 0.0
    outcomes[:, :2] = 0.5
    outcomes[:, -1] = -math.inf
    labels[:] = 100
    student[0][9] = 0.0
    got = run(student, (ids, outcomes), case, bias=bias, weights=weights, labels=labels, schedule=schedule)
    if smoothing == 0:
        check(torch.float64, *got, student, (ids, outcomes), case, np.ones(N, bool), weights, labels, bias)
    assert not any(g.isnan().any() for g in got[2])


@settings(deadline=None, max_examples=40)
@given(
    N=st.integers(1, 140),
    H=st.integers(1, 40),
    V=st.integers(1, 400),
    k=st.integers(0, 30),
    case=st.sampled_from(CASES),
    schedule=st.sampled_from(SCHEDULES),
    tile=st.sampled_from([64, 128]),
    seed=st.integers(0, 9),
)
def test_any_shape(N, H, V, k, case, schedule, tile, seed):
    student = make_linear(N, H, H, V, torch.float64, seed=seed)[:2]
    ids, outcomes = make_teacher(N, V, min(k, V), torch.float64, seed=seed)
    all_are_ids = (ids >= 0).sum(1) == V
    outcomes[all_are_ids, -1] = -math.inf
    labels, weights = labels_of(ids, V, seed), per_token(N, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        force_plan(patch, tile=tile, chunk_rows=64)
        got = run(student, (ids, outcomes), case, weights=weights, labels=labels, schedule=schedule)
    X, W = to_numpy(*student)
    w = [x.numpy() for x in weights]
    loss, _, *truths = oracle_sparse(
        X, W, ids.numpy(), outcomes.numpy(), row_weight=w[0], ce_weight=w[1], labels=labels.numpy(),
        **definition(case),
    )  # fmt: skip
    np.testing.assert_allclose(got[1].kl.detach().numpy(), loss, rtol=1e-10, atol=1e-13)
    for grad, truth in zip(got[2][:2], truths[:2], strict=True):
        np.testing.assert_allclose(grad.numpy(), truth, rtol=1e-9, atol=1e-13)


def test_plans():
    """The kept logits are the student's alone, and what remains of a budget is used."""
    sizes = {"dtype": torch.bfloat16, "grad_hidden": True, "grad_head": True, "grad_bias": False}
    rest = {"grad_head_accumulator": False, "divergence_needs_kl": True, "engine": "f32"}
    dense, sparse = (
        plan_cpu.plan(
            1024, 32768, 512, hidden, schedule="store", workspace_bytes=1 << 29, **sizes,
            **{**rest, "divergence_needs_kl": False}, outcomes=outcomes,
        )
        for hidden, outcomes in ((512, 0), (0, 65))
    )  # fmt: skip
    assert sparse.part_bytes[0] * 2 == dense.part_bytes[0] == 2 * 1024 * 32768 * 4
    assert (sparse.num_gemms, dense.num_gemms) == (3, 4)
    assert sparse.flops == 3 * 2 * 1024 * 32768 * 512 == dense.flops * 3 // 4


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_flops(monkeypatch, schedule):
    """As many as the plan says, also where some tiles are made twice."""
    count = torch.ops.minitron_kernels.count_gemm_flops
    made = force_plan(monkeypatch, chunk_rows=128)
    student = make_linear(256, 64, 64, 1024, torch.float32)[:2]
    teacher = make_teacher(256, 1024, 4, torch.float32)
    count(True)
    run(student, teacher, CASES[3], weights=(torch.tensor(1.0), None), schedule=schedule)
    assert count(False) == made[0].flops == 2 * 256 * 1024 * 64 * made[0].num_gemms


def test_opcheck_and_ids_that_kernels_refuse():
    hidden, head = make_linear(20, 16, 16, 50, torch.float32)[:2]
    ids, outcomes = make_teacher(20, 50, 4, torch.float32)
    numbers = [0.0, 0.5, 1.0, 0.0, 1.0, 0.0, 0.1]
    rest = (True, True, False, True, 50, numbers, None, "native", "store", 1 << 24, None, None, False, ())
    of_tokens = (labels_of(ids, 50), torch.rand(20), None)
    mask, weight = torch.arange(20) % 3 > 0, torch.rand(20)

    def inputs(ids):
        return (hidden, head, None, None, None, None, ids, outcomes, mask, weight, None, None, *of_tokens)

    torch.library.opcheck(linear_kl_loss_op.op, (*inputs(ids), *rest))
    for wrong in ([3, 3, -1, -1], [5, 2, -1, -1], [-1, 4, -1, -1], [7, 50, -1, -1], [-2, 4, 5, -1]):
        bad = ids.clone()
        bad[1] = torch.tensor(wrong)
        with pytest.raises(RuntimeError, match=r"ids must ascend in a row, .* in row 1"):
            linear_kl_loss_op(*inputs(bad), *rest)
