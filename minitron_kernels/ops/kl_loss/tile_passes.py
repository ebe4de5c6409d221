"""In which order a call's tiles of logits are made and, where ranks share the vocabulary, when they exchange
what they know of rows. The teacher may have a head, or be sparse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from minitron_kernels.ops.kl_loss.epilogues import Epilogues
from minitron_kernels.ops.kl_loss.operands import TokenMetrics, slices
from minitron_kernels.ops.kl_loss.options import LossOptions
from minitron_kernels.ops.kl_loss.vocab_parallel import Shard


class RowsOfCall(Protocol):
    """What all of a call's rows have in common."""

    vocab_size: int  # of this rank
    first_token: int  # that its column 0 is
    total_vocab: int
    options: LossOptions
    epilogues: Epilogues
    of_tokens: TokenMetrics
    shard: Shard | None

    def mask_of(self, rows: slice) -> Tensor | None:
        """Which of the rows are valid."""


class Pass(Protocol):
    """Some rows in one look at their logits, or several; each is add() for all tiles, send(), receive().

    Between send() and receive() the parts of other ranks are on their way, and this one's may not be touched.
    """

    rows: slice

    def add(self, logits: Any, rows: slice, first_column: int) -> None:
        """A tile of some of the rows, whose other tokens stand before it."""

    def send(self) -> None:
        """All tiles have been added: this rank's part goes to the others."""

    def receive(self) -> None:
        """Writes what the parts of all ranks say together, and turns to the next look."""


class Tiles(RowsOfCall, Protocol):
    """One call, as it is cut into tiles of logits."""

    @property
    def looks(self) -> int:
        """At each logit, for the statistics."""

    def begin(self, rows: slice, loss: Tensor, stats: Tensor) -> Pass:
        """Some rows, of which no logit has been seen."""

    def tile(self, rows: slice, columns: slice, stats: Tensor, slot: int = 0) -> Any:
        """A tile of logits, as add() takes it, in memory of its slot.

        What add() would not find in it (logits of a sparse teacher's ids) goes to `stats`.
        """


def statistics(call: Tiles, loss: Tensor, stats: Tensor, chunk_rows: int, tile: int) -> None:
    """Loss and stats of all rows, tile by tile of the vocabulary.

    Ranks that share it exchange each chunk of rows while the next one's last tile is made.
    """
    count = loss.shape[0]
    waiting = [
        call.begin(rows, loss, stats)
        for rows in slices(0, count, count if call.shard is None else chunk_rows)
    ]
    tiles = list(slices(0, call.vocab_size, tile)) or [slice(0, 0)]
    for _ in range(call.looks):
        for columns in tiles:
            for some in waiting:
                if call.vocab_size:
                    for rows in slices(some.rows.start, some.rows.stop, chunk_rows):
                        some.add(call.tile(rows, columns, stats), rows, columns.start)
                if columns is tiles[-1]:
                    some.send()
        for some in waiting:
            some.receive()


def store(call: Tiles, chunks: list[slice], loss: Tensor, stats: Tensor) -> Iterator[tuple[slice, Any]]:
    """Loss and stats of chunks of rows over a shared vocabulary; gives each chunk's logits when they are.

    While the ranks exchange what they know of a chunk, the next one's logits are made, in another buffer; and
    while they exchange JSD's second look at it, the next one's first look. A rank without tokens takes part
    in the exchange, and gives nothing.
    """
    columns, before = slice(0, call.vocab_size), None
    for i, rows in enumerate((*chunks, None)):
        some, logits = None, None
        if rows is not None:
            some = call.begin(rows, loss, stats)
            if call.vocab_size:
                logits = call.tile(rows, columns, stats, i % 2)
        if before is not None and call.looks > 1:
            before[0].receive()
            if before[1] is not None:
                before[0].add(before[1], before[0].rows, 0)
            before[0].send()
        if some is not None:
            if logits is not None:
                some.add(logits, some.rows, 0)
            some.send()
        if before is not None:
            before[0].receive()
            if before[1] is not None:
                yield before[0].rows, before[1]
        before = None if some is None else (some, logits)
