"""student_stats and student_grad of epilogues.py in plain torch, for the CPU.

They serve where logits exist, and where ranks share the vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minitron_kernels.ops.kl_loss.epilogues import Epilogues
from minitron_kernels.ops.kl_loss.options import LossOptions
from minitron_kernels.ops.kl_loss.reference import transform_logits
from minitron_kernels.ops.kl_loss.states import finite, merge_metric_states


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
    """As the op kl_student_stats_; rows that do not count have what their logits say, which nobody reads."""
    s = _transformed(logits, bias, options)
    tau, top = 1.0 / options.inv_tau, s.amax(1)
    above = finite(top)[:, None]
    total = (s - above).exp_().sum(1)
    if metric_state is not None:
        below = (s - above).mul_(tau)
        exps = below.exp()
        sum_y = exps.sum(1)
        dot_y = exps.mul_(below.masked_fill_(exps == 0, 0.0)).sum(1)
        total_y = torch.zeros_like(top)
        if options.label_smoothing:
            total_y = s.masked_fill(s == -math.inf, 0.0).sum(1).mul_(tau)
        label = torch.full_like(top, -math.inf)
        if labels is not None:
            column = labels - first_token
            here = (column >= 0) & (column < s.shape[1])
            at = s.gather(1, torch.where(here, column, 0)[:, None])[:, 0] * tau
            label = torch.where(here, at, label)
        new = torch.stack((sum_y, dot_y, total_y, label))
        if not first:
            tops = torch.stack((state[0], top)) * tau
            _, new = merge_metric_states(tops, torch.stack((metric_state, new)))
        metric_state.copy_(new)
    if not first:
        all_top = torch.maximum(state[0], top)
        total = _scaled(state[1], state[0], all_top) + _scaled(total, top, all_top)
        top = all_top
    state[0], state[1] = top, total


def _scaled(total: Tensor, top: Tensor, all_top: Tensor) -> Tensor:
    return total * (top - finite(all_top)).exp()


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
    """As the op kl_student_grad_."""
    s = _transformed(logits, bias, options)
    # of a row without any token weight is 0, and so is its gradient
    lse = lse.masked_fill(lse == -math.inf, 0.0)
    grad = (s - lse[:, None]).exp_().mul_(weight[:, None])
    if ce_weight is not None and lse_y is not None and labels is not None:
        tau, smoothing = 1.0 / options.inv_tau, options.label_smoothing
        of_ce = (s * tau).sub_(lse_y[:, None]).exp_()
        if smoothing:
            of_ce.sub_(smoothing / (total_vocab or vocab_size))
        column = labels - first_token
        here = (column >= 0) & (column < s.shape[1])
        at = here.to(of_ce.dtype)[:, None] * (smoothing - 1.0)
        of_ce.scatter_add_(1, torch.where(here, column, 0)[:, None], at)
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
