"""What tests of imports share: a teacher's rows, and what a payload made of them must be."""

from __future__ import annotations

import torch

from minitron_kernels.ops.kl_loss.sparse import sparse_kl_loss

V = 151936  # more than 17 bits


def teacher(T, k, seed=0, vocab=V):
    """Token ids [T], full log-probabilities [T, V] and the k likeliest of them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (T,), generator=generator)
    logits = torch.randn(T, vocab, generator=generator)
    logits[:, -50:] += 9  # ids that need all bits
    full = logits.double().log_softmax(-1)
    logprobs, ids = full.topk(k)
    return tokens, full, ids, logprobs


def check_payload(payload, ids, logprobs, *, rows=None, atol=1e-6):
    """A payload is that of these rows, the rest is in the tail, and a row that is missing has no loss."""
    T = len(payload["ids"])
    rows = T if rows is None else rows
    assert payload["ids"].dtype == torch.int64 and payload["logprobs"].dtype == torch.float32
    assert torch.equal(payload["ids"][:rows], ids)
    torch.testing.assert_close(payload["logprobs"][:rows].double(), logprobs, atol=atol, rtol=0)
    mass = payload["logprobs"].double().exp().sum(-1) + payload["log_tail"].double().exp()
    torch.testing.assert_close(mass, torch.ones(T, dtype=torch.float64), atol=2e-6, rtol=0)
    assert (payload["ids"][rows:] == -1).all() and (payload["log_tail"][rows:] == 0).all()
    if rows < T:
        student = torch.randn(T, V, requires_grad=True)
        loss = sparse_kl_loss(
            student, payload["ids"], payload["logprobs"], payload["log_tail"], reduction="none"
        )
        (grad,) = torch.autograd.grad(loss[-1], student)
        assert loss[-1].abs() < 1e-6 and grad.abs().max() < 1e-9
