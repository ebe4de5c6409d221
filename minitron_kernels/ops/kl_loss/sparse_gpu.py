"""linear_sparse_kl_loss by the schedules of linear_gpu.py, with a teacher of k ids.

Of a tile of the student's logits those of the ids are taken out, and -inf is written in their place. What is
left is the tail: its sum of exponentials is one of positive terms, and nothing is subtracted to get it. The
k ids and log-sum-exp of the tail are then k + 1 logits, whose divergence is that of whole rows, by the same
kernel; its gradient g goes to the ids as it is, and over the tail in the proportion of its probabilities.

    store      3 GEMMs: logits, dX, dW.     recompute  4 GEMMs.     forward  1 GEMM.

What has the size of [N, k] is done by torch's own kernels. See sparse_outcomes.py for what is known of rows.
On the CPU, too, where logits exist (sparse_rows.py) or ranks share the vocabulary: student_torch.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from minitron_kernels.ops.kl_loss import gemm_gpu
from minitron_kernels.ops.kl_loss.divergence import NUM_STATS
from minitron_kernels.ops.kl_loss.epilogues import Epilogues
from minitron_kernels.ops.kl_loss.gemm_gpu import summed_in_fp32
from minitron_kernels.ops.kl_loss.linear_gpu import Call, run
from minitron_kernels.ops.kl_loss.operands import NO_METRICS, Side, TokenMetrics
from minitron_kernels.ops.kl_loss.options import LossOptions
from minitron_kernels.ops.kl_loss.reference import transform_logits
from minitron_kernels.ops.kl_loss.sparse_outcomes import RowOutcomes
from minitron_kernels.ops.kl_loss.sparse_teacher import SparseTeacher
from minitron_kernels.ops.kl_loss.tile_passes import Pass
from minitron_kernels.ops.kl_loss.vocab_parallel import HiddenSum, Shard

Tail = tuple[Tensor, Tensor | None]  # a tile of the student's logits without the ids', and its bias


class SparseCall(Call):
    """Statistics are the student's outcomes, [N, k + 1]."""

    # where ids that are not in a tile are read and written, so that nothing depends on how many are
    spare_columns = 1
    looks = 1  # whatever the divergence: it is that of the outcomes

    def __init__(
        self,
        student: Side,
        teacher: SparseTeacher,
        mask: Tensor | None,
        vocab_size: int,
        options: LossOptions,
        epilogues: Epilogues,
        of_tokens: TokenMetrics,
        shard: Shard | None = None,
    ) -> None:
        super().__init__(student, None, mask, vocab_size, options, epilogues, of_tokens, shard)
        self.set_teacher(teacher)

    def set_teacher(self, teacher: SparseTeacher) -> None:
        """Takes the teacher, and memory of the size of its outcomes."""
        self.ids, self.outcomes = teacher
        N, count = self.outcomes.shape
        self.weight: Tensor | None = None
        self.row_stats = self.outcomes.new_empty((N, NUM_STATS))
        self.grad_outcomes = self.outcomes.new_empty((N, count))
        self.row_options = LossOptions(self.options.beta, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0)

    @property
    def of_teacher(self) -> dict[str, Any]:
        """See Call."""
        return {"teacher_hidden_size": 0, "spare_columns": self.spare_columns}

    @property
    def fused(self) -> bool:
        """There is no kernel of which no logit leaves the registers."""
        return False

    def kl_of(self, loss: Tensor, stats: Tensor) -> Tensor:
        """See Call."""
        return loss

    def prepare(self, stats: Tensor, weight: Tensor, known: bool) -> None:
        """The gradient to the outcomes, of all rows where they are known."""
        self.weight = weight
        if known:
            self.divide(slice(0, len(weight)), stats, torch.empty_like(weight))

    def divide(self, rows: slice, outcomes: Tensor, loss: Tensor) -> None:
        """The loss of rows from their outcomes; once there are weights, its gradient to them too."""
        logits = outcomes[rows], self.outcomes[rows], None, None
        mask, stats, count = self.mask_of(rows), self.row_stats[rows], outcomes.shape[1]
        self.epilogues.forward(logits, mask, loss[rows], stats, count, self.row_options)
        if self.weight is not None:
            weight, out = self.weight[rows], self.grad_outcomes[rows]
            self.epilogues.grad(logits, mask, weight, stats, out, count, self.row_options)
            if self.of_tokens.metrics is not None:  # a KL of weight 0 is left out, even if it is infinite
                out.masked_fill_((weight == 0)[:, None], 0.0)

    def _places(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Which ids are in a tile, and their columns: for the others one behind the tile's last."""
        column = self.ids[rows] - (self.first_token + columns.start)
        width = columns.stop - columns.start
        inside = (column >= 0) & (column < width)
        return inside, torch.where(inside, column, width)

    def begin(self, rows: slice, loss: Tensor, stats: Tensor) -> Pass:
        """See Tiles."""
        return RowOutcomes(self, rows, loss, stats)

    def tile(self, rows: slice, columns: slice, stats: Tensor | None, slot: int = 0) -> Tail:
        """A tile of the student's logits with -inf in place of the ids'.

        The ids' own, transformed, go into the outcomes that `stats` are.
        """
        bias, width = self.student[2], columns.stop - columns.start
        tile = self.buffer(f"student{slot}", rows.stop - rows.start, width, self.outcomes.dtype)
        self.make(tile, rows, columns)
        wide = _with_spare(tile)
        wide[:, width:] = -math.inf
        inside, places = self._places(rows, columns)
        if stats is not None:
            at_ids = wide.gather(1, places)
            if bias is not None:
                at_ids = at_ids + bias[columns][places.clamp(max=width - 1)]
            options = self.options
            at_ids = transform_logits(
                at_ids, scale=options.student_scale, softcap=options.student_softcap, inv_tau=options.inv_tau
            )
            of_ids = stats[rows, :-1]
            of_ids.copy_(torch.where(inside, at_ids, of_ids))
        wide.scatter_(1, places, -math.inf)
        return tile, None if bias is None else bias[columns]

    def make(self, tile: Tensor, rows: slice, columns: slice) -> None:
        """The student's raw logits."""
        hidden, head, _ = self.student
        kind = torch.promote_types(hidden.dtype, head.dtype)
        gemm_gpu.matmul(hidden[rows].to(kind), head[columns].to(kind).t(), tile, False)

    def masked_out(self, rows: slice) -> Tensor | None:
        """Whether a token of the vocabulary is masked out, of each row or of all."""
        bias = self.student[2]
        return None if bias is None else (bias == -math.inf).any()

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
        """See Call."""
        if loss is None:
            logits = self.tile(rows, columns, None)
        else:
            some = self.begin(rows, loss, stats)
            logits = self.tile(rows, columns, stats)
            some.add(logits, rows, columns.start)
            some.send()
            some.receive()
        self.grad_of_logits(logits, rows, columns, stats, weight, ce_weight, dz)

    def grad_of_logits(
        self,
        logits: Any,
        rows: slice,
        columns: slice,
        stats: Tensor,
        weight: Tensor,
        ce_weight: Tensor | None,
        dz: Tensor,
    ) -> None:
        """See Call."""
        width, g = columns.stop - columns.start, self.grad_outcomes[rows]
        labels, metrics, _ = self.of_tokens
        of_ce: dict[str, Any] = {}
        if ce_weight is not None and labels is not None and metrics is not None:
            of_ce = {
                "labels": labels[rows],
                "lse_y": metrics[rows, 0].contiguous(),
                "ce_weight": ce_weight[rows],
                "first_token": self.first_token + columns.start,
                "total_vocab": self.total_vocab,
            }
        of_tail = g[:, -1].contiguous(), stats[rows, -1].contiguous()
        self.epilogues.student_grad(*logits, self.mask_of(rows), *of_tail, dz, width, self.options, **of_ce)
        self._put(rows, columns, stats[rows, :-1], g[:, :-1], of_ce, dz)

    def _put(
        self, rows: slice, columns: slice, s: Tensor, g: Tensor, of_ce: dict[str, Any], dz: Tensor
    ) -> None:
        """Writes the ids' part of dz."""
        options, tau = self.options, 1.0 / self.options.inv_tau
        if of_ce:
            y, smoothing = s * tau, options.label_smoothing
            p = (y - of_ce["lse_y"][:, None]).exp()
            target = (self.ids[rows] == of_ce["labels"][:, None]).to(s.dtype) * (1.0 - smoothing)
            target = target + smoothing / self.total_vocab
            g = g + of_ce["ce_weight"][:, None] * tau * (p - target)
        g = g * (options.student_scale * options.inv_tau)
        if options.student_softcap:
            ratio = s * (tau / options.student_softcap)
            g = g * ((1.0 - ratio) * (1.0 + ratio))
        g = g.masked_fill(s == -math.inf, 0.0)
        mask = self.mask_of(rows)
        if mask is not None:
            g = g.masked_fill(~mask[:, None], 0.0)
        _, places = self._places(rows, columns)
        _with_spare(dz).scatter_(1, places, g.to(dz.dtype))


def _with_spare(tile: Tensor) -> Tensor:
    """A tile of a buffer with the spare column behind it."""
    return tile.as_strided((tile.shape[0], tile.shape[1] + SparseCall.spare_columns), tile.stride())


@summed_in_fp32()
def linear_sparse_kl_loss_(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    student: Side,
    teacher: SparseTeacher,
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
    """As linear_kl_loss_() with a sparse teacher; `stats` are the student's outcomes, [N, k + 1]."""
    call = SparseCall(student, teacher, mask, vocab_size, options, epilogues, of_tokens, shard)
    given = (row_weight, stats, grad_head_accumulator, needs_grad, schedule, workspace_bytes)
    run(call, outputs, *given, hidden_sum)
