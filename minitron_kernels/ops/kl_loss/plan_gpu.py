"""Plans linear_kl_loss on CUDA and ROCm: its schedule, the rows of a chunk, the entries of a tile."""

from __future__ import annotations

from typing import NamedTuple

from minitron_kernels.ops.kl_loss.budget import too_small

ALIGN = 64  # columns; rows of logits start at 128-byte borders
_MIN_STORE_ROWS = 512  # with fewer, adding to the fp32 head gradient costs more than two more GEMMs
_MOST_TILE, _LEAST_TILE = 8192, 128


class Plan(NamedTuple):
    """How a call goes over rows and vocabulary."""

    schedule: str
    chunk_rows: int
    tile: int
    workspace_bytes: int


def plan(
    num_tokens: int, vocab_size: int, hidden_size: int, *, operand_bytes: int, schedule: str, budget: int
) -> Plan:
    """The largest chunks and tiles within the budget, which bounds logits, dz and a tile's head gradient.

    fp32 sums of whole gradients, O(N H) and O(V H), are the problem's and not the budget's.

    Raises:
        ValueError: the budget is too small; says the least that would do.
    """
    pair = 8 + operand_bytes  # of both fp32 logits and dz
    columns = -(-vocab_size // ALIGN) * ALIGN
    rows = min(num_tokens, budget // (pair * columns))
    if schedule == "store" or (schedule == "auto" and rows >= min(num_tokens, _MIN_STORE_ROWS)):
        if rows < 1:
            raise too_small(budget, pair * columns, "store", vocab_size)
        rows = _even(num_tokens, rows)
        return Plan("store", rows, vocab_size, pair * rows * columns)
    sum_row = 4 * hidden_size  # of a tile's head gradient while chunks of rows add to it

    def most_rows(tile: int) -> int:
        return min(num_tokens, (budget - tile * sum_row) // (pair * tile))

    tiles = [min(columns, _MOST_TILE)]
    while tiles[-1] // 2 >= _LEAST_TILE:
        tiles.append(tiles[-1] // 2 // ALIGN * ALIGN)
    # all rows at once if tiles stay wide; else many rows; else whatever fits
    for wanted, least in ((num_tokens, 1024), (min(num_tokens, 2048), 0), (1, 0)):
        for tile in tiles:
            if most_rows(tile) >= wanted and tile >= min(least, columns):
                rows = _even(num_tokens, most_rows(tile))
                return Plan("recompute", rows, min(tile, vocab_size), tile * (pair * rows + sum_row))
    raise too_small(budget, tiles[-1] * (pair + sum_row), "recompute", vocab_size)


def _even(total: int, most: int) -> int:
    """The size of equal chunks of at most `most`, in whole panels of 128 rows where that fits."""
    chunks = -(-total // most)
    size = -(-total // chunks)
    return min(-(-size // 128) * 128, most)
