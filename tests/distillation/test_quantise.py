"""Quantisers over all codes and a dense grid of log p: declared errors hold, and are reached; sums are 1."""

from __future__ import annotations

import math

import pytest
import torch

from minitron_kernels.distillation.cache.quantise import LOWEST, quantiser
from minitron_kernels.ops.kl_loss.sparse import sparse_kl_loss

LOG = [f"log{bits}" for bits in range(8, 17)]
ALL = ["fp32", "fp16", *LOG]


def codes_of(name):
    """All codes, of fp32 one in 4099."""
    q = quantiser(name)
    codes = torch.arange(0, q.last_code + 1, 4099 if name == "fp32" else 1)
    return torch.cat((codes, torch.tensor([q.last_code])))


@pytest.mark.parametrize("name", ALL)
def test_codes_and_values_are_each_others(name):
    q = quantiser(name)
    codes = codes_of(name)
    values = q.decode(codes)
    assert values.dtype == torch.float32 and torch.equal(q.encode(values), codes.int())
    assert (values[1:-1] < values[:-2]).all(), "a higher code is a lower probability"
    assert values[0] == 0 and not torch.signbit(values[0])
    assert values[-1] == -math.inf and (values[:-2] > -math.inf).all()
    assert int(codes.max()) < 2**q.bits
    ends = torch.tensor([0.0, -0.0, -math.inf])
    assert torch.equal(q.decode(q.encode(ends)), ends)


@pytest.mark.parametrize("name", ALL)
def test_worst_error(name):
    q = quantiser(name)
    values = q.decode(codes_of(name)).double()
    values = values[(values >= LOWEST) & (values <= 0)]
    # next to the middle of each two neighbours, where errors are largest, and everywhere else
    middles = (values[1:] + values[:-1]) / 2
    around = torch.cat((middles, middles - 1e-7, middles + 1e-7))
    grid = torch.cat((around, values, torch.linspace(LOWEST, 0, 1_000_003, dtype=torch.float64)))
    grid = grid.clamp(LOWEST, 0)
    error = (q.decode(q.encode(grid)).double() - grid).abs()
    assert (error <= q.error_at(grid)).all(), (error - q.error_at(grid)).max()
    assert error.max() <= q.worst_error
    relative = ((q.decode(q.encode(grid)).double() - grid).expm1()).abs()
    assert relative.max() <= q.worst_relative_error
    assert (relative * grid.exp()).max() <= q.worst_absolute_error
    if name != "fp32":  # a bound that is far from what happens would say nothing
        assert error.max() > 0.95 * q.worst_error
        assert (relative * grid.exp()).max() > 0.8 * q.worst_absolute_error


@pytest.mark.parametrize("name", ALL)
def test_encoding_is_monotone(name):
    q = quantiser(name)
    falling = -torch.cat((torch.linspace(0, 60, 200_001), torch.logspace(-9, 6, 20_001))).sort().values
    codes = q.encode(falling)
    assert (codes[1:] >= codes[:-1]).all()
    assert (codes != q.last_code).all(), "a finite log p is not -inf"


def test_the_documented_errors():
    documented = {
        "log8": (0.47, 0.013),
        "log10": (0.12, 0.0033),
        "log12": (0.029, 0.00082),
        "log16": (0.0019, 0.000051),
        "fp16": (0.016, 0.00018),
    }
    for name, (worst, of_p) in documented.items():
        q = quantiser(name)
        assert 0.9 * worst < q.worst_error <= 1.02 * worst, (name, q.worst_error)
        assert 0.9 * of_p < q.worst_absolute_error <= 1.03 * of_p, (name, q.worst_absolute_error)


@pytest.mark.parametrize("name", ALL)
def test_what_is_no_logprob_is_refused(name):
    q = quantiser(name)
    for wrong in (math.nan, 0.01, math.inf):
        with pytest.raises(ValueError, match=r"at most 0 and not NaN; got .* at \[1, 2\]"):
            q.encode(torch.tensor([[-1.0, -2, -3], [-math.inf, 0, wrong]]))
    assert q.encode(torch.tensor([3e-6])).tolist() == [0]  # as x - logsumexp(x) may round
    with pytest.raises(TypeError, match="logprobs must be"):
        q.encode(torch.tensor([-1]))
    with pytest.raises(TypeError, match="codes must be"):
        q.decode(torch.tensor([1.0]))
    for wrong in (-1, q.last_code + 1):
        with pytest.raises(ValueError, match=f"codes of {name} must be in .* got {wrong}"):
            q.decode(torch.tensor([0, wrong]))
    assert q.decode(q.encode(torch.empty(2, 0))).shape == (2, 0)


def test_names():
    for wrong in ("log7", "log17", "int8", 8, None):
        with pytest.raises(ValueError, match="quantiser must be one of fp32, fp16, log8"):
            quantiser(wrong)
    assert quantiser("log10") == quantiser("log10") and quantiser("log10").bits == 10


def teachers(k):
    """Log-probabilities of k ids and the tail: even ones, whose errors add up, and all kinds of others."""
    generator = torch.Generator().manual_seed(k)
    V = 2048
    rows = [torch.randn(V, generator=generator, dtype=torch.float64) * s for s in (0.3, 1, 2, 4, 8, 30)]
    rows += [-s * torch.arange(1, V + 1, dtype=torch.float64).log() for s in (0.5, 1, 1.5, 3)]
    rows += [torch.where(torch.arange(V) < m, 0.0, -50.0).double() for m in (1, 2, k // 2 + 1, k, k + 1, V)]
    rows += [torch.where(torch.arange(V) < 3, 0.0, -math.inf).double()]
    full = torch.stack(rows).log_softmax(-1)
    logprobs, ids = full.topk(k)
    log_tail = full.scatter(-1, ids, -math.inf).logsumexp(-1)
    return full, ids, logprobs, log_tail


@pytest.mark.parametrize("name", ["log8", "log9", "log12", "log16", "fp16", "fp32"])
@pytest.mark.parametrize("k", [1, 5, 128, 2047])
def test_sums_are_one_and_the_loss_takes_them(name, k):
    q = quantiser(name)
    full, ids, logprobs, log_tail = teachers(k)
    decoded = q.decode(q.encode(logprobs))
    got = q.sum_to_one(decoded, log_tail.float())
    total = got.double().exp().sum(-1) + log_tail.exp()
    torch.testing.assert_close(total, torch.ones_like(total), atol=2e-6, rtol=0)
    error = (got.double() - logprobs).abs()
    in_range = logprobs >= LOWEST
    assert (error <= 2 * q.worst_error + 1e-5)[in_range].all()
    kl = (logprobs.exp() * (logprobs - got).nan_to_num(0)).sum(-1)
    # half the variance of the errors: what the codes cost, however probable the ids are
    bound = (q.error_at(torch.tensor(-math.log(k) - 2.0)) ** 2).item() + 1e-6
    assert (kl.abs() <= bound).all(), (kl, bound)
    record = sparse_kl_loss(full.float(), ids, got, log_tail.float(), reduction="none")
    assert record.abs().max() <= bound + 1e-5


def test_sum_to_one_refuses_what_never_was_one():
    q = quantiser("log8")
    _, _, logprobs, log_tail = teachers(16)
    decoded = q.decode(q.encode(logprobs))
    for change in (0.3, -0.3, math.nan):
        bad = decoded.clone()
        bad[2] = (bad[2] + change).clamp_max(0)
        with pytest.raises(ValueError, match=r"must sum to 1; got .* at position \[2\]"):
            q.sum_to_one(bad, log_tail)
    for wrong in (math.nan, 0.5):
        tail = log_tail.clone()
        tail[3] = wrong
        with pytest.raises(
            ValueError, match=r"log_tail must be at most 0 and not NaN; got .* at position \[3\]"
        ):
            q.sum_to_one(decoded, tail)
    with pytest.raises(ValueError, match="log_tail must be \\[17\\]"):
        q.sum_to_one(decoded, log_tail[:-1])
    with pytest.raises(TypeError, match="log_tail must be a tensor"):
        q.sum_to_one(decoded, None)
    all_in_the_tail = q.sum_to_one(torch.full((1, 3), -math.inf), torch.zeros(1))
    assert torch.equal(all_in_the_tail, torch.full((1, 3), -math.inf))
    assert q.sum_to_one(torch.empty(0, 3), torch.empty(0)).shape == (0, 3)


def test_padding_takes_no_part():
    q = quantiser("log10")
    _, _, logprobs, log_tail = teachers(8)
    padded = torch.cat((logprobs, torch.full_like(logprobs, -math.inf)), -1)
    got = q.sum_to_one(q.decode(q.encode(padded)), log_tail)
    torch.testing.assert_close(got[:, :8], q.sum_to_one(q.decode(q.encode(logprobs)), log_tail))
    assert (got[:, 8:] == -math.inf).all()
