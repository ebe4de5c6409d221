"""Loss, stats and metrics of rows on a GPU, merged from tiles of their logits and, where ranks share the
vocabulary, from what each of them knows of its shard.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from minitron_kernels.ops.kl_loss.divergence import NUM_METRIC_STATE, NUM_STATE, NUM_SUMS
from minitron_kernels.ops.kl_loss.states import empty_state, state_of
from minitron_kernels.ops.kl_loss.tile_passes import RowsOfCall
from minitron_kernels.ops.kl_loss.vocab_parallel import Gathered

Logits = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # both, and the bias of each


class RowStatistics:
    """Some rows in one look at their logits, or two for JSD; see Pass."""

    def __init__(self, call: RowsOfCall, rows: slice, loss: Tensor, stats: Tensor) -> None:
        self.rows, self.second_look = rows, False
        self._call, self._loss, self._stats = call, loss, stats
        self._with_metrics = call.of_tokens.metrics is not None
        self._part = self._begun(NUM_STATE + NUM_METRIC_STATE * self._with_metrics)
        self._gathered: Gathered | None = None

    def _begun(self, fields: int) -> Tensor:
        shape = fields, self.rows.stop - self.rows.start
        if self._call.vocab_size:
            return self._loss.new_empty(shape)
        return self._loss.new_zeros(shape) if fields == NUM_SUMS else empty_state(self._loss, *shape)

    def add(self, logits: Logits, rows: slice, first_column: int) -> None:
        """See Pass."""
        call, begin = self._call, self.rows.start
        part = self._part[:, rows.start - begin : rows.stop - begin]
        mask, first = call.mask_of(rows), first_column == 0
        if self.second_look:
            call.epilogues.tile_mixture(logits, mask, self._stats[rows], part, first, call.options)
            return
        more: dict[str, Any] = {}
        if self._with_metrics:
            labels = call.of_tokens.labels
            more = {
                "labels": None if labels is None else labels[rows],
                "metric_state": part[NUM_STATE:],
                "first_token": call.first_token + first_column,
            }
        call.epilogues.tile_stats(logits, mask, part[:NUM_STATE], first, call.options, **more)

    def know(self, loss: Tensor, stats: Tensor) -> None:
        """In place of add(): loss and stats of all tokens of this rank."""
        state = state_of(loss, stats)
        nothing = (state[1] == 0) | (state[3] == 0)  # on one side: then there is no KL, and the loss is NaN
        state[4].masked_fill_(nothing, 0.0)
        self._part = state

    def send(self) -> None:
        """See Pass."""
        if self._call.shard is not None:
            self._gathered = self._call.shard.gather(self._part)

    def receive(self) -> None:
        """Writes what the parts of all ranks say together, and turns to the second look."""
        call, rows = self._call, self.rows
        parts = self._part[None] if self._gathered is None else self._gathered.wait()
        outputs = call.mask_of(rows), self._loss[rows], self._stats[rows], call.options
        if self.second_look:
            call.epilogues.finish_mixture(parts, *outputs)
            return
        more: dict[str, Any] = {}
        labels, metrics, _ = call.of_tokens
        if metrics is not None:
            more = {
                "labels": None if labels is None else labels[rows],
                "metric_states": parts[:, NUM_STATE:].contiguous(),
                "metrics": metrics[rows],
                "total_vocab": call.total_vocab,
            }
        call.epilogues.finish_stats(parts[:, :NUM_STATE].contiguous(), *outputs, **more)
        self.second_look = True
        if call.options.divergence.needs_second_look:
            self._part = self._begun(NUM_SUMS)
