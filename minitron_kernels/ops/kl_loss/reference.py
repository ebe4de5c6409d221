"""The divergences in a few lines of differentiable torch: any dtype, any device; in float64, the truth.

Forward KL is Minitron's distillation loss (arXiv 2407.14679 section 3); generalised JSD is that of
arXiv 2306.13649 (GKD) with beta = 0 read as forward and beta = 1 as reverse KL.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor


def transform_logits(logits: Tensor, *, scale: float, softcap: float, inv_tau: float) -> Tensor:
    """cap * tanh(scale * z / cap) * inv_tau; softcap 0 means none, and -inf stays -inf."""
    y = logits * scale
    if softcap:
        masked_out = y == -math.inf
        y = softcap * torch.tanh(y.masked_fill(masked_out, 0.0) / softcap)
        y = y.masked_fill(masked_out, -math.inf)
    return y * inv_tau


def _expectation(p: Tensor, values: Tensor) -> Tensor:
    """sum p * values over the vocabulary, where p = 0 wins over an infinite or undefined value."""
    without_mass = p == 0
    return (p * values.masked_fill(without_mass, 0.0)).sum(-1)


def _over_mixture(log_s: Tensor, log_t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(S / M) and log(T / M), M = beta T + (1 - beta) S, of tokens that one of the two may mask out.

    From the log-ratio, by log1p and expm1: logarithms of about 10 would have no digits left of a log-ratio
    of 1e-6, or of beta = 1e-8.
    """
    nowhere = (log_s == -math.inf) & (log_t == -math.inf)
    d = (log_t - log_s).masked_fill(nowhere, 0.0)
    apart = d > 30.0  # what its exponential might overflow; each side computes with 0 where the other holds
    near = -torch.log1p(beta * torch.expm1(d.masked_fill(apart, 0.0)))
    far = -torch.log(beta + (1.0 - beta) * torch.exp(-d.masked_fill(~apart, 0.0)))
    return torch.where(apart, far - d, near), torch.where(apart, far, d + near)


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
    label_smoothing: float = 0.0,
) -> Tensor:
    """Divergence of each row [..., V] -> [...], in nats, without a temperature-squared factor."""
    V = min(student_logits.shape[-1], teacher_logits.shape[-1]) if vocab_size is None else vocab_size
    s = transform_logits(
        student_logits[..., :V], scale=student_scale, softcap=student_softcap, inv_tau=inv_tau
    )
    t = transform_logits(
        teacher_logits[..., :V], scale=teacher_scale, softcap=teacher_softcap, inv_tau=inv_tau
    )
    # a token that the student masks out gets no gradient: -inf enters as a constant
    s = torch.where(s == -math.inf, s.detach(), s)
    dtype = s.dtype
    if 0.0 < beta < 1.0:
        # the divergence from a mixture lies many digits below what it is the difference of: in fp32 a loss
        # was 2 % off where the models are close, and all of it where beta is near 0
        s, t = s.double(), t.double()
    log_s, log_t = torch.log_softmax(s, -1), torch.log_softmax(t, -1)
    p_s, p_t = log_s.exp(), log_t.exp()
    if beta == 0.0:
        return _expectation(p_t, log_t - log_s)
    if beta == 1.0:
        return _expectation(p_s, log_s - log_t)
    s_over_m, t_over_m = _over_mixture(log_s, log_t, beta)
    loss = beta * _expectation(p_t, t_over_m) + (1.0 - beta) * _expectation(p_s, s_over_m)
    return loss.to(dtype)


def metrics_rows(
    student_logits: Tensor,
    labels: Tensor | None,
    *,
    student_scale: float = 1.0,
    student_softcap: float = 0.0,
    label_smoothing: float = 0.0,
    vocab_size: int | None = None,
    **_: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, entropy and log p(label) of rows [N, V] at temperature 1 -> [N]; 0 for a label of -1.

    Cross-entropy as in F.cross_entropy: (1 - e) -log p(label) + e mean_v -log p(v), e = label_smoothing.
    """
    y = transform_logits(
        student_logits[..., :vocab_size], scale=student_scale, softcap=student_softcap, inv_tau=1.0
    )
    y = torch.where(y == -math.inf, y.detach(), y)
    log_p = torch.log_softmax(y, -1)
    entropy = -_expectation(log_p.exp(), log_p)
    if labels is None:
        zero = torch.zeros_like(entropy)
        return zero, entropy, zero
    label_logprob = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    # neither part where it has no weight: it may be infinite
    ce = -(1.0 - label_smoothing) * label_logprob if label_smoothing < 1 else torch.zeros_like(entropy)
    if label_smoothing:
        ce = ce - label_smoothing * log_p.mean(-1)
    return ce.masked_fill(labels < 0, 0.0), entropy, label_logprob.masked_fill(labels < 0, 0.0)


Terms = tuple[Tensor, ...]  # [N]: the divergence; with metrics cross-entropy, entropy, log p(label) too


def rows(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    vocab_size: int,
    needs_metrics: bool = False,
    **options: float,
) -> Terms:
    """[N, Vs], [N, Vt] -> [N], at least in fp32; masked rows are replaced before they can spread a NaN."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    if mask is not None:
        student, teacher = (x.masked_fill(~mask[:, None], 0.0) for x in (student, teacher))
    student = student.to(dtype)
    terms: Terms = (kl_divergence_rows(student, teacher.to(dtype), vocab_size=vocab_size, **options),)
    if needs_metrics:
        terms += metrics_rows(student, labels, vocab_size=vocab_size, **options)
    return terms if mask is None else tuple(term.masked_fill(~mask, 0.0) for term in terms)


def sparse_rows(
    student: Tensor,
    ids: Tensor,
    outcomes: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    vocab_size: int,
    needs_metrics: bool = False,
    **options: float,
) -> Terms:
    """rows() with a teacher of k ids: [N, Vs], [N, k] with -1 for none, [N, k + 1] -> [N].

    The outcomes are the teacher's log-probabilities of the ids, and of any other token.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    if mask is not None:
        student = student.masked_fill(~mask[:, None], 0.0)
    student = student[:, :vocab_size].to(dtype)
    s = transform_logits(
        student,
        scale=options["student_scale"],
        softcap=options["student_softcap"],
        inv_tau=options["inv_tau"],
    )
    s = torch.where(s == -math.inf, s.detach(), s)
    given = ids >= 0
    places = torch.where(given, ids, vocab_size)
    named = torch.zeros(s.shape[0], vocab_size + 1, dtype=torch.bool, device=s.device)
    named = named.scatter(1, places, True)[:, :vocab_size]
    rest = s.masked_fill(named, -math.inf)
    some = (rest > -math.inf).any(1)  # logsumexp of nothing has no derivative
    tail = torch.where(some, rest.masked_fill(~some[:, None], 0.0).logsumexp(1), -math.inf)
    at_ids = s.gather(1, ids.clamp(min=0)).masked_fill(~given, -math.inf)
    of_student = torch.cat((at_ids, tail[:, None]), 1)
    terms: Terms = (kl_divergence_rows(of_student, outcomes, beta=options["beta"]),)
    if needs_metrics:
        terms += metrics_rows(student, labels, vocab_size=vocab_size, **options)
    return terms if mask is None else tuple(term.masked_fill(~mask, 0.0) for term in terms)


Side = tuple[Tensor, Tensor, Tensor | None]  # hidden states, head, bias
_BLOCK = 256  # tokens whose logits exist at a time


def _logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None, keep: Tensor | None, vocab_size: int
) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if keep is not None:
        hidden = hidden.masked_fill(~keep[:, None], 0.0)
    with _exact_products(hidden.device.type):
        z = hidden.to(dtype) @ head[:vocab_size].to(dtype).T
    return z if bias is None else z + bias[:vocab_size].to(dtype)


def _exact_products(device: str) -> AbstractContextManager[object]:
    """Within it, autocast does not round operands that have been widened, nor the logits that come out."""
    # meta has no autocast
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def _in_blocks(
    block: Callable[..., Terms], per_row: tuple[Tensor | None, ...], params: tuple[Any, ...]
) -> Terms:
    """The terms of block(*per_row, *params), some rows at a time; logits are made again for the gradient."""
    # torch.func has no rule for checkpoint's hooks
    again = torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
    hidden, blocks = per_row[0], []
    assert hidden is not None
    for begin in range(0, max(hidden.shape[0], 1), _BLOCK):  # one block of nothing for no tokens
        arguments = (*(None if x is None else x[begin : begin + _BLOCK] for x in per_row), *params)
        blocks.append(
            torch.utils.checkpoint.checkpoint(block, *arguments, use_reentrant=False)
            if again
            else block(*arguments)
        )
    return tuple(map(torch.cat, zip(*blocks, strict=True)))


def linear_rows(
    student: Side,
    teacher: Side,
    mask: Tensor | None,
    labels: Tensor | None,
    vocab_size: int,
    needs_metrics: bool = False,
    **options: float,
) -> Terms:
    """rows() from hidden states [N, H] of both."""

    def block(
        hidden: Tensor,
        teacher_hidden: Tensor,
        keep: Tensor | None,
        targets: Tensor | None,
        head: Tensor,
        bias: Tensor | None,
        teacher_head: Tensor,
        teacher_bias: Tensor | None,
    ) -> Terms:
        student_logits = _logits(hidden, head, bias, keep, vocab_size)
        teacher_logits = _logits(teacher_hidden, teacher_head, teacher_bias, keep, vocab_size)
        return rows(student_logits, teacher_logits, keep, targets, vocab_size, needs_metrics, **options)

    return _in_blocks(block, (student[0], teacher[0], mask, labels), (*student[1:], *teacher[1:]))


def linear_sparse_rows(
    student: Side,
    ids: Tensor,
    outcomes: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    vocab_size: int,
    needs_metrics: bool = False,
    **options: float,
) -> Terms:
    """sparse_rows() from hidden states [N, H] of the student."""

    def block(
        hidden: Tensor,
        row_ids: Tensor,
        row_outcomes: Tensor,
        keep: Tensor | None,
        targets: Tensor | None,
        head: Tensor,
        bias: Tensor | None,
    ) -> Terms:
        logits = _logits(hidden, head, bias, keep, vocab_size)
        return sparse_rows(logits, row_ids, row_outcomes, keep, targets, vocab_size, needs_metrics, **options)

    return _in_blocks(block, (student[0], ids, outcomes, mask, labels), student[1:])
