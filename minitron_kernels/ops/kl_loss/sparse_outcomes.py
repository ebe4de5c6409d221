"""The student's outcomes of rows with a sparse teacher: merged from tiles, and from ranks that share the
vocabulary.

Of the tail a rank knows max and sum of exp (and the running sums of metrics); ranks gather these as those of
two models. An id's logit is with one rank: the others add 0 to it.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_kernels.ops.kl_loss.divergence import NUM_METRIC_STATE
from minitron_kernels.ops.kl_loss.states import finite, merge_metric_states
from minitron_kernels.ops.kl_loss.tile_passes import RowsOfCall
from minitron_kernels.ops.kl_loss.vocab_parallel import Gathered

_TAIL = 2  # fields: max_s, sum_s


class Rows(RowsOfCall, Protocol):
    """One call of a sparse teacher."""

    ids: Tensor

    def masked_out(self, rows: slice) -> Tensor | None:
        """Whether a token of the vocabulary is masked out."""

    def divide(self, rows: slice, outcomes: Tensor, loss: Tensor) -> None:
        """The loss from the outcomes."""


class RowOutcomes:
    """Some rows in one look at their logits; see Pass."""

    def __init__(self, call: Rows, rows: slice, loss: Tensor, outcomes: Tensor) -> None:
        self.rows, self._call, self._loss, self._outcomes = rows, call, loss, outcomes
        self._with_metrics = call.of_tokens.metrics is not None
        fields = _TAIL + NUM_METRIC_STATE * self._with_metrics
        self._part = loss.new_empty((fields, rows.stop - rows.start))
        if not call.vocab_size:
            self._part.zero_()
            self._part[0] = -math.inf
            self._part[_TAIL + NUM_METRIC_STATE - 1 :] = -math.inf
        outcomes[rows] = -math.inf
        self._gathered: Gathered | None = None
        self._of_ids: Tensor | None = None
        self._work: dist.Work | None = None

    def add(self, logits: tuple[Tensor, Tensor | None], rows: slice, first_column: int) -> None:
        """See Pass; the ids have been taken out of the tile."""
        call, begin = self._call, self.rows.start
        part = self._part[:, rows.start - begin : rows.stop - begin]
        of_metrics: dict[str, Any] = {}
        if self._with_metrics:
            labels = call.of_tokens.labels
            of_metrics = {
                "labels": None if labels is None else labels[rows],
                "metric_state": part[_TAIL:],
                "first_token": call.first_token + first_column,
            }
        first, mask = first_column == 0, call.mask_of(rows)
        call.epilogues.student_stats(*logits, mask, part[:_TAIL], first, call.options, **of_metrics)

    def send(self) -> None:
        """See Pass."""
        call = self._call
        self._note_masked_out()
        if call.shard is None:
            return
        self._gathered = call.shard.gather(self._part)
        own = call.ids[self.rows] - call.first_token
        here = (own >= 0) & (own < call.vocab_size)
        self._of_ids = torch.where(here, self._outcomes[self.rows, :-1], 0.0)
        if self._of_ids.numel():
            self._work = dist.all_reduce(self._of_ids, group=call.shard.group, async_op=True)

    def _note_masked_out(self) -> None:
        """Of a token that is masked out log p is -inf, and so is the mean of all, which smoothing takes."""
        if not (self._with_metrics and self._call.options.label_smoothing):
            return
        masked_out = self._call.masked_out(self.rows)
        if masked_out is not None:
            self._part[_TAIL + 2].masked_fill_(masked_out, -math.inf)

    def receive(self) -> None:
        """Writes what all parts say together: outcomes, metrics and loss."""
        call, rows = self._call, self.rows
        outcomes = self._outcomes[rows]
        if self._gathered is None:
            parts = self._part[None]
        else:
            parts = self._gathered.wait()
            if self._work is not None:
                self._work.wait()
            assert self._of_ids is not None
            outcomes[:, :-1] = torch.where(call.ids[rows] < 0, -math.inf, self._of_ids)
        top = parts[:, 0].amax(0)
        outcomes[:, -1] = top + (parts[:, 1] * (parts[:, 0] - finite(top)).exp()).sum(0).log()
        metrics = call.of_tokens.metrics
        if metrics is not None:
            of_rows = self._metrics(parts, outcomes[:, :-1])
            mask = call.mask_of(rows)
            metrics[rows] = of_rows if mask is None else of_rows.masked_fill(~mask[:, None], 0.0)
        call.divide(rows, self._outcomes, self._loss)

    def _metrics(self, parts: Tensor, of_ids: Tensor) -> Tensor:
        """[n, NUM_METRICS]: lse_y, cross-entropy, entropy, log p(label), of the tail's parts and the ids."""
        call, ids = self._call, self._call.ids[self.rows]
        tau, smoothing = 1.0 / call.options.inv_tau, call.options.label_smoothing
        y, labels = (of_ids * tau).T, call.of_tokens.labels
        # an id is a part of one token: its sum is 1, and its sum of exp(y - max) (y - max) is 0
        at_label = torch.full_like(y, -math.inf)
        if labels is not None:
            at_label = torch.where((ids == labels[self.rows, None]).T, y, at_label)
        total = y.masked_fill(ids.T < 0, 0.0)
        ones = torch.stack((torch.ones_like(y), torch.zeros_like(y), total, at_label), 1)
        tops = torch.cat((parts[:, 0] * tau, y))
        top, state = merge_metric_states(tops, torch.cat((parts[:, _TAIL:], ones)))
        sum_y, dot_y, total_y, label = state
        lse_y = top + sum_y.log()
        out = [lse_y, torch.zeros_like(lse_y), sum_y.log() - dot_y / sum_y, torch.zeros_like(lse_y)]
        if labels is not None:
            out[3] = label - lse_y
            if smoothing < 1:  # neither part where it has no weight: it may be infinite
                out[1] = -(1.0 - smoothing) * out[3]
            if smoothing:
                out[1] = out[1] + smoothing * (lse_y - total_y / call.total_vocab)
        return torch.stack(out, 1)
