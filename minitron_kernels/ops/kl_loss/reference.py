"""The divergences in a few lines of differentiable torch: any dtype, any device; in float64, the truth.

Forward KL is Minitron's distillation loss (arXiv 2407.14679 section 3); generalised JSD is that of
arXiv 2306.13649 (GKD) with beta = 0 read as forward and beta = 1 as reverse KL.
"""

import math
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
    log_s, log_t = torch.log_softmax(s, -1), torch.log_softmax(t, -1)
    p_s, p_t = log_s.exp(), log_t.exp()
    if beta == 0.0:
        return _expectation(p_t, log_t - log_s)
    if beta == 1.0:
        return _expectation(p_s, log_s - log_t)
    nowhere = (log_s == -math.inf) & (log_t == -math.inf)  # logaddexp has no derivative there
    # logarithms of tensors: torch.compile keeps those symbolic, and no new beta compiles anew
    log_beta, log_rest = (s.new_ones((), dtype=torch.float64).mul(x).log() for x in (beta, 1.0 - beta))
    log_m = torch.logaddexp(
        log_t.masked_fill(nowhere, 0.0) + log_beta, log_s.masked_fill(nowhere, 0.0) + log_rest
    )
    return beta * _expectation(p_t, log_t - log_m) + (1.0 - beta) * _expectation(p_s, log_s - log_m)


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
    ce = -(1.0 - label_smoothing) * label_logprob
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
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    if mask is not None:
        student, teacher = (x.masked_fill(~mask[:, None], 0.0) for x in (student, teacher))
    student = student.to(dtype)
    terms: Terms = (kl_divergence_rows(student, teacher.to(dtype), vocab_size=vocab_size, **options),)
    if needs_metrics:
        terms += metrics_rows(student, labels, vocab_size=vocab_size, **options)
    return terms if mask is None else tuple(term.masked_fill(~mask, 0.0) for term in terms)


Side = tuple[Tensor, Tensor, Tensor | None]  # hidden states, head, bias
_BLOCK = 256  # tokens whose logits exist at a time


def linear_rows(
    student: Side,
    teacher: Side,
    mask: Tensor | None,
    labels: Tensor | None,
    vocab_size: int,
    needs_metrics: bool = False,
    **options: float,
) -> Terms:
    """The same from hidden states [N, H], a block at a time, its logits made again for its gradient."""
    dtype = torch.float64 if student[0].dtype == torch.float64 else torch.float32

    def logits(hidden: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
        z = hidden.to(dtype) @ head[:vocab_size].to(dtype).T
        return z if bias is None else z + bias[:vocab_size].to(dtype)

    def block(
        student_rows: Tensor, teacher_rows: Tensor, keep: Tensor | None, targets: Tensor | None, *params: Any
    ) -> Terms:
        student_head, student_bias, teacher_head, teacher_bias = params
        if keep is not None:
            student_rows, teacher_rows = (
                x.masked_fill(~keep[:, None], 0.0) for x in (student_rows, teacher_rows)
            )
        student_logits = logits(student_rows, student_head, student_bias)
        teacher_logits = logits(teacher_rows, teacher_head, teacher_bias)
        return rows(student_logits, teacher_logits, keep, targets, vocab_size, needs_metrics, **options)

    params = (student[1], student[2], teacher[1], teacher[2])
    # torch.func has no rule for checkpoint's hooks
    again = torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
    blocks = []
    for begin in range(0, max(student[0].shape[0], 1), _BLOCK):  # one block of nothing for no tokens
        part = slice(begin, begin + _BLOCK)
        keep, targets = (None if x is None else x[part] for x in (mask, labels))
        arguments = (student[0][part], teacher[0][part], keep, targets, *params)
        blocks.append(
            torch.utils.checkpoint.checkpoint(block, *arguments, use_reentrant=False)
            if again
            else block(*arguments)
        )
    return tuple(map(torch.cat, zip(*blocks, strict=True)))
