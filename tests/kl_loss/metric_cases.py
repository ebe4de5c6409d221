"""Metrics and cross-entropy: what every GPU backend of kl_loss and linear_kl_loss must pass, as cases.py."""

import math

import numpy as np
import pytest
import torch

from kl_loss.cases import (
    BETAS,
    BUDGET,
    CAPPED,
    DTYPES,
    INF,
    PADDED,
    PLAIN,
    assert_linear,
    assert_loss,
    assert_near,
    linear,
    made_plans,
    named,
    numpy_of,
    problem,
    truth_of,
)
from kl_loss.cases import N as ROWS
from kl_loss.cases import V as TOKENS
from kl_loss.oracle import oracle_metrics, oracle_rows
from kl_loss.problems import make_rows
from minitron_kernels.ops.kl_loss.operands import TokenMetrics

SMOOTHING = 0.1
# (inv_tau, scales and softcaps, label_smoothing); at temperature 1 no second exponential is made
SETTINGS = {
    "plain": PLAIN,
    "smooth": (*PLAIN[:5], SMOOTHING),
    "warm": (0.5, *PLAIN[1:]),
    "capped": (*CAPPED[:5], SMOOTHING),
    "all smooth": (*PLAIN[:5], 1.0),
}


def metrics_truth(logits, labels, options, **more):
    """Cross-entropy, entropy, log p(label), and the cross-entropy's gradient; labels None as the kernels."""
    unlabelled = labels is None
    labels = np.full(len(logits), -1) if unlabelled else labels.cpu().numpy()
    return oracle_metrics(numpy_of(logits), labels, label_smoothing=options[5], **named(options), **more)


def assert_metrics(metrics, stats, logits, truth, options):
    """Each within a few ulps of itself and of the largest logit at temperature 1; 1 / sum_y of what it is."""
    y = numpy_of(logits) * options[1]
    finite = np.where(np.isfinite(y), np.abs(y), 0.0).max(1)
    cap = options[2]
    atol = 6e-7 * (1.0 + (np.minimum(finite, cap) if cap else finite))
    for found, expected in zip(numpy_of(metrics).T[1:], truth[:3], strict=True):
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(found[~finite], expected[~finite])
        known = np.where(finite, expected, 0.0)
        wrong = ~(np.abs(found - known) <= atol + 4e-6 * np.abs(known))
        assert not wrong[finite].any(), f"{found[finite]}, expected {expected[finite]}"
    if stats is not None and options[0] == 1.0:
        np.testing.assert_array_equal(numpy_of(metrics[:, 0]), numpy_of(stats[:, 1]))


def assert_dz(grad, student, teacher, weight, ce_weight, labels, *, beta, options):
    """The gradient of sum(weight * divergence + ce_weight * cross-entropy)."""
    kl = oracle_rows(numpy_of(student), numpy_of(teacher), beta=beta, **named(options))[1]
    ce = metrics_truth(student, labels, options)[3]
    truth = kl * numpy_of(weight)[:, None] + ce * numpy_of(ce_weight)[:, None]
    rounded = numpy_of(torch.from_numpy(truth).to(grad.dtype))
    largest = numpy_of(weight.abs() + ce_weight.abs()).max()
    assert_near(grad, truth, 4e-6, 1.1 * np.linalg.norm(rounded - truth) + 1e-6 * largest)


def labels_for(rows_, V, device, seed=0):
    """The first token, the last one, and others."""
    labels = torch.randint(0, V, (rows_,), generator=torch.Generator().manual_seed(seed))
    labels[: min(rows_, 2)] = torch.tensor([0, V - 1])[:rows_]
    return labels.to(device)


def weights_for(rows_, device):
    return torch.linspace(-0.5, 1.5, rows_, device=device), torch.linspace(2.0, 0.5, rows_, device=device)


def rows_with_metrics(kernels, student, teacher, labels, *, beta, options, mask=None, vocab_size=None):
    """Loss, stats, metrics, and the gradient with weights_for() these rows."""
    V = student.shape[1] if vocab_size is None else vocab_size
    rest = (V, (beta, *options))
    loss, stats, metrics = kernels.forward_metrics(student, teacher, mask, labels, *rest)
    weight, ce_weight = weights_for(len(student), student.device)
    of_ce = () if labels is None else (labels, metrics, ce_weight)
    grad = kernels.backward(weight, stats, student, teacher, mask, *rest, *of_ce)
    return loss, stats, metrics, grad


def check_metric_rows(kernels, student, teacher, labels, *, beta, options):
    loss, stats, metrics, grad = rows_with_metrics(
        kernels, student, teacher, labels, beta=beta, options=options
    )
    assert_loss(loss, oracle_rows(numpy_of(student), numpy_of(teacher), beta=beta, **named(options))[0])
    truth = metrics_truth(student, labels, options)
    assert_metrics(metrics, stats, student, truth, options)
    weights = weights_for(len(student), student.device)
    assert grad.dtype == student.dtype and grad.shape == student.shape
    assert_dz(grad, student, teacher, *weights, labels, beta=beta, options=options)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("beta", BETAS)
def test_metrics_of_rows(kernels, beta, setting):
    """Short rows, and long ones whose every block raises the maximum or none does; far apart or close."""
    for V, distance, rising in ((7, 1.0, False), (300, 0.05, False), (517, 1.0, True)):
        student, teacher = (
            x.to(kernels.device) for x in make_rows(3, V, torch.float32, distance=distance, rising=rising)
        )
        labels = labels_for(3, V, kernels.device, V)
        check_metric_rows(kernels, student, teacher, labels, beta=beta, options=SETTINGS[setting])
        if rising:
            falling = (x.flip(1).contiguous() for x in (student, teacher))
            check_metric_rows(kernels, *falling, labels, beta=beta, options=SETTINGS[setting])


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("beta", BETAS)
def test_metrics_of_rows_in_16_bit(kernels, beta, dtype):
    student, teacher = (x.to(kernels.device) for x in make_rows(3, 300, dtype))
    labels = labels_for(3, 300, kernels.device)
    for other in (teacher, teacher.float()):
        check_metric_rows(kernels, student, other, labels, beta=beta, options=SETTINGS["capped"])


@pytest.mark.parametrize("beta", BETAS)
def test_metrics_of_rows_that_do_not_count(kernels, beta):
    """Masked rows hold NaN: their metrics and gradients are 0; padding holds NaN: gradients there are 0."""
    wide = torch.full((2, 5, 333), math.nan, device=kernels.device)
    wide[:, :, :290] = torch.stack(make_rows(5, 290, torch.float32)).to(kernels.device)
    mask = torch.tensor([True, False, True, True, False], device=kernels.device)
    wide[:, ~mask] = math.nan
    labels = torch.where(mask, labels_for(5, 290, kernels.device), -1)
    options = SETTINGS["capped"]
    loss, stats, metrics, grad = rows_with_metrics(
        kernels, *wide, labels, beta=beta, options=options, mask=mask, vocab_size=290
    )
    for x in (loss, stats, metrics, grad):
        assert (x[~mask] == 0).all()
    student, teacher = wide[:, mask, :290]
    truth = metrics_truth(student, labels[mask], options)
    assert_metrics(metrics[mask], None, student, truth, options)
    weight, ce_weight = (x[mask] for x in weights_for(5, kernels.device))
    known = {"beta": beta, "options": options}
    assert_dz(grad[mask][:, :290], student, teacher, weight, ce_weight, labels[mask], **known)
    assert (grad[:, 290:] == 0).all()


@pytest.mark.parametrize("setting", ["plain", "warm", "smooth"])
@pytest.mark.parametrize("beta", BETAS)
def test_metrics_of_masked_out_tokens(kernels, beta, setting):
    """Logits of -inf add nothing to the entropy and get no gradient; one of a label, NaN and +inf."""
    student, teacher = (x.to(kernels.device) for x in make_rows(7, 400, torch.float32))
    labels = labels_for(7, 400, kernels.device)
    student[0, 3:9] = teacher[0, 3:9] = -INF
    student[1, :200] = teacher[1, :200] = -INF  # the first block is empty
    student[2, 10:20] = teacher[2, 10:20] = -INF
    labels[2] = 15  # cross-entropy is infinite, its gradient is not
    student[3] = -INF  # no token at all
    student[4, 399] = math.nan
    student[5, 5] = INF
    teacher[6, 7] = math.nan  # which the student's metrics do not know
    options = SETTINGS[setting]
    _, _, metrics, grad = rows_with_metrics(kernels, student, teacher, labels, beta=beta, options=options)
    truth = metrics_truth(student, labels, options)
    assert np.isinf(truth[0][2]) and np.isneginf(truth[2][2])
    for found, expected in zip(numpy_of(metrics).T[1:], truth[:3], strict=True):
        assert np.isnan(found[3:6]).all()
        rest = [0, 1, 2, 6]
        np.testing.assert_allclose(found[rest], expected[rest], rtol=4e-6, atol=6e-6)
    assert (grad[:3][student[:3] == -INF] == 0).all() and (grad[3] == 0).all()
    assert grad[:3].isfinite().all() and grad[4:].isnan().any(1).all()
    known = [x[:3] for x in (student, teacher, *weights_for(7, kernels.device), labels)]
    assert_dz(grad[:3], *known, beta=beta, options=options)


def test_metrics_of_unknown_labels(kernels):
    """Without labels cross-entropy and log p are 0; a label that is no token: +inf and -inf. Nothing of the
    divergence is left where its weight is 0, be it infinite.
    """
    student, teacher = (x.to(kernels.device) for x in make_rows(3, 150, torch.float32))
    for setting in ("plain", "warm"):
        known = {"beta": 0.0, "options": SETTINGS[setting]}
        metrics = rows_with_metrics(kernels, student, teacher, None, **known)[2]
        assert (metrics[:, [1, 3]] == 0).all()
        labels = torch.tensor([5, 150, 10**12], device=kernels.device)
        found = rows_with_metrics(kernels, student, teacher, labels, **known)[2]
        assert torch.equal(found[:, 2], metrics[:, 2]) and (found[1:, 1] == INF).all()
        assert (found[1:, 3] == -INF).all() and found[0].isfinite().all()
    teacher[:, 4] = -INF  # reverse KL is infinite
    labels, ce_weight = labels_for(3, 150, kernels.device), torch.ones(3, device=kernels.device)
    rest = (150, (1.0, *PLAIN))
    _, stats, metrics = kernels.forward_metrics(student, teacher, None, labels, *rest)
    of_ce = (labels, metrics, ce_weight)
    grad = kernels.backward(0 * ce_weight, stats, student, teacher, None, *rest, *of_ce)
    assert_near(grad, metrics_truth(student, labels, PLAIN)[3], 4e-6, 1e-6)
    empty = kernels.forward_metrics(student[:0], teacher[:0], None, labels[:0], *rest)
    assert [tuple(x.shape) for x in empty] == [(0,), (0, 6), (0, 4)]


# ---- the epilogues of linear_kl_loss


def nan_like(kernels, *shape, dtype=torch.float32):
    return torch.full(shape, math.nan, dtype=dtype, device=kernels.device)


def epilogue_problem(kernels, columns=301):
    """Logits, biases, mask with rows of NaN, labels around the borders of tiles of 64; weights."""
    labels = torch.tensor([0, 63, 64, 128, columns - 1, 191, 5], device=kernels.device)
    rows_ = len(labels)
    logits = [x.to(kernels.device) for x in make_rows(rows_, columns, torch.float32)]
    bias = torch.linspace(-3, 3, columns, device=kernels.device)
    mask = torch.arange(rows_, device=kernels.device) != 6
    full = [logits[0] + bias, logits[1] - bias]
    for x in logits:
        x[~mask] = math.nan
    labels[~mask] = -1
    return (*logits, bias, -bias), full, mask, labels, weights_for(rows_, kernels.device)


def cut_of(logits, cut):
    return tuple(x[:, cut] if x.dim() == 2 else x[cut].contiguous() for x in logits)


@pytest.mark.parametrize("setting", ["smooth", "capped"])
@pytest.mark.parametrize("beta", BETAS)
def test_metrics_of_tiles(kernels, beta, setting):
    """Tile by tile, in one split and in several: metrics and dz, of labels at the borders of tiles."""
    columns, options = 301, SETTINGS[setting]
    logits, full, mask, labels, (weight, ce_weight) = epilogue_problem(kernels, columns)
    rows_, numbers, epilogues = len(labels), (beta, *options), kernels.epilogues
    truth = metrics_truth(full[0][mask], labels[mask], options)
    cuts = [slice(at, min(at + 64, columns)) for at in range(0, columns, 64)]
    for splits in (1, len(cuts)):
        states, metric_states = nan_like(kernels, splits, 5, rows_), nan_like(kernels, splits, 4, rows_)
        (loss, stats, metrics) = (nan_like(kernels, rows_, *more) for more in ((), (6,), (4,)))
        for i, cut in enumerate(cuts):
            at = i % splits
            more = {"labels": labels, "metric_state": metric_states[at], "first_token": cut.start}
            epilogues.tile_stats(cut_of(logits, cut), mask, states[at], splits > 1 or i == 0, numbers, **more)
        more = {"labels": labels, "metric_states": metric_states, "metrics": metrics}
        epilogues.finish_stats(states, mask, loss, stats, numbers, **more, total_vocab=columns)
        if 0 < beta < 1:
            sums = nan_like(kernels, 1, 2, rows_)
            for cut in cuts:
                tile = cut_of(logits, cut)
                epilogues.tile_mixture(tile, mask, stats, sums[0], cut.start == 0, numbers)
            epilogues.finish_mixture(sums, mask, loss, stats, numbers)
        assert (metrics[~mask] == 0).all()
        assert_metrics(metrics[mask], stats[mask], full[0][mask], truth, options)
    grad = nan_like(kernels, rows_, columns)
    of_ce = {"labels": labels, "metrics": metrics, "ce_weight": ce_weight, "total_vocab": columns}
    for cut in cuts:
        width, dz = cut.stop - cut.start, nan_like(kernels, rows_, cut.stop - cut.start + 3)
        arguments = (mask, weight, stats, dz, width, numbers)
        epilogues.grad(cut_of(logits, cut), *arguments, **of_ce, first_token=cut.start)
        assert (dz[:, width:] == 0).all()
        grad[:, cut] = dz[:, :width]
    assert (grad[~mask] == 0).all()
    known = [x[mask] for x in (*full, weight, ce_weight, labels)]
    assert_dz(grad[mask], *known, beta=beta, options=options)


@pytest.mark.parametrize("setting", ["smooth", "capped"])
@pytest.mark.parametrize("beta", BETAS)
def test_metrics_of_whole_rows(kernels, beta, setting):
    """forward, then grad; and both at once. Their metrics are those of tiles, without a second look."""
    columns, options = 301, SETTINGS[setting]
    logits, full, mask, labels, (weight, ce_weight) = epilogue_problem(kernels, columns)
    rows_, numbers, epilogues = len(labels), (beta, *options), kernels.epilogues
    truth = metrics_truth(full[0][mask], labels[mask], options)
    known = [x[mask] for x in (*full, weight, ce_weight, labels)]
    for fused in (False, True):
        for dtype in DTYPES if fused else DTYPES[:1]:
            (loss, stats, metrics) = (nan_like(kernels, rows_, *more) for more in ((), (6,), (4,)))
            grad = nan_like(kernels, rows_, columns + 3, dtype=dtype)
            more = {"labels": labels, "metrics": metrics}
            if fused:
                arguments = (mask, weight, loss, stats, grad, columns, numbers)
                epilogues.forward_grad(logits, *arguments, **more, ce_weight=ce_weight)
            else:
                epilogues.forward(logits, mask, loss, stats, columns, numbers, **more)
                arguments = (mask, weight, stats, grad, columns, numbers)
                epilogues.grad(logits, *arguments, **more, ce_weight=ce_weight)
            assert (metrics[~mask] == 0).all() and (grad[~mask] == 0).all() and (grad[:, columns:] == 0).all()
            assert_metrics(metrics[mask], stats[mask], full[0][mask], truth, options)
            assert_dz(grad[mask][:, :columns], *known, beta=beta, options=options)
    # metrics without a gradient of the cross-entropy: that of the divergence alone
    (loss, stats, metrics), plain = (
        (nan_like(kernels, rows_, *more) for more in ((), (6,), (4,))),
        grad.clone(),
    )
    arguments = (mask, weight, loss, stats, plain, columns, numbers)
    epilogues.forward_grad(logits, *arguments, labels=labels, metrics=metrics)
    assert_metrics(metrics[mask], stats[mask], full[0][mask], truth, options)
    assert_dz(plain[mask][:, :columns], *known[:3], 0 * known[3], known[4], beta=beta, options=options)


# ---- linear_kl_loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", ["store", "recompute"])
@pytest.mark.parametrize("beta", BETAS)
def test_linear_with_metrics(kernels, monkeypatch, schedule, beta, dtype):
    """Several chunks, tiles and splits; a mask; then gradients again from the stats and metrics made."""
    tensors = problem(kernels, dtype, padded=PADDED)
    tensors[1][TOKENS:], tensors[3][TOKENS:] = math.nan, math.nan
    options = SETTINGS["capped"]
    bias = torch.linspace(-9, 9, PADDED, device=kernels.device)
    mask = torch.arange(ROWS, device=kernels.device) % 5 > 0
    labels = labels_for(ROWS, TOKENS, kernels.device)
    labels[2:5] = torch.tensor([127, 128, 255], device=kernels.device)
    given = torch.where(mask, labels, -1)
    weight, ce_weight = (x / ROWS for x in weights_for(ROWS, kernels.device))
    setup = {"beta": beta, "options": options, "biases": (bias, bias * 0.5), "vocab_size": TOKENS}
    counted = {"row_weight": numpy_of(weight) * numpy_of(mask), "ce_weight": numpy_of(ce_weight * mask)}
    truth = truth_of(tensors, labels=labels.cpu().numpy(), **counted, **setup)
    truth = (truth[0] * numpy_of(mask), *truth[1:])
    made_plans(monkeypatch, chunk_rows=7, dz_rows=15, tile=TOKENS if schedule == "store" else 128)
    run = {"row_weight": weight, "mask": mask, "schedule": schedule, "budget": BUDGET[schedule]}
    metrics = nan_like(kernels, ROWS, 4)
    tokens = TokenMetrics(given, metrics, ce_weight)
    outputs = linear(kernels, tensors, of_tokens=tokens, **run, **setup)
    assert_linear(outputs, truth, dtype)
    zs = tensors[0].double() @ tensors[1][:TOKENS].double().T + bias[:TOKENS].double()
    expected = metrics_truth(zs[mask], labels[mask], options)
    for found in (metrics, nan_like(kernels, ROWS, 4)):
        if found is not metrics:  # nothing wanted but what is known of the rows
            nothing = {"needs_grad": (False, False, False), "of_tokens": TokenMetrics(given, found)}
            linear(kernels, tensors, mask=mask, **nothing, **setup)
        assert (found[~mask] == 0).all()
        for column, value in zip(numpy_of(found[mask]).T[1:], expected[:3], strict=True):
            np.testing.assert_allclose(column, value, rtol=1e-5, atol=1e-5)
    again = linear(kernels, tensors, stats=outputs[1], of_tokens=tokens, **run, **setup)
    assert_linear((outputs[0], *again[1:]), truth, dtype)
