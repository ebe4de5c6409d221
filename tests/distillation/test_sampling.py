"""Sampled ids: by the distribution function, unbiased; the gradient of their loss is the whole KL's."""

from __future__ import annotations

import math

import pytest
import torch

from minitron_kernels.distillation.cache import sampling
from minitron_kernels.distillation.cache.sampling import sample_ids, sampled_logprobs
from minitron_kernels.ops.kl_loss.op import linear_kl_loss
from minitron_kernels.ops.kl_loss.sparse import linear_sparse_kl_loss


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def counts_over(vocab_size, sampled):
    """[..., V] how often each token was drawn."""
    out = torch.zeros(*sampled.ids.shape[:-1], vocab_size + 1, dtype=torch.int32)
    out.scatter_add_(-1, torch.where(sampled.ids < 0, vocab_size, sampled.ids), sampled.counts)
    assert (out[..., -1] == 0).all(), "padding was never drawn"
    return out[..., :-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_draws_are_the_inverse_of_the_distribution_function(dtype):
    logits = (torch.randn(3, 4, 50, generator=seeded()) * 3).to(dtype)
    logits[..., 7] = -math.inf
    sampled = sample_ids(logits, 20, seeded(1))
    u = torch.rand(12, 20, dtype=torch.float64, generator=seeded(1))
    p = logits.double().softmax(-1).view(12, 50)
    at = (p.cumsum(-1)[:, None, :] <= u[:, :, None]).sum(-1)
    expected = torch.stack([row.bincount(minlength=50) for row in at]).view(3, 4, 50)
    assert torch.equal(counts_over(50, sampled), expected.int())
    assert (sampled.counts.sum(-1) == 20).all()
    assert ((sampled.ids == -1) == (sampled.counts == 0)).all()
    for row in sampled.ids.view(12, 20).tolist():
        known = [token for token in row if token >= 0]
        assert known == sorted(set(known)) and row == known + [-1] * (20 - len(known))
    assert not (sampled.ids == 7).any()


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53, 1.0])
def test_what_is_impossible_is_not_drawn_at_either_end(u, monkeypatch):
    def always(rows, n, *_):
        return torch.full((rows, n), u, dtype=torch.float64)

    monkeypatch.setattr(sampling, "_uniform", always)
    logits = torch.tensor([-math.inf, -math.inf, 0.3, 0.1, 1 / 3, -math.inf])
    sampled = sample_ids(logits, 2)
    assert sampled.ids.tolist() == [2 if u == 0 else 4, -1] and sampled.counts.tolist() == [2, 0]


def test_positions_at_a_time_change_nothing(monkeypatch):
    logits = torch.randn(5, 7, 40, generator=seeded())
    expected = sample_ids(logits, 6, seeded(3))
    for workspace_bytes in (1, 5000):
        monkeypatch.setattr(sampling, "_WORKSPACE_BYTES", workspace_bytes)
        got = sample_ids(logits, 6, seeded(3))
        assert torch.equal(got.ids, expected.ids) and torch.equal(got.counts, expected.counts)


def test_log_probabilities_do_as_well_as_logits():
    logits = torch.randn(9, 30, generator=seeded())
    a, b = sample_ids(logits + 5, 8, seeded(1)), sample_ids(logits.log_softmax(-1), 8, seeded(1))
    assert torch.equal(a.ids, b.ids) and torch.equal(a.counts, b.counts)


def test_improbable_tokens_are_drawn_as_often_as_they_should():
    """Among 131072 tokens those behind have 2e-6 each: sums in float32 would draw some never, some twice."""
    V, n = 131072, 400_000
    logits = torch.zeros(1, V)
    logits[0, 0] = 12.0
    p = logits.double().softmax(-1)[0]
    counts = counts_over(V, sample_ids(logits, n, seeded(4)))[0].double()
    # groups of 4096 neighbours; 6 standard deviations of a binomial, with this seed's draws
    groups, expected = counts[1:-3].view(-1, 4).sum(-1), (p[1:-3] * n).view(-1, 4).sum(-1)
    groups, expected = groups[:32000].view(-1, 1000).sum(-1), expected[:32000].view(-1, 1000).sum(-1)
    assert ((groups - expected).abs() < 6 * expected.sqrt()).all()


def test_the_mean_gradient_is_that_of_the_whole_kl():
    """Means of many draws against the gradient of linear_kl_loss(), by the variance that theory gives.

    With gradients g = (q - c / n) head per position, Var of a component is that of one row of the head,
    over n draws and R repetitions: 6 standard deviations, and the draws are fixed by a seed.
    """
    V, H, N, n, repetitions = 31, 8, 5, 12, 400
    hidden = torch.randn(N, H, generator=seeded(), dtype=torch.float64).requires_grad_()
    head = torch.randn(V, H, generator=seeded(1), dtype=torch.float64)
    teacher_hidden = torch.randn(N, H, generator=seeded(2), dtype=torch.float64)
    teacher_head = torch.randn(V, H, generator=seeded(3), dtype=torch.float64)
    loss = linear_kl_loss(hidden, head, teacher_hidden, teacher_head, reduction="sum", backend="reference")
    (whole,) = torch.autograd.grad(loss, hidden)
    many = teacher_hidden[None].expand(repetitions, N, H)
    sampled = sample_ids(many @ teacher_head.t(), n, seeded(5))
    x = hidden.detach()[None].expand(repetitions, N, H).clone().requires_grad_()
    loss = linear_sparse_kl_loss(
        x, head, sampled.ids, sampled_logprobs(sampled.counts), None, reduction="sum", backend="reference"
    )
    (each,) = torch.autograd.grad(loss, x)
    p = (teacher_hidden @ teacher_head.t()).softmax(-1)
    mean = p @ head
    variance = p @ head**2 - mean**2
    bound = 6 * (variance / (n * repetitions)).sqrt()
    error = (each.mean(0) - whole).abs()
    assert (error < bound).all(), (error / bound).max()
    assert (error > bound / 600).any()
    # the draws do scatter as they should: else the bound would be met by what draws nothing at random
    ratio = each.var(0) / (variance / n)
    assert ratio.min() > 0.5 and ratio.max() < 2
    # the top tokens alone are biased by far more
    top = torch.topk(p, n).values
    assert (1 - top.sum(-1)).max() > 0.01


def test_weights():
    counts = torch.tensor([[3, 1, 0], [4, 0, 0], [0, 0, 0]], dtype=torch.int32)
    expected = torch.tensor([[0.75, 0.25, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(sampled_logprobs(counts).exp(), expected)
    with pytest.raises(TypeError, match="counts must be a tensor of integers"):
        sampled_logprobs(torch.ones(1, 2))
    with pytest.raises(ValueError, match="counts must be at least 0"):
        sampled_logprobs(torch.tensor([[3, -1]]))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, "none"])
def test_rows_that_are_no_distribution_are_refused(wrong):
    logits = torch.zeros(4, 5)
    if wrong == "none":
        logits[2] = -math.inf
    else:
        logits[2, 3] = wrong
    with pytest.raises(ValueError, match="of position 2 is"):
        sample_ids(logits, 3)


def test_arguments_are_refused_by_name():
    logits = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="n must be at least 1"):
        sample_ids(logits, 0)
    with pytest.raises(TypeError, match="n must be an int"):
        sample_ids(logits, 2.0)
    with pytest.raises(TypeError, match="logits must be"):
        sample_ids(logits.long(), 2)
    with pytest.raises(ValueError, match="logits must be"):
        sample_ids(torch.zeros(2, 0), 2)
    assert sample_ids(torch.zeros(0, 5), 3).ids.shape == (0, 3)
