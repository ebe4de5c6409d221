"""Loss, stats and metrics of rows on a GPU, merged from tiles of their logits and, where ranks share the
vocabulary, from what each of them knows of its shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from minitron_kernels.ops.kl_loss.divergence import NUM_METRIC_STATE, NUM_STATE, NUM_SUMS
from minitron_kernels.ops.kl_loss.epilogues import Epilogues
from minitron_kernels.ops.kl_loss.linear_rows import TokenMetrics, slices
from minitron_kernels.ops.kl_loss.options import LossOptions
from minitron_kernels.ops.kl_loss.states import empty_state, state_of
from minitron_kernels.ops.kl_loss.vocab_parallel import Gathered, Shard

Logits = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # both, and the bias of each


class Tiles(Protocol):
    """One call, as it is cut into tiles of logits."""

    vocab_size: int  # of this rank
    first_token: int  # that its column 0 is
    total_vocab: int
    options: LossOptions
    epilogues: Epilogues
    of_tokens: TokenMetrics
    shard: Shard | None

    def logits(self, rows: slice, columns: slice, slot: int = 0) -> Logits:
        """Both logits of a tile."""

    def mask_of(self, rows: slice) -> Tensor | None:
        """Which of the rows are valid."""


class RowStatistics:
    """Some rows in one look at their logits, or two for JSD; each is add() for all tiles, send(), receive().

    Between send() and receive() the parts of other ranks are on their way, and this one's may not be touched.
    """

    def __init__(self, call: Tiles, rows: slice, loss: Tensor, stats: Tensor) -> None:
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
        """A tile of some of the rows, whose other tokens stand before it."""
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
        """This rank's part goes to the others."""
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


def statistics(call: Tiles, loss: Tensor, stats: Tensor, chunk_rows: int, tile: int) -> None:
    """Loss and stats of all rows, tile by tile of the vocabulary.

    Ranks that share it exchange each chunk of rows while the next one's last tile is made.
    """
    count = loss.shape[0]
    waiting = [
        RowStatistics(call, rows, loss, stats)
        for rows in slices(0, count, count if call.shard is None else chunk_rows)
    ]
    tiles = list(slices(0, call.vocab_size, tile)) or [slice(0, 0)]
    for _ in range(1 + call.options.divergence.needs_second_look):
        for columns in tiles:
            for some in waiting:
                if call.vocab_size:
                    for rows in slices(some.rows.start, some.rows.stop, chunk_rows):
                        some.add(call.logits(rows, columns), rows, columns.start)
                if columns is tiles[-1]:
                    some.send()
        for some in waiting:
            some.receive()


def store(call: Tiles, chunks: list[slice], loss: Tensor, stats: Tensor) -> Iterator[tuple[slice, Logits]]:
    """Loss and stats of chunks of rows over a shared vocabulary; gives each chunk's logits when they are.

    While the ranks exchange what they know of a chunk, the next one's logits are made, in another buffer; and
    while they exchange JSD's second look at it, the next one's first look. A rank without tokens takes part
    in the exchange, and gives nothing.
    """
    columns, before = slice(0, call.vocab_size), None
    for i, rows in enumerate((*chunks, None)):
        logits = None
        if rows is not None and call.vocab_size:
            logits = call.logits(rows, columns, i % 2)
        if before is not None and call.options.divergence.needs_second_look:
            before[0].receive()
            if before[1] is not None:
                before[0].add(before[1], before[0].rows, 0)
            before[0].send()
        some = None
        if rows is not None:
            some = RowStatistics(call, rows, loss, stats)
            if logits is not None:
                some.add(logits, rows, 0)
            some.send()
        if before is not None:
            before[0].receive()
            if before[1] is not None:
                yield before[0].rows, before[1]
        before = None if some is None else (some, logits)
