"""student_stats and student_grad of epilogues.py in plain torch: for logits that exist, on the CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minitron_kernels.ops.kl_loss.epilogues import Epilogues
from minitron_kernels.ops.kl_loss.options import LossOptions
from minitron_kernels.ops.kl_loss.reference import transform_logits


def _transformed(logits: Tensor, bias: Tensor | None, options: LossOptions) -> Tensor:
    z = logits if bias is None else logits + bias
    return transform_logits(
        z, scale=options.student_scale, softcap=options.student_softcap, inv_tau=options.inv_tau
    )


def student_stats(
    logits: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    state: Tensor,
    first: bool,
    options: LossOptions,
    labels: Tensor | None = None,
    metric_state: Tensor | None = None,
    first_token: int = 0,
) -> None:
    """As the op kl_student_stats_, of whole rows only."""
    if not first or first_token:
        raise NotImplementedError("logits that exist are looked at in whole rows")
    s = _transformed(logits, bias, options)
    top = s.amax(1)
    base = top.clamp(min=torch.finfo(s.dtype).min)[:, None]
    state[0] = top
    state[1] = (s - base).exp_().sum(1)
    if metric_state is None:
        return
    tau = 1.0 / options.inv_tau
    below = (s - base).mul_(tau)
    exps = below.exp()
    metric_state[0] = exps.sum(1)
    metric_state[1] = exps.mul_(below.masked_fill_(exps == 0, 0.0)).sum(1)
    metric_state[2] = s.masked_fill(s == -math.inf, 0.0).sum(1).mul_(tau) if options.label_smoothing else 0.0
    metric_state[3] = -math.inf
    if labels is not None:
        at = s.gather(1, labels.clamp(min=0)[:, None])[:, 0] * tau
        metric_state[3] = at.masked_fill(labels < 0, -math.inf)


def student_grad(
    logits: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    weight: Tensor,
    lse: Tensor,
    out: Tensor,
    vocab_size: int,
    options: LossOptions,
    labels: Tensor | None = None,
    lse_y: Tensor | None = None,
    ce_weight: Tensor | None = None,
    first_token: int = 0,
    total_vocab: int = 0,
) -> None:
    """As the op kl_student_grad_, of whole rows only."""
    s = _transformed(logits, bias, options)
    # of a row without any token weight is 0, and so is its gradient
    lse = lse.masked_fill(lse == -math.inf, 0.0)
    grad = (s - lse[:, None]).exp_().mul_(weight[:, None])
    if ce_weight is not None and lse_y is not None and labels is not None:
        tau, smoothing = 1.0 / options.inv_tau, options.label_smoothing
        of_ce = (s * tau).sub_(lse_y[:, None]).exp_()
        if smoothing:
            of_ce.sub_(smoothing / (total_vocab or vocab_size))
        at = (labels >= 0).to(of_ce.dtype)[:, None] * (smoothing - 1.0)
        of_ce.scatter_add_(1, labels.clamp(min=0)[:, None], at)
        grad.add_(of_ce.mul_(ce_weight[:, None] * tau))
    factor = options.student_scale * options.inv_tau
    if options.student_softcap:
        ratio = s / (options.student_softcap * options.inv_tau)
        grad.mul_((1.0 - ratio) * (1.0 + ratio))
    grad.mul_(factor).masked_fill_(s == -math.inf, 0.0)
    if mask is not None:
        grad.masked_fill_(~mask[:, None], 0.0)
    out.copy_(grad)


def cpu_epilogues() -> Epilogues:
    """What a sparse teacher's loss on rows of logits takes, on the CPU: rows of outcomes go to C++."""
    ops = torch.ops.minitron_kernels

    def forward(logits, mask, loss, stats, vocab_size, options):  # type: ignore[no-untyped-def]
        of_rows = ops.kl_loss_forward(logits[0], logits[1], mask, vocab_size, list(options))
        for out, value in zip((loss, stats), of_rows, strict=True):
            out.copy_(value)

    def grad(logits, mask, weight, stats, out, vocab_size, options):  # type: ignore[no-untyped-def]
        rows = logits[0], logits[1], mask, vocab_size, list(options)
        out.copy_(ops.kl_loss_backward(weight.contiguous(), stats.contiguous(), *rows))

    def absent(*_: object) -> None:
        raise NotImplementedError("a sparse teacher needs no tiles of two models")

    return Epilogues(forward, grad, *(absent,) * 5, student_stats=student_stats, student_grad=student_grad)
