"""How linear_kl_loss on the CPU divides its work so that each part stays in cache.

Sizes of caches are read once, of the CPU that runs this. Speed and memory follow from them and from the
number of threads, but no bit of a result does: sums run over tiles, chains and chunks of tokens, which are
the same everywhere (planner_cpu.py chooses chunks without looking at either).
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import NamedTuple

# tokens, and columns, come in panels of so many: kPanel in csrc/common/cpu/gemm.h, which a test compares
PANEL = 64
CHAIN = 256  # kMaxChain there: K of a GEMM
_MOST_TOKENS = 512  # of a block: more gain nothing
_MOST_COLUMNS = 512
_MOST_HIDDEN_BYTES = 256 << 10  # of dz beside the panels: twice as many were 10 % slower with an L2 of 2 MiB
_ROWS = 16  # of dW: a multiple of them, for operands in tiles


class Caches(NamedTuple):
    """Bytes of a core's data cache and L2, and of the L3 that it shares with others (0: there is none)."""

    l1: int = 32 << 10
    l2: int = 1 << 20
    l3: int = 32 << 20

    @staticmethod
    @functools.cache
    def of_this_cpu() -> Caches:
        """As the system has them; the sizes above for those that it does not know."""
        found = _from_sysfs(Path("/sys/devices/system/cpu/cpu0/cache")) or _from_sysconf()
        return Caches(**found)


def _from_sysfs(folder: Path) -> dict[str, int]:
    """What Linux says of the first CPU; {} where it says nothing."""
    found = {}
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            if kind != "Instruction":
                found[f"l{int(level)}"] = int(size.removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    known = {name: size for name, size in found.items() if name in Caches._fields and size > 0}
    return {"l3": 0, **known} if "l2" in known else {}


def _from_sysconf() -> dict[str, int]:
    """What glibc says (_SC_LEVEL1_DCACHE_SIZE, ..._LEVEL2_, ..._LEVEL3_), which on x86 asks the CPU."""
    found = {}
    if sys.platform == "linux":
        for name, number in (("l1", 188), ("l2", 194), ("l3", 197)):
            try:
                if (size := os.sysconf(number)) > 0:
                    found[name] = size
            except (OSError, ValueError):
                continue
    return found


class Blocks(NamedTuple):
    """Numbers of LinearPlan in csrc/kl_loss/cpu/linear_plan.h.

    token_block: tokens whose logits are made and reduced together. hidden_tokens and hidden_columns: of the
    hidden states' gradient, made by one task. head_rows: rows of the head's gradient that are written as one
    piece. stream_logits, stream_head: whether kept logits, and the head's gradient, are written around the
    caches.
    """

    token_block: int
    hidden_tokens: int
    hidden_columns: int
    head_rows: int
    stream_logits: bool
    stream_head: bool


class Work(NamedTuple):
    """What is divided: a chunk of tokens and tiles of the vocabulary; `*_bytes` of one number or in all."""

    tokens: int
    tile: int
    hidden_size: int
    sides: int  # models whose logits are made
    operand_bytes: int
    accumulate_bytes: int
    grad_head_bytes: int
    converts_head: bool  # to operands: for each block of tokens again
    kept_bytes: int  # logits that are kept from the sums to the gradient
    lent_bytes: int  # of a caller's memory for the head's gradient: it is mapped already
    threads: int


def group_of_tiles(work: Work, caches: Caches) -> int:
    """Tiles whose dz and packed head wait in the L2 and L3 caches for dX; a task for each thread at least."""
    width = work.tokens + _up(work.hidden_size, PANEL)
    fit = 2 * caches.l2 // max(1, work.tile * width * work.operand_bytes)
    return max(min(max(fit, 4), 16), work.threads)


def blocks(work: Work, caches: Caches) -> Blocks:
    """The sizes for these caches."""
    l2 = caches.l2 * 9 // 10
    of_token = work.sides * work.tile * work.accumulate_bytes + CHAIN * work.operand_bytes
    fit = (l2 - work.tile * CHAIN * work.operand_bytes) // of_token
    token_block = _panels(fit, 256 if work.converts_head else PANEL, _MOST_TOKENS)

    of_token = work.tile * work.operand_bytes + PANEL * work.accumulate_bytes
    fit = (caches.l2 // 2 - work.tile * PANEL * work.operand_bytes) // of_token
    fit = min(fit, _MOST_HIDDEN_BYTES // max(1, work.tile * work.operand_bytes))
    hidden_tokens = _panels(fit, PANEL, _MOST_TOKENS)
    columns, token_blocks = _MOST_COLUMNS, -(-work.tokens // hidden_tokens)
    while columns > PANEL and -(-work.hidden_size // columns) * token_blocks < 2 * work.threads:
        columns //= 2

    fit = caches.l2 // 2 // max(1, work.hidden_size * work.grad_head_bytes) // _ROWS * _ROWS
    head_rows = max(min(fit, _up(work.tile, _ROWS)), 2 * _ROWS)
    beyond = caches.l3 // 2
    return Blocks(
        token_block, hidden_tokens, columns, head_rows, work.kept_bytes > beyond, work.lent_bytes > beyond
    )


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _panels(fit: int, least: int, most: int) -> int:
    return max(least, min(most, fit // PANEL * PANEL))
