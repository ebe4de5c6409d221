"""The student's side alone, for a teacher of few tokens: what every GPU backend must pass, as cases.py."""

import math

import numpy as np
import pytest
import torch

from kl_loss.cases import DTYPES, INF, assert_near, named, numpy_of
from kl_loss.metric_cases import SETTINGS, labels_for, nan_like, weights_for
from kl_loss.oracle import _transform, oracle_metrics

WIDTH, TILE, OTHERS = 301, 64, 50  # OTHERS: tokens of the vocabulary that are not among these
# rows: nothing taken out; some tokens, the label among them; the first tile; the last; all; not valid
SOME, FIRST, LAST, ALL, MASKED, COUNT = 1, 2, 3, 4, 5, 6


def student_problem(kernels, bias=True):
    """Logits with tokens taken out, their bias, the mask, labels; and the sums of both, nothing taken out."""
    g = torch.Generator().manual_seed(7)
    full = (torch.randn(COUNT, WIDTH, generator=g) * 3 + torch.linspace(-9, 9, WIDTH)).to(kernels.device)
    bias = torch.linspace(3, -3, WIDTH, device=kernels.device) if bias else None
    labels = labels_for(COUNT, WIDTH, kernels.device)
    labels[:4] = torch.tensor([TILE, 17, TILE - 1, 2 * TILE], device=kernels.device)
    mask = torch.arange(COUNT, device=kernels.device) != MASKED
    logits = full.clone()
    logits[SOME, 3:40] = logits[FIRST, :TILE] = logits[LAST, 256:] = logits[ALL] = -INF
    logits[MASKED] = math.nan
    labels[MASKED] = -1
    return logits, bias, mask, labels, full if bias is None else full + bias


def transformed(logits, bias, options):
    """s and d s / d z of these logits in float64."""
    z = numpy_of(logits if bias is None else logits + bias)
    scale, cap = named(options)["student_scale"], named(options)["student_softcap"]
    return _transform(z, scale, cap, options[0])


def log_sum_exp(x):
    top = np.maximum(x.max(1), -1e300)
    with np.errstate(divide="ignore"):
        return top + np.log(np.exp(x - top[:, None]).sum(1))


def states(kernels, problem_, options, *, tile=WIDTH, metrics=True, first_token=0):
    """The state and the metrics' state, from tiles."""
    logits, bias, mask, labels, _ = problem_
    state, metric_state = nan_like(kernels, 2, COUNT), nan_like(kernels, 4, COUNT)
    for at in range(0, WIDTH, tile):
        cut = slice(at, min(at + tile, WIDTH))
        of_tile = logits[:, cut], None if bias is None else bias[cut].contiguous(), mask
        more = {"labels": labels, "metric_state": metric_state, "first_token": at + first_token}
        arguments = (state, at == 0, (0.0, *options))
        kernels.epilogues.student_stats(*of_tile, *arguments, **(more if metrics else {}))
    return numpy_of(state), numpy_of(metric_state)


@pytest.mark.parametrize("tile", [WIDTH, TILE])
@pytest.mark.parametrize("setting", SETTINGS)
def test_student_stats(kernels, setting, tile):
    """Log-sum-exp of what is left, and the metrics' state, tile by tile and at once."""
    options = SETTINGS[setting]
    problem_ = student_problem(kernels)
    logits, bias, _, labels, _ = problem_
    (max_s, sum_s), (sum_y, dot, total, label) = states(kernels, problem_, options, tile=tile)
    s, tau = transformed(logits, bias, options)[0], 1 / options[0]
    for row in (ALL, MASKED):
        assert (max_s[row], sum_s[row], sum_y[row], dot[row], total[row]) == (-INF, 0.0, 0.0, 0.0, 0.0)
        assert label[row] == -INF
    kept = slice(0, ALL)
    np.testing.assert_allclose(max_s[kept], s[kept].max(1), rtol=2e-7)
    np.testing.assert_allclose(max_s[kept] + np.log(sum_s[kept]), log_sum_exp(s[kept]), rtol=2e-6)
    y = s[kept] * tau
    np.testing.assert_allclose(max_s[kept] * tau + np.log(sum_y[kept]), log_sum_exp(y), rtol=2e-6)
    p = np.exp(y - log_sum_exp(y)[:, None])
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(1)
    np.testing.assert_allclose(np.log(sum_y[kept]) - dot[kept] / sum_y[kept], entropy, rtol=1e-5, atol=1e-5)
    finite = np.where(np.isfinite(y), y, 0.0)
    smooth = options[5] > 0
    np.testing.assert_allclose(total[kept], finite.sum(1) * smooth, atol=1e-6 * np.abs(finite).sum(1).max())
    expected = y[np.arange(ALL), labels[kept].cpu().numpy()]
    assert expected[SOME] == expected[FIRST] == -INF and np.isfinite(expected[[0, LAST]]).all()
    np.testing.assert_allclose(label[kept], expected, rtol=1e-6, atol=1e-6)
    plain, _ = states(kernels, problem_, options, tile=tile, metrics=False)
    np.testing.assert_allclose(plain[:, kept], np.stack([max_s, sum_s])[:, kept], rtol=1e-6)
    elsewhere = states(kernels, problem_, options, tile=tile, first_token=10**10)[1]
    assert (elsewhere[3] == -INF).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", ["plain", "smooth", "warm", "capped"])
def test_student_grad(kernels, setting, dtype):
    """Of weight * lse + ce_weight * cross-entropy, in tiles of a larger vocabulary; and without it."""
    options = SETTINGS[setting]
    logits, bias, mask, labels, full = student_problem(kernels)
    (s, slope), tau = transformed(logits, bias, options), 1 / options[0]
    lse = log_sum_exp(s)
    weight, ce_weight = weights_for(COUNT, kernels.device)
    # of the whole vocabulary, as if the others' logits were 0
    whole = torch.cat([full, torch.zeros(COUNT, OTHERS, device=full.device)], 1)
    with np.errstate(all="ignore"):
        of_ce = oracle_metrics(
            numpy_of(whole), labels.cpu().numpy(), label_smoothing=options[5], **named(options)
        )[3]
        of_lse = np.exp(s - lse[:, None]) * slope
    truth = np.where(np.isneginf(s), 0.0, of_lse) * numpy_of(weight)[:, None]
    both = truth + np.where(np.isneginf(s), 0.0, of_ce[:, :WIDTH]) * numpy_of(ce_weight)[:, None]
    lse_y = log_sum_exp(transformed(whole, None, options)[0] * tau)
    given = [torch.from_numpy(x).float().to(kernels.device) for x in (lse, lse_y)]
    for with_ce, expected in ((False, truth), (True, both)):
        grad = nan_like(kernels, COUNT, WIDTH, dtype=dtype)
        for at in range(0, WIDTH, 2 * TILE):
            cut = slice(at, min(at + 2 * TILE, WIDTH))
            width, dz = cut.stop - at, nan_like(kernels, COUNT, cut.stop - at + 3, dtype=dtype)
            of_tile = logits[:, cut], bias[cut].contiguous(), mask
            # the tile is the vocabulary's from token 9 on
            more = {"labels": labels + 9, "lse_y": given[1], "ce_weight": ce_weight}
            more |= {"first_token": at + 9, "total_vocab": WIDTH + OTHERS}
            arguments = (weight, given[0], dz, width, (0.0, *options))
            kernels.epilogues.student_grad(*of_tile, *arguments, **(more if with_ce else {}))
            assert (dz[:, width:] == 0).all()
            grad[:, cut] = dz[:, :width]
        assert grad.isfinite().all() and (grad[ALL:] == 0).all() and (grad[logits == -INF] == 0).all()
        rounded = numpy_of(torch.from_numpy(expected[:ALL]).to(dtype))
        assert_near(grad[:ALL], expected[:ALL], 4e-6, 1.1 * np.linalg.norm(rounded - expected[:ALL]) + 2e-6)


def test_student_of_no_weight_and_nan(kernels):
    """Log-sum-exp of -inf: nothing flows to logits that are not; a NaN stays in its row."""
    logits, _, _, labels, _ = student_problem(kernels, bias=False)
    logits = logits[:4].contiguous()
    logits[1, 7] = math.nan
    lse = torch.tensor([-INF, 3.0, -INF, 12.0], device=kernels.device)
    weight, options = torch.ones(4, device=kernels.device), (0.0, *SETTINGS["plain"])
    for more in ({}, {"labels": labels[:4], "lse_y": lse.abs(), "ce_weight": 0 * weight}):
        grad = nan_like(kernels, 4, WIDTH)
        kernels.epilogues.student_grad(logits, None, None, weight, lse, grad, WIDTH, options, **more)
        assert grad[1].isnan().any() and (grad[[0, 2]] == 0).all()
        assert grad[3].isfinite().all() and (grad[3] != 0).any()
    state = nan_like(kernels, 2, 4)
    kernels.epilogues.student_stats(logits, None, None, state, True, options)
    assert state[1].isnan().tolist() == [False, True, False, False]
    logits[1] = -INF
    kernels.epilogues.student_stats(logits, None, None, state, True, options)
    assert (state[0, 1], state[1, 1]) == (-INF, 0.0)
    empty = nan_like(kernels, 2, 0), nan_like(kernels, 0, WIDTH)
    kernels.epilogues.student_stats(logits[:0], None, None, empty[0], True, options)
    kernels.epilogues.student_grad(logits[:0], None, None, weight[:0], lse[:0], empty[1], WIDTH, options)
