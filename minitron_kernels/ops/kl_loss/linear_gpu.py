"""linear_kl_loss on CUDA and ROCm tensors: the vendor's GEMMs into fp32 logits, and epilogues on them.

    store      for a chunk of rows: both logits of the whole vocabulary, turned into loss, stats and dz. The
               dz of many chunks wait for one GEMM each that makes dX and dW. 4 GEMMs.
    recompute  for a tile of the vocabulary and all rows: logits, merged into the stats. Then tile by tile
               logits again, dz, GEMMs. 6 GEMMs (8 for JSD).
    forward    no gradient needed: operands of 16 bit go through Triton's fused kernel, O(N) memory; fp32, and
               all of the native backend, which has no such kernel, as the first half of recompute.

Where ranks share the vocabulary (vocab_parallel.py), each chunk of rows has an exchange between statistics
and dz; store, too, then makes statistics and dz by kernels of their own.

Nothing waits for the GPU: masked rows are computed with zeros for hidden states and a zero dz, not left out.
All memory is torch's, on the current stream, so that a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minitron_kernels.ops.kl_loss.divergence import Divergence
from minitron_kernels.ops.kl_loss.epilogues import Epilogues
from minitron_kernels.ops.kl_loss.gemm_gpu import matmul, summed_in_fp32
from minitron_kernels.ops.kl_loss.gpu_figures import figures_of
from minitron_kernels.ops.kl_loss.linear_rows import NO_METRICS, Side, TokenMetrics, row_weights
from minitron_kernels.ops.kl_loss.options import LossOptions
from minitron_kernels.ops.kl_loss.plan_gpu import GpuProblem, padded, plan, sum_has_memory, sums_with_memory
from minitron_kernels.ops.kl_loss.row_statistics import Logits, RowStatistics, slices, statistics, store
from minitron_kernels.ops.kl_loss.vocab_parallel import HiddenSum, Shard


class _Sum:
    """A gradient that is the sum of several GEMMs: added up in fp32, then written in its own dtype.

    Args:
        out: what to write; what to add to if `adds`.
        kind: dtype of the products' operands.
        parts: how many products are added; with the last of them `out` is written.
        unscale: 0-dim, to be multiplied by at the end; None for 1.
        adds: whether `out` already holds a sum.
        rounds: whether a single product may be rounded to the dtype of `out` by its GEMM.
    """

    def __init__(
        self,
        out: Tensor,
        kind: torch.dtype,
        parts: int,
        unscale: Tensor | None,
        *,
        adds: bool = False,
        rounds: bool = True,
    ) -> None:
        self.out, self.unscale, self.adds, self.missing = out, unscale, adds, parts
        in_place = not sum_has_memory(out.dtype, kind, parts, adds, rounds)
        self.sum = out if in_place else None
        self.started = in_place and adds

    def add(self, a: Tensor, b: Tensor) -> None:
        if self.sum is None:
            self.sum = torch.empty(self.out.shape, dtype=torch.float32, device=self.out.device)
        matmul(a, b, self.sum, self.started)
        self.started = True
        self.missing -= 1
        if self.missing == 0:
            self._write(self.sum)

    def _write(self, total: Tensor) -> None:
        self.sum = None  # its memory is the next sum's
        if self.unscale is not None:
            total.mul_(self.unscale)
        if total is not self.out:
            self.out.add_(total) if self.adds else self.out.copy_(total)


class _Call:
    """One call's tensors, cut to the vocabulary."""

    def __init__(
        self,
        student: Side,
        teacher: Side,
        mask: Tensor | None,
        vocab_size: int,
        options: LossOptions,
        epilogues: Epilogues,
        of_tokens: TokenMetrics,
        shard: Shard | None = None,
    ) -> None:
        self.student, self.teacher = (_operands(side, vocab_size) for side in (student, teacher))
        self.mask, self.vocab_size, self.options, self.epilogues = mask, vocab_size, options, epilogues
        self.of_tokens, self.shard = of_tokens, shard
        self.first_token, self.total_vocab = (shard.start, shard.total_vocab) if shard else (0, vocab_size)
        self.buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Scratch [rows, columns], the same memory whenever the name is the same; the largest comes first."""
        width = padded(columns)
        if name not in self.buffers:
            size = rows * width
            self.buffers[name] = torch.empty(size, dtype=dtype, device=self.student[0].device)
        return self.buffers[name][: rows * width].view(rows, width)[:, :columns]

    def logits(self, rows: slice, columns: slice, slot: int = 0) -> Logits:
        """A tile of both raw logits in fp32, and the biases of its tokens; a slot has memory of its own."""
        shape = rows.stop - rows.start, columns.stop - columns.start
        tiles, biases = [], []
        for name, (hidden, head, bias) in (("student", self.student), ("teacher", self.teacher)):
            tile = self.buffer(f"{name}{slot}", *shape, torch.float32)
            kind = torch.promote_types(hidden.dtype, head.dtype)
            matmul(hidden[rows].to(kind), head[columns].to(kind).t(), tile, False)
            tiles.append(tile)
            biases.append(None if bias is None else bias[columns])
        return tiles[0], tiles[1], biases[0], biases[1]

    def mask_of(self, rows: slice) -> Tensor | None:
        return None if self.mask is None else self.mask[rows]

    def metrics_of(self, rows: slice, **more: Any) -> dict[str, Any]:
        """Arguments of an epilogue that have to do with labels and metrics; none where nobody asked."""
        labels, metrics, _ = self.of_tokens
        if metrics is None:
            return {}
        return {"labels": None if labels is None else labels[rows], "metrics": metrics[rows], **more}

    @property
    def fused(self) -> bool:
        """Whether the fused kernel serves the call: not fp32, which is left to the vendor's GEMM.

        Of a shard it says what its stats say, which are neither metrics nor JSD's sums.
        """
        more = self.options.divergence.needs_second_look or self.of_tokens.metrics is not None
        if self.shard is not None and more:
            return False
        operands = [x.dtype for x in (*self.student[:2], *self.teacher[:2])]
        same = operands[0] == operands[1] and operands[2] == operands[3]
        return self.epilogues.linear_stats is not None and same and torch.float32 not in operands

    def fused_statistics(self, loss: Tensor, stats: Tensor) -> None:
        """Loss and stats without logits in memory."""
        if self.shard is None:
            self._fused_statistics(loss, stats)
            return
        rows = RowStatistics(self, slice(0, loss.shape[0]), loss, stats)
        if self.vocab_size:
            own = torch.empty_like(loss), torch.empty_like(stats)
            self._fused_statistics(*own)
            rows.know(*own)
        rows.send()
        rows.receive()

    def _fused_statistics(self, loss: Tensor, stats: Tensor) -> None:
        assert self.epilogues.linear_stats is not None
        self.epilogues.linear_stats(
            self.student,
            self.teacher,
            self.mask,
            loss,
            stats,
            self.vocab_size,
            self.options,
            **self.metrics_of(slice(None)),
        )

    def grad(
        self,
        rows: slice,
        columns: slice,
        loss: Tensor | None,
        stats: Tensor,
        weight: Tensor,
        ce_weight: Tensor | None,
        dz: Tensor,
        logits: Logits | None = None,
    ) -> None:
        """Dz of a tile. With `loss`, the tile is of the whole vocabulary, and loss and stats come with it."""
        mask, width = self.mask_of(rows), columns.stop - columns.start
        if logits is None:
            logits = self.logits(rows, columns)
        of_ce = {} if ce_weight is None else {"ce_weight": ce_weight[rows]}
        if loss is not None:
            arguments = (weight[rows], loss[rows], stats[rows], dz, width, self.options)
            self.epilogues.forward_grad(logits, mask, *arguments, **self.metrics_of(rows, **of_ce))
            return
        if of_ce:
            of_ce["first_token"] = self.first_token + columns.start
            of_ce = self.metrics_of(rows, **of_ce, total_vocab=self.total_vocab)
        self.epilogues.grad(logits, mask, weight[rows], stats[rows], dz, width, self.options, **of_ce)


def _operands(side: Side, vocab_size: int) -> Side:
    hidden, head, bias = side
    hidden, head = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (hidden, head))
    return hidden, head[:vocab_size], None if bias is None else bias[:vocab_size].float().contiguous()


@summed_in_fp32()
def linear_kl_loss_(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    student: Side,
    teacher: Side,
    mask: Tensor | None,
    row_weight: Tensor | None,
    stats: Tensor | None,
    grad_head_accumulator: Tensor | None,
    needs_grad: tuple[bool, bool, bool],
    vocab_size: int,
    options: LossOptions,
    schedule: str,
    workspace_bytes: int,
    epilogues: Epilogues,
    of_tokens: TokenMetrics = NO_METRICS,
    shard: Shard | None = None,
    hidden_sum: HiddenSum | None = None,
) -> None:
    """Fills the outputs of the op linear_kl_loss: loss, stats and the gradients that are needed.

    Args:
        outputs: loss [N], stats [N, 6] ([0] if given), and the gradients to hidden states, head and bias.
        student: hidden states [N, H], head [>= V, H], bias [>= V] or None.
        teacher: the same with Ht.
        mask: [N] bool of the valid tokens.
        row_weight: [N] or 0-dim, factors of the rows' losses; None for 1.
        stats: [N, 6] of an earlier call; then only gradients are made.
        grad_head_accumulator: [>= V, H] fp32, to which the head's gradient is added.
        needs_grad: gradients to hidden states, head and bias.
        vocab_size: rows of the heads beyond it are padding.
        options: of the loss.
        schedule: "auto", "store" or "recompute".
        workspace_bytes: budget of the scratch memory.
        epilogues: kernels to use.
        of_tokens: labels, metrics and the weight of the cross-entropy.
        shard: where ranks share the vocabulary; heads and vocab_size are this one's.
        hidden_sum: what is to start once the gradient to the hidden states, its `partial`, is written.
    """
    loss, new_stats, grad_hidden, grad_head, grad_bias = outputs
    N, H = student[0].shape
    for grad in (grad_head, grad_bias):
        grad[vocab_size if N else 0 :].zero_()
    if N == 0:
        return
    call = _Call(student, teacher, mask, vocab_size, options, epilogues, of_tokens, shard)
    if not any(needs_grad) and call.fused:
        call.fused_statistics(loss, new_stats)  # without a plan: it has no scratch that a budget bounds
        return
    kind = torch.promote_types(student[0].dtype, student[1].dtype)
    # in fp16, how far the gradients of reverse KL reach is to be known before the first is stored
    stats_first = kind == torch.float16 and options.divergence is Divergence.REVERSE_KL
    adds = grad_head_accumulator is not None
    head_out = grad_head if grad_head_accumulator is None else grad_head_accumulator
    sums = sums_with_memory(grad_hidden.dtype, head_out.dtype, kind, adds)
    if hidden_sum is not None:
        sums["hidden_sum"] = not hidden_sum.in_place
    problem = GpuProblem(
        N,
        vocab_size if shard is None else shard.widest,  # all ranks cut the rows alike
        H,
        teacher[0].shape[1],
        itemsize=kind.itemsize,
        teacher_itemsize=torch.promote_types(teacher[0].dtype, teacher[1].dtype).itemsize,
        grad_hidden=needs_grad[0],
        grad_head=needs_grad[1],
        grad_bias=needs_grad[2],
        **sums,
        ranks=1 if shard is None else shard.group.size(),
        stats_first=stats_first,
        stats_known=stats is not None,
        looks=1 + options.divergence.needs_second_look,
        gpu=figures_of(student[0].device),
    )
    chosen = plan(problem, schedule, workspace_bytes)
    if chosen.schedule == "forward":
        statistics(call, loss, new_stats, chosen.chunk_rows, chosen.tile)
        return
    known = stats is not None
    if stats is None:
        stats = new_stats
        if chosen.schedule == "recompute" or stats_first:
            statistics(call, loss, stats, chosen.chunk_rows, chosen.tile)
            known = True

    weight, ce_weight, unscale = row_weights(row_weight, of_tokens.ce_weight, mask, kind, options, stats)
    if mask is not None and needs_grad[1]:  # 0 * NaN of a row that is not valid would spread
        call.student = (call.student[0].masked_fill(~mask[:, None], 0), *call.student[1:])
    hidden, head, _ = call.student
    kept, tiles = list(slices(0, N, chosen.dz_rows)), list(slices(0, vocab_size, chosen.tile))
    if not tiles:  # padding alone: a part of 0 in what the ranks exchange
        for rows in [] if known else kept:
            store(call, list(slices(rows.start, rows.stop, chosen.chunk_rows)), loss, stats, lambda *_: None)
        grad_hidden.zero_()
        return
    # never rounded by a GEMM: its sum is over the vocabulary, and a few bytes a row
    hidden_sums = [_Sum(grad_hidden[rows], kind, len(tiles), unscale, rounds=False) for rows in kept]
    for columns in tiles:
        head_sum = _Sum(head_out[columns], kind, len(kept), unscale, adds=adds)
        for i, rows in enumerate(kept):
            dz = call.buffer("dz", rows.stop - rows.start, columns.stop - columns.start, kind)

            def grad_of(
                part: slice,
                logits: Logits | None = None,
                columns: slice = columns,
                begin: int = rows.start,
                dz: Tensor = dz,
            ) -> None:
                with_loss = None if known or logits is not None else loss
                dz_part = dz[part.start - begin : part.stop - begin]
                call.grad(part, columns, with_loss, stats, weight, ce_weight, dz_part, logits)

            chunks = list(slices(rows.start, rows.stop, chosen.chunk_rows))
            if shard is None or known:
                for part in chunks:
                    grad_of(part)
            else:
                store(call, chunks, loss, stats, grad_of)
            if needs_grad[0]:
                hidden_sums[i].add(dz, head[columns].to(kind))
                if hidden_sum is not None and columns is tiles[-1] and rows is kept[-1]:
                    hidden_sum.start()
            if needs_grad[1]:
                head_sum.add(dz.t(), hidden[rows].to(kind))
            if needs_grad[2]:
                _add_rows(dz, grad_bias[columns], i == 0)
    if needs_grad[2] and unscale is not None:
        grad_bias[:vocab_size] *= unscale


def _add_rows(dz: Tensor, out: Tensor, first: bool) -> None:
    total = dz.sum(0, dtype=torch.float32)
    out.copy_(total) if first else out.add_(total)
