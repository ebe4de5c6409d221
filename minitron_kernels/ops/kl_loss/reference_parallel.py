"""The reference over ranks that share the vocabulary: each rank computes all of it, from gathered heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minitron_kernels.ops.kl_loss.find_shard import find_shard
from minitron_kernels.ops.kl_loss.labels import check_labels
from minitron_kernels.ops.kl_loss.operands import Side
from minitron_kernels.ops.kl_loss.vocab_parallel import Parallel, Shard


class _Gather(torch.autograd.Function):
    """The rows of all ranks. What follows is the same on all of them, and so each takes its own gradient."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, shard: Shard, counts: tuple[int, ...]) -> Tensor:
        rank = shard.group.rank()
        ctx.begin, ctx.count, ctx.rows = sum(counts[:rank]), counts[rank], own.shape[0]
        part = own.new_zeros((max(counts), *own.shape[1:]))
        part[: ctx.count] = own[: ctx.count]
        parts = shard.gather(part).wait()
        return torch.cat([parts[r, :count] for r, count in enumerate(counts)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        own = grad[ctx.begin : ctx.begin + ctx.count]
        padding = own.new_zeros((ctx.rows - ctx.count, *own.shape[1:]))
        return torch.cat((own, padding)), None, None


def gather_sides(
    parallel: Parallel, student: Side, teacher: Side, labels: Tensor | None, vocab_size: int
) -> tuple[Side, Side, int]:
    """Both sides with heads, biases and tokens of all ranks, and the number of tokens of the vocabulary."""
    hidden, rows = student[0], (student[1].shape[0], teacher[1].shape[0])
    dtypes = [str(x.dtype) for x in (*student[:2], *teacher[:2])]
    asked: tuple[bool | str, ...] = ("reference", torch.is_grad_enabled(), *dtypes)
    shard = find_shard(parallel, *rows, vocab_size, hidden.shape[0], asked, 0, hidden.device)
    check_labels(labels, shard.total_vocab)
    tokens = (hidden.shape[0],) * shard.group.size()

    def whole(side: Side) -> Side:
        hidden, head, bias = side
        if parallel.sequence_parallel:
            hidden = _Gather.apply(hidden, shard, tokens)
        head = _Gather.apply(head, shard, shard.widths)
        return hidden, head, None if bias is None else _Gather.apply(bias, shard, shard.widths)

    return whole(student), whole(teacher), shard.total_vocab
