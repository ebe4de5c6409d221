"""linear_kl_loss of a shard of the vocabulary on the CPU, out of calls of its native op.

First what the shard's tokens say of each row, then one all-gather for the whole call, which merges it with
the other ranks'; JSD looks at the logits a second time, and has a second all-gather. Then the gradients, with
the stats of the whole vocabulary, from logits that are made again: 6 GEMMs (8 for JSD), where a vocabulary in
one piece needs 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minitron_kernels.ops.kl_loss.divergence import NUM_METRIC_STATE, NUM_STATE, NUM_STATS, NUM_SUMS, STAT_KL
from minitron_kernels.ops.kl_loss.operands import NO_METRICS, TokenMetrics
from minitron_kernels.ops.kl_loss.options import LossOptions
from minitron_kernels.ops.kl_loss.states import (
    empty_state,
    merge_metrics,
    merge_states,
    metric_state_of,
    state_of,
)
from minitron_kernels.ops.kl_loss.vocab_parallel import Shard


def linear_kl_loss_of_shard(
    run: Callable[..., None], arguments: tuple[Any, ...], of_tokens: TokenMetrics, shard: Shard
) -> None:
    """Fills the outputs; all ranks of the shard's group call it with the same tokens.

    Args:
        run: linear_kl_loss_cpu_().
        arguments: its first ones, of this rank's heads.
        of_tokens: labels, metrics and the weight of the cross-entropy.
        shard: this rank's.
    """
    outputs, student, teacher, mask, row_weight, stats, accumulator, needs_grad, *rest = arguments
    loss, new_stats, *grads = outputs
    of_tokens = of_tokens._replace(labels=shard.own_labels(of_tokens.labels))
    if stats is None:
        stats = new_stats
        if loss.numel():
            _statistics(run, arguments, loss, stats, of_tokens, shard)
    if not any(needs_grad):
        return
    if shard.width == 0:
        for grad in grads:
            grad.zero_()
        return
    unused = loss.new_empty(loss.shape)  # the shard's part of the loss
    sides = (student, teacher, mask, row_weight, stats, accumulator, needs_grad)
    if of_tokens.ce_weight is None:
        of_tokens = NO_METRICS
    run((unused, stats, *grads), *sides, *rest, of_tokens=of_tokens, total_vocab=shard.total_vocab)


def _statistics(
    run: Callable[..., None],
    arguments: tuple[Any, ...],
    loss: Tensor,
    stats: Tensor,
    of_tokens: TokenMetrics,
    shard: Shard,
) -> None:
    """Loss [N] and stats [N, 6] of the whole vocabulary, and metrics where they are wanted."""
    _, student, teacher, mask, *_ = arguments
    _, options, schedule, budget = arguments[8:]
    rows, mixture = loss.shape[0], options.divergence.needs_second_look
    labels, metrics, _ = of_tokens

    def look(known: Tensor | None, options: LossOptions, of_tokens: TokenMetrics) -> tuple[Tensor, Tensor]:
        own, own_stats = loss.new_empty(rows), loss.new_empty((rows, NUM_STATS))
        if known is not None:
            own_stats.copy_(known)
        nothing = loss.new_empty(0)
        run(
            (own, own_stats, nothing, nothing, nothing),
            student,
            teacher,
            mask,
            None,
            None if known is None else own_stats,
            None,
            (False, False, False),
            shard.width,
            options,
            schedule,
            budget,
            of_tokens=of_tokens,
            total_vocab=shard.total_vocab,
        )
        return own, own_stats

    fields = NUM_STATE + NUM_METRIC_STATE * (metrics is not None)
    if shard.width == 0:
        state = empty_state(loss, fields, rows)
    else:
        # the first look of JSD's is that of forward KL, whose own KL is not used
        first = options._replace(beta=0.0) if mixture else options
        own = None if metrics is None else torch.empty_like(metrics)
        if metrics is not None and options.label_smoothing:
            first = first._replace(label_smoothing=1.0)  # a cross-entropy that says what all tokens sum up to
        state = state_of(*look(None, first, TokenMetrics(labels, own)))
        if own is not None:
            state = torch.cat((state, metric_state_of(own, options, shard.total_vocab)))
    states = shard.gather(state).wait()
    merged = merge_states(states[:, :NUM_STATE], mask, options.divergence, loss.dtype)
    for out, value in zip((loss, stats), merged, strict=True):
        out.copy_(value)
    if metrics is not None:
        with_max = torch.cat((states[:, :1], states[:, NUM_STATE:]), 1)
        metrics.copy_(merge_metrics(with_max, labels is not None, mask, options, shard.widths))
    if not mixture:
        return
    sums = loss.new_zeros((NUM_SUMS, rows))
    if shard.width:
        sums[0], with_kl = look(stats, options, NO_METRICS)
        sums[1] = with_kl[:, STAT_KL]
    total = shard.gather(sums).wait().double().sum(0)
    loss.copy_(total[0])
    stats[:, STAT_KL] = total[1]
