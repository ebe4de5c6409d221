"""The divergences in a few lines of differentiable torch: any dtype, any device; in float64, the truth.

Forward KL is Minitron's distillation loss (arXiv 2407.14679 section 3); generalised JSD is that of
arXiv 2306.13649 (GKD) with beta = 0 read as forward and beta = 1 as reverse KL.
"""

import math

import torch
from torch import Tensor


def transform_logits(logits: Tensor, *, scale: float, softcap: float, inv_tau: float) -> Tensor:
    """cap * tanh(scale * z / cap) * inv_tau; softcap 0 means none, and -inf stays -inf."""
    y = logits * scale
    if softcap:
        impossible = y == -math.inf
        y = softcap * torch.tanh(y.masked_fill(impossible, 0.0) / softcap)
        y = y.masked_fill(impossible, -math.inf)
    return y * inv_tau


def _expectation(p: Tensor, values: Tensor) -> Tensor:
    """sum p * values over the vocabulary, where p = 0 wins over an infinite or undefined value."""
    impossible = p == 0
    return (p * values.masked_fill(impossible, 0.0)).sum(-1)


def kl_divergence_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.0,
    inv_tau: float = 1.0,
    student_scale: float = 1.0,
    student_softcap: float = 0.0,
    teacher_scale: float = 1.0,
    teacher_softcap: float = 0.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Divergence of each row [..., V] -> [...], in nats, without a temperature-squared factor."""
    V = min(student_logits.shape[-1], teacher_logits.shape[-1]) if vocab_size is None else vocab_size
    s = transform_logits(
        student_logits[..., :V], scale=student_scale, softcap=student_softcap, inv_tau=inv_tau
    )
    t = transform_logits(
        teacher_logits[..., :V], scale=teacher_scale, softcap=teacher_softcap, inv_tau=inv_tau
    )
    # an impossible student token gets no gradient: -inf enters as a constant
    s = torch.where(s == -math.inf, s.detach(), s)
    log_s, log_t = torch.log_softmax(s, -1), torch.log_softmax(t, -1)
    p_s, p_t = log_s.exp(), log_t.exp()
    if beta == 0.0:
        return _expectation(p_t, log_t - log_s)
    if beta == 1.0:
        return _expectation(p_s, log_s - log_t)
    nowhere = (log_s == -math.inf) & (log_t == -math.inf)  # logaddexp has no derivative there
    log_m = torch.logaddexp(
        log_t.masked_fill(nowhere, 0.0) + math.log(beta), log_s.masked_fill(nowhere, 0.0) + math.log1p(-beta)
    )
    return beta * _expectation(p_t, log_t - log_m) + (1.0 - beta) * _expectation(p_s, log_s - log_m)
