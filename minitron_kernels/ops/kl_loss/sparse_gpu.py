"""linear_sparse_kl_loss on CUDA and ROCm tensors: the schedules of linear_gpu.py with a teacher of k ids.

Of a tile of the student's logits those of the ids are taken out, and -inf is written in their place. What is
left is the tail: its sum of exponentials is one of positive terms, and nothing is subtracted to get it. The
k ids and log-sum-exp of the tail are then k + 1 logits, whose divergence is that of whole rows, by the same
kernel; its gradient g goes to the ids as it is, and over the tail in the proportion of its probabilities.

    store      3 GEMMs: logits, dX, dW.     recompute  4 GEMMs.     forward  1 GEMM.

What has the size of [N, k] is done by torch's own kernels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from minitron_kernels.ops.kl_loss import gemm_gpu
from minitron_kernels.ops.kl_loss.divergence import NUM_METRIC_STATE, NUM_STATS
from minitron_kernels.ops.kl_loss.epilogues import Epilogues
from minitron_kernels.ops.kl_loss.gemm_gpu import summed_in_fp32
from minitron_kernels.ops.kl_loss.linear_gpu import Call, run
from minitron_kernels.ops.kl_loss.linear_rows import NO_METRICS, Side, TokenMetrics, slices
from minitron_kernels.ops.kl_loss.options import LossOptions
from minitron_kernels.ops.kl_loss.reference import transform_logits
from minitron_kernels.ops.kl_loss.sparse_teacher import SparseTeacher


class SparseCall(Call):
    """Statistics are the student's outcomes, [N, k + 1]."""

    # where ids that are not in a tile are read and written, so that nothing depends on how many are
    spare_columns = 1

    def __init__(
        self,
        student: Side,
        teacher: SparseTeacher,
        mask: Tensor | None,
        vocab_size: int,
        options: LossOptions,
        epilogues: Epilogues,
        of_tokens: TokenMetrics,
    ) -> None:
        super().__init__(student, None, mask, vocab_size, options, epilogues, of_tokens)
        self._begin(teacher)

    def _begin(self, teacher: SparseTeacher) -> None:
        self.ids, self.outcomes = teacher
        N, count = self.outcomes.shape
        self.row_stats = self.outcomes.new_empty((N, NUM_STATS))
        self.grad_outcomes = self.outcomes.new_empty((N, count))
        self.row_options = LossOptions(self.options.beta, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0)

    @property
    def of_teacher(self) -> dict[str, Any]:
        """See Call."""
        return {"teacher_hidden_size": 0, "spare_columns": self.spare_columns}

    def kl_of(self, loss: Tensor, stats: Tensor) -> Tensor:
        """See Call."""
        return loss

    def prepare(self, stats: Tensor, weight: Tensor) -> None:
        """The gradient to the outcomes, of all rows."""
        self._divide(slice(None), stats, weight, torch.empty_like(weight))

    def _divide(self, rows: slice, outcomes: Tensor, weight: Tensor | None, loss: Tensor) -> None:
        """The loss of rows from their outcomes, and with a weight its gradient to them."""
        logits = outcomes[rows], self.outcomes[rows], None, None
        mask, stats, count = self.mask_of(rows), self.row_stats[rows], outcomes.shape[1]
        self.epilogues.forward(logits, mask, loss[rows], stats, count, self.row_options)
        if weight is not None:
            out = self.grad_outcomes[rows]
            self.epilogues.grad(logits, mask, weight[rows], stats, out, count, self.row_options)

    def _places(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Which ids are in a tile, and their columns: for the others one behind the tile's last."""
        ids = self.ids[rows]
        inside = (ids >= columns.start) & (ids < columns.stop)
        return inside, torch.where(inside, ids - columns.start, columns.stop - columns.start)

    def _tail(self, rows: slice, columns: slice, outcomes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The student's logits of a tile with -inf in place of the ids, and its bias.

        The ids' own, transformed, go into `outcomes`.
        """
        bias, width = self.student[2], columns.stop - columns.start
        tile = self.buffer("student", rows.stop - rows.start, width, self.outcomes.dtype)
        self._make(tile, rows, columns)
        wide = _with_spare(tile)
        wide[:, width:] = -math.inf
        inside, places = self._places(rows, columns)
        if outcomes is not None:
            at_ids = wide.gather(1, places)
            if bias is not None:
                at_ids = at_ids + bias[self.ids[rows].clamp(min=0)]
            options = self.options
            at_ids = transform_logits(
                at_ids, scale=options.student_scale, softcap=options.student_softcap, inv_tau=options.inv_tau
            )
            of_ids = outcomes[rows, :-1]
            of_ids.copy_(torch.where(inside, at_ids, of_ids))
        wide.scatter_(1, places, -math.inf)
        return tile, None if bias is None else bias[columns]

    def _make(self, tile: Tensor, rows: slice, columns: slice) -> None:
        """The student's raw logits."""
        hidden, head, _ = self.student
        kind = torch.promote_types(hidden.dtype, head.dtype)
        gemm_gpu.matmul(hidden[rows].to(kind), head[columns].to(kind).t(), tile, False)

    def _reduce(
        self,
        tile: Tensor,
        bias: Tensor | None,
        rows: slice,
        columns: slice,
        state: Tensor,
        metrics: Tensor | None,
    ) -> None:
        """Merges a tile, from which the ids have been taken, into the states of its rows."""
        labels, of_metrics = self.of_tokens.labels, {}
        if metrics is not None:
            of_metrics = {
                "labels": None if labels is None else labels[rows],
                "metric_state": metrics[:, rows],
                "first_token": columns.start,
            }
        first = columns.start == 0
        self.epilogues.student_stats(
            tile, bias, self.mask_of(rows), state[:, rows], first, self.options, **of_metrics
        )

    def _states(self, N: int) -> tuple[Tensor, Tensor | None]:
        state = self.outcomes.new_empty((2, N))
        none = self.of_tokens.metrics is None
        return state, None if none else self.outcomes.new_empty((NUM_METRIC_STATE, N))

    def _finish(self, rows: slice, state: Tensor, metric_state: Tensor | None, outcomes: Tensor) -> None:
        """The last outcome, and the metrics, of some rows."""
        top, total = state[:, rows]
        outcomes[rows, -1] = top + total.log()
        metrics = self.of_tokens.metrics
        if metric_state is not None and metrics is not None:
            labels = self.of_tokens.labels
            metrics[rows] = self._metrics(
                top,
                metric_state[:, rows],
                outcomes[rows, :-1],
                self.ids[rows],
                None if labels is None else labels[rows],
                self._masked_out(rows),
            )
            mask = self.mask_of(rows)
            if mask is not None:
                metrics[rows] = torch.where(mask[:, None], metrics[rows], 0.0)

    def _masked_out(self, rows: slice) -> Tensor | None:
        """Whether a token of the vocabulary is masked out, of each row or of all."""
        bias = self.student[2]
        return None if bias is None else (bias == -math.inf).any()

    def _metrics(
        self,
        top: Tensor,
        metric_state: Tensor,
        of_ids: Tensor,
        ids: Tensor,
        labels: Tensor | None,
        masked_out: Tensor | None,
    ) -> Tensor:
        """[n, NUM_METRICS]: lse_y, cross-entropy, entropy, log p(label), of tail and ids together."""
        tau, smoothing = 1.0 / self.options.inv_tau, self.options.label_smoothing
        tail_top, y = top * tau, of_ids * tau
        tail_sum, tail_dot, total, label = metric_state
        top_y = torch.maximum(tail_top, y.amax(1)) if y.shape[1] else tail_top
        base = top_y.clamp(min=torch.finfo(top_y.dtype).min)
        exps, tail = (y - base[:, None]).exp(), (tail_top - base).exp()
        below = (y - base[:, None]).masked_fill(exps == 0, 0.0)
        tail_below = (tail_top - base).masked_fill(tail == 0, 0.0)
        sums = tail * tail_sum + exps.sum(1)
        dot = tail * (tail_dot + tail_below * tail_sum) + (exps * below).sum(1)
        lse_y = top_y + sums.log()
        out = [lse_y, torch.zeros_like(lse_y), sums.log() - dot / sums, torch.zeros_like(lse_y)]
        if labels is not None:
            named = ids == labels[:, None]
            label = torch.maximum(label, y.masked_fill(~named, -math.inf).amax(1)) if y.shape[1] else label
            out[3] = label - lse_y
            out[1] = -(1.0 - smoothing) * out[3]
            if smoothing:
                total = total + y.masked_fill(ids < 0, 0.0).sum(1)
                if masked_out is not None:  # of such a token log p is -inf
                    total = total.masked_fill(masked_out, -math.inf)
                out[1] = out[1] + smoothing * (lse_y - total / self.vocab_size)
        return torch.stack(out, 1)

    def statistics(self, loss: Tensor, stats: Tensor, chunk_rows: int, tile: int) -> None:
        """Loss, outcomes and metrics from tiles of logits."""
        N = loss.shape[0]
        state, metric_state = self._states(N)
        stats.fill_(-math.inf)
        for columns in slices(0, self.vocab_size, tile):
            for rows in slices(0, N, chunk_rows):
                logits, bias = self._tail(rows, columns, stats)
                self._reduce(logits, bias, rows, columns, state, metric_state)
        self._finish(slice(0, N), state, metric_state, stats)
        self._divide(slice(0, N), stats, None, loss)

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
        if loss is not None:
            stats[rows] = -math.inf
        logits, bias = self._tail(rows, columns, None if loss is None else stats)
        if loss is not None:
            state, metric_state = self._states(loss.shape[0])
            self._reduce(logits, bias, rows, columns, state, metric_state)
            self._finish(rows, state, metric_state, stats)
            self._divide(rows, stats, weight, loss)
        width, g = columns.stop - columns.start, self.grad_outcomes[rows]
        labels, metrics, _ = self.of_tokens
        of_ce: dict[str, Any] = {}
        if ce_weight is not None and labels is not None and metrics is not None:
            of_ce = {
                "labels": labels[rows],
                "lse_y": metrics[rows, 0].contiguous(),
                "ce_weight": ce_weight[rows],
                "first_token": columns.start,
                "total_vocab": self.vocab_size,
            }
        lse = stats[rows, -1].contiguous()
        self.epilogues.student_grad(
            logits, bias, self.mask_of(rows), g[:, -1].contiguous(), lse, dz, width, self.options, **of_ce
        )
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
            target = target + smoothing / self.vocab_size
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
) -> None:
    """As linear_kl_loss_() with a sparse teacher; `stats` are the student's outcomes, [N, k + 1]."""
    call = SparseCall(student, teacher, mask, vocab_size, options, epilogues, of_tokens)
    run(call, outputs, row_weight, stats, grad_head_accumulator, needs_grad, schedule, workspace_bytes)
