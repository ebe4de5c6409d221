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

from minitron_kernels._tensors import with_unit_stride
from minitron_kernels.ops.kl_loss import gemm_gpu
from minitron_kernels.ops.kl_loss.divergence import STAT_KL, Divergence
from minitron_kernels.ops.kl_loss.epilogues import Epilogues
from minitron_kernels.ops.kl_loss.gemm_gpu import summed_in_fp32
from minitron_kernels.ops.kl_loss.gpu_figures import figures_of
from minitron_kernels.ops.kl_loss.operands import NO_METRICS, Side, TokenMetrics, slices
from minitron_kernels.ops.kl_loss.options import LossOptions
from minitron_kernels.ops.kl_loss.plan_gpu import GpuProblem, padded, plan, sums_with_memory
from minitron_kernels.ops.kl_loss.row_statistics import Logits, RowStatistics
from minitron_kernels.ops.kl_loss.sums_gpu import GradientSum, add_rows, gradient_weights
from minitron_kernels.ops.kl_loss.tile_passes import Pass, statistics, store
from minitron_kernels.ops.kl_loss.vocab_parallel import HiddenSum, Shard


class Call:
    """One call's tensors, cut to the vocabulary, and how its logits become statistics and dz.

    This one's teacher has hidden states and a head.
    """

    spare_columns = 0  # behind those that are asked for, in every buffer

    def __init__(
        self,
        student: Side,
        teacher: Side | None,
        mask: Tensor | None,
        vocab_size: int,
        options: LossOptions,
        epilogues: Epilogues,
        of_tokens: TokenMetrics,
        shard: Shard | None = None,
    ) -> None:
        self.student = _operands(student, vocab_size)
        self.teacher = self.student if teacher is None else _operands(teacher, vocab_size)
        self.mask, self.vocab_size, self.options, self.epilogues = mask, vocab_size, options, epilogues
        self.of_tokens, self.shard = of_tokens, shard
        self.first_token, self.total_vocab = (shard.start, shard.total_vocab) if shard else (0, vocab_size)
        self.buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Scratch [rows, columns], the same memory whenever the name is the same; the largest comes first."""
        width = padded(columns + self.spare_columns)
        if name not in self.buffers:
            size = rows * width
            self.buffers[name] = torch.empty(size, dtype=dtype, device=self.student[0].device)
        return self.buffers[name][: rows * width].view(rows, width)[:, :columns]

    @property
    def looks(self) -> int:
        """See Tiles."""
        return 1 + self.options.divergence.needs_second_look

    def begin(self, rows: slice, loss: Tensor, stats: Tensor) -> Pass:
        """See Tiles."""
        return RowStatistics(self, rows, loss, stats)

    def tile(self, rows: slice, columns: slice, stats: Tensor, slot: int = 0) -> Any:
        """See Tiles: both raw logits in fp32, and the biases of their tokens."""
        shape = rows.stop - rows.start, columns.stop - columns.start
        tiles, biases = [], []
        for name, (hidden, head, bias) in (("student", self.student), ("teacher", self.teacher)):
            tile = self.buffer(f"{name}{slot}", *shape, torch.float32)
            kind = torch.promote_types(hidden.dtype, head.dtype)
            gemm_gpu.matmul(hidden[rows].to(kind), head[columns].to(kind).t(), tile, False)
            tiles.append(tile)
            biases.append(None if bias is None else bias[columns])
        return tiles[0], tiles[1], biases[0], biases[1]

    def mask_of(self, rows: slice) -> Tensor | None:
        """Which of some rows count."""
        return None if self.mask is None else self.mask[rows]

    def metrics_of(self, rows: slice, **more: Any) -> dict[str, Any]:
        """Arguments of an epilogue that have to do with labels and metrics; none where nobody asked."""
        labels, metrics, _ = self.of_tokens
        if metrics is None:
            return {}
        return {"labels": None if labels is None else labels[rows], "metrics": metrics[rows], **more}

    @property
    def of_teacher(self) -> dict[str, Any]:
        """The fields of GpuProblem that depend on the teacher and the divergence."""
        hidden, head, _ = self.teacher
        return {
            "teacher_hidden_size": hidden.shape[1],
            "teacher_itemsize": torch.promote_types(hidden.dtype, head.dtype).itemsize,
            "looks": self.looks,
        }

    def kl_of(self, loss: Tensor, stats: Tensor) -> Tensor:
        """Each row's KL, which bounds the gradient of reverse KL; where that is not known yet, anything."""
        return stats[:, STAT_KL]

    def prepare(self, stats: Tensor, weight: Tensor, known: bool) -> None:
        """Called before the first dz is made; known: whether stats are."""

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
    ) -> None:
        """Dz of a tile. With `loss`, the tile is of the whole vocabulary, and loss and stats come with it."""
        logits, mask = self.tile(rows, columns, stats), self.mask_of(rows)
        if loss is not None:
            of_ce = {} if ce_weight is None else {"ce_weight": ce_weight[rows]}
            width = columns.stop - columns.start
            arguments = (weight[rows], loss[rows], stats[rows], dz, width, self.options)
            self.epilogues.forward_grad(logits, mask, *arguments, **self.metrics_of(rows, **of_ce))
            return
        self.grad_of_logits(logits, rows, columns, stats, weight, ce_weight, dz)

    def grad_of_logits(
        self,
        logits: Logits,
        rows: slice,
        columns: slice,
        stats: Tensor,
        weight: Tensor,
        ce_weight: Tensor | None,
        dz: Tensor,
    ) -> None:
        """Dz of a tile whose logits are there."""
        mask, width, of_ce = self.mask_of(rows), columns.stop - columns.start, {}
        if ce_weight is not None:
            place = {"first_token": self.first_token + columns.start, "total_vocab": self.total_vocab}
            of_ce = self.metrics_of(rows, ce_weight=ce_weight[rows], **place)
        self.epilogues.grad(logits, mask, weight[rows], stats[rows], dz, width, self.options, **of_ce)


def _operands(side: Side, vocab_size: int) -> Side:
    hidden, head, bias = side
    hidden, head = map(with_unit_stride, (hidden, head))
    if bias is not None:
        bias = bias[:vocab_size].to(torch.promote_types(hidden.dtype, torch.float32)).contiguous()
    return hidden, head[:vocab_size], bias


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
    call = Call(student, teacher, mask, vocab_size, options, epilogues, of_tokens, shard)
    fused = bool(outputs[0].numel()) and not any(needs_grad) and call.fused
    if fused:
        call.fused_statistics(*outputs[:2])  # without a plan: it has no scratch that a budget bounds
    else:
        given = (row_weight, stats, grad_head_accumulator, needs_grad, schedule, workspace_bytes)
        run(call, outputs, *given, hidden_sum)


def run(
    call: Call,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    row_weight: Tensor | None,
    stats: Tensor | None,
    grad_head_accumulator: Tensor | None,
    needs_grad: tuple[bool, bool, bool],
    schedule: str,
    workspace_bytes: int,
    hidden_sum: HiddenSum | None = None,
) -> None:
    """The schedule of a call; see linear_kl_loss_() for the arguments."""
    loss, new_stats, grad_hidden, grad_head, grad_bias = outputs
    mask, vocab_size, shard = call.mask, call.vocab_size, call.shard
    N, H = call.student[0].shape
    for grad in (grad_head, grad_bias):
        grad[vocab_size if N else 0 :].zero_()
    if N == 0:
        return
    kind = torch.promote_types(call.student[0].dtype, call.student[1].dtype)
    # in fp16, how far the gradients of reverse KL reach is to be known before the first is stored
    stats_first = kind == torch.float16 and call.options.divergence is Divergence.REVERSE_KL
    adds = grad_head_accumulator is not None
    head_out = grad_head if grad_head_accumulator is None else grad_head_accumulator
    sums = sums_with_memory(grad_hidden.dtype, head_out.dtype, kind, adds)
    if hidden_sum is not None:
        sums["hidden_sum"] = not hidden_sum.in_place
    problem = GpuProblem(
        N,
        vocab_size if shard is None else shard.widest,  # all ranks cut the rows alike
        H,
        itemsize=kind.itemsize,
        grad_hidden=needs_grad[0],
        grad_head=needs_grad[1],
        grad_bias=needs_grad[2],
        **sums,
        ranks=1 if shard is None else shard.group.size(),
        stats_first=stats_first,
        stats_known=stats is not None,
        gpu=figures_of(loss.device),
        **call.of_teacher,
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

    weight, ce_weight, unscale = gradient_weights(
        row_weight, call.of_tokens.ce_weight, mask, kind, call.options, call.kl_of(loss, stats)
    )
    call.prepare(stats, weight, known)
    if mask is not None and needs_grad[1]:  # 0 * NaN of a row that is not valid would spread
        call.student = (call.student[0].masked_fill(~mask[:, None], 0), *call.student[1:])
    hidden, head, _ = call.student
    kept, tiles = list(slices(0, N, chosen.dz_rows)), list(slices(0, vocab_size, chosen.tile))
    if not tiles:  # padding alone: a part of 0 in what the ranks exchange
        for rows in [] if known else kept:
            for _ in store(call, list(slices(rows.start, rows.stop, chosen.chunk_rows)), loss, stats):
                pass
        grad_hidden.zero_()
        return
    # never rounded by a GEMM: its sum is over the vocabulary, and a few bytes a row
    hidden_sums = [GradientSum(grad_hidden[rows], kind, len(tiles), unscale, rounds=False) for rows in kept]
    for columns in tiles:
        head_sum = GradientSum(head_out[columns], kind, len(kept), unscale, adds=adds)
        for i, rows in enumerate(kept):
            dz = call.buffer("dz", rows.stop - rows.start, columns.stop - columns.start, kind)
            chunks = list(slices(rows.start, rows.stop, chosen.chunk_rows))
            parts = {part.start: dz[part.start - rows.start : part.stop - rows.start] for part in chunks}
            if shard is None or known:
                for part in chunks:
                    with_loss = None if known else loss
                    call.grad(part, columns, with_loss, stats, weight, ce_weight, parts[part.start])
            else:
                for part, logits in store(call, chunks, loss, stats):
                    dz_part = parts[part.start]
                    call.grad_of_logits(logits, part, columns, stats, weight, ce_weight, dz_part)
            if needs_grad[0]:
                hidden_sums[i].add(dz, head[columns].to(kind))
                if hidden_sum is not None and columns is tiles[-1] and rows is kept[-1]:
                    hidden_sum.start()
            if needs_grad[1]:
                head_sum.add(dz.t(), hidden[rows].to(kind))
            if needs_grad[2]:
                add_rows(dz, grad_bias[columns], i == 0)
    if needs_grad[2] and unscale is not None:
        grad_bias[:vocab_size] *= unscale
