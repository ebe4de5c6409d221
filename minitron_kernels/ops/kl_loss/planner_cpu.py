"""The search for a plan of linear_kl_loss on the CPU; see plan_cpu.py for the schedules.

Chunks decide in which order the gradients to head and bias add up, so they are chosen first, as a machine
with caches of usual sizes would: neither threads nor caches change a bit of a result. The rest is chosen for
those that are there, and where a budget has no memory for all threads, fewer multiply.

The bytes come from the kernel's own layout function, so a plan says what a call will use.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch

from minitron_kernels.ops.kl_loss.blocks_cpu import PANEL, Blocks, Caches, Work, blocks, group_of_tiles
from minitron_kernels.ops.kl_loss.budget import too_small
from minitron_kernels.ops.kl_loss.engines_cpu import (
    ENGINES,
    IMPLEMENTATION_CODES,
    OPERAND_CODES,
    SCHEDULE_CODES,
)
from minitron_kernels.ops.kl_loss.plan import LinearKLPlan

_MAX_CHUNK = 4096  # more rows at a time gain nothing
_MAX_FORWARD_CHUNK = 1024
# smaller chunks multiply slowly, and a tight budget is not meant to buy an fp32 head gradient
_MIN_STORE_ROWS = 128
_MIN_STORED_SHARE = 0.75  # with schedule="store"
_THREADS_OF_MEMORY = 8  # use all of its bandwidth
# threads of the machines that chunks are chosen for
_THREADS_OF_CHUNKS = (1, 8, 64)


@dataclass(frozen=True, kw_only=True)
class CpuPlan(LinearKLPlan):
    """A plan for the CPU: the vocabulary in tiles, whose logits are kept or made twice."""

    engine: str
    tile_group: int
    stored_tiles: int
    blocks: Blocks
    caches: Caches
    threads: int  # that multiply at the same time, at most

    # in the order of linear_kl_loss_layout
    PARTS = (
        "logits",
        "dz",
        "packed operands",
        "partial sums",
        "row statistics",
        "scratch of the threads",
        "hidden gradient, accumulated",
        "head gradient, accumulated",
    )

    @functools.cached_property
    def numbers(self) -> list[int]:
        """`int[] plan` of the ops."""
        sizes = (self.chunk_rows, self.tile, self.tile_group, self.stored_tiles)
        return _plan_numbers(self.schedule, self.engine, sizes, self.blocks, self.threads)

    @property
    def accumulator_bytes(self) -> int:
        """The fp32 gradient that waits for further parts: its size is the problem's, not the budget's.

        store: the head's, where there are several chunks and no buffer for it. recompute: the hidden states'.
        """
        hidden, head = self.part_bytes[-2:]
        return {"store": head, "recompute": hidden}.get(self.schedule, 0)

    @property
    def stored_share(self) -> float:
        """The share of the logits that is kept from the sums to the gradient; all of none."""
        tiles = -(-self.vocab_size // self.tile)
        return self.stored_tiles / tiles if tiles else 1.0

    def _explain_operands(self) -> str:
        return f", operands {self.engine}"

    def _explain_kept(self) -> str:
        if self.schedule != "store":
            return ""
        around = ", written around the caches" if self.blocks.stream_logits else ""
        return f", logits of {self.stored_share:.0%} kept{around}"

    def _explain_more(self) -> list[str]:
        l1, l2, l3 = (f"{size >> 10} KiB" for size in self.caches)
        return [
            f"blocks     logits of {self.blocks.token_block} tokens, {self.tile_group} tiles before dX, dX "
            f"of {self.blocks.hidden_tokens} x {self.blocks.hidden_columns}",
            f"           for caches of {l1}, {l2} and {l3}, {self.threads} thread(s) at a time",
            "           no bit of the result depends on any of these",
        ]

    def _explain_lifetime(self) -> str:
        return ", kept between calls (release_workspaces() frees it)"


def _plan_numbers(
    schedule: str, engine: str, sizes: tuple[int, int, int, int], blocks: Blocks, threads: int
) -> list[int]:
    operands, implementation = ENGINES[engine]
    codes = OPERAND_CODES[operands], IMPLEMENTATION_CODES[implementation]
    return [SCHEDULE_CODES[schedule], *sizes, *codes, *blocks, threads]


@dataclass(frozen=True, eq=False)
class Planner:
    """A problem and a budget, and the search for the plan."""

    num_tokens: int
    vocab_size: int
    student_hidden_size: int
    teacher_hidden_size: int
    engine: str
    accumulate_bytes: int
    grad_hidden: bool
    grad_head: bool
    head_in_place: bool
    adds_to_buffer: bool
    divergence_needs_kl: bool
    budget: int
    threads: int
    metrics: bool
    outcomes: int
    converts_head: bool
    grad_head_bytes: int
    lent: bool
    caches: Caches

    def plan(self, schedule: str) -> CpuPlan:
        """The cheapest plan within the budget; ValueError if there is none."""
        usual = self.in_usual_chunks(schedule)
        return self.cheapest(schedule, [usual.chunk_rows]) or usual

    def cheapest(self, schedule: str, chunk_rows: Sequence[int] | None = None) -> CpuPlan | None:
        """The cheapest plan for all threads, or fewer; None if there is none."""
        plans: list[CpuPlan] = []
        for threads in halves(self.threads):
            here = dataclasses.replace(self, threads=threads)
            plans += here.plans(schedule, chunk_rows)
            if any(p.tile_group == here.tile_groups(p.chunk_rows)[0] for p in plans):
                break  # more memory for fewer threads would gain nothing
        return min(plans, key=self.cost, default=None)

    def in_usual_chunks(self, schedule: str) -> CpuPlan:
        """The plan of one thread with caches of usual sizes, whose chunks every machine takes.

        They are those which suit one thread, or several, each of which needs scratch memory that is then not
        there for logits: the ones with the least cost on such machines, each in multiples of its best.
        """
        usual = [dataclasses.replace(self, threads=n, caches=Caches()) for n in _THREADS_OF_CHUNKS]

        def of_each(chunk_rows: Sequence[int] | None = None) -> list[CpuPlan]:
            """A plan of each machine, which may use one thread: so all have one, or none."""
            return [plan for m in usual if (plan := m.cheapest(schedule, chunk_rows)) is not None]

        best = of_each()
        if not best:
            self.refuse(schedule)
        plans = [of_each([rows]) for rows in dict.fromkeys(plan.chunk_rows for plan in best)]
        return min(plans, key=lambda given: self.multiples(given, best))[0]

    def multiples(self, plans: Sequence[CpuPlan], best: Sequence[CpuPlan]) -> float:
        """What plans cost in multiples of the best, in all; a problem without tokens costs nothing."""
        pairs = zip(plans, best, strict=True)
        return sum((self.cost(plan) + 1) / (self.cost(least) + 1) for plan, least in pairs)

    def refuse(self, schedule: str) -> NoReturn:
        """The error for a budget with which not even one thread has a plan."""
        alone = dataclasses.replace(self, threads=1, caches=Caches())
        names = ("store", "recompute") if schedule == "auto" else (schedule,)
        least = min((alone.smallest(name) for name in names), key=lambda p: p.workspace_bytes)
        more = f"{self.num_tokens} tokens, "
        raise too_small(self.budget, least.workspace_bytes, least.schedule, self.vocab_size, more)

    def smallest(self, schedule: str) -> CpuPlan:
        """The plan of a schedule that takes the least memory."""
        share = _MIN_STORED_SHARE if schedule == "store" else 0.0
        return self.candidate(schedule, PANEL, 1, math.ceil(share * self.num_tiles))

    def plans(self, schedule: str, chunk_rows: Sequence[int] | None = None) -> list[CpuPlan]:
        """Plans within the budget, in chunks of any size or of these."""
        if schedule == "forward":
            return self.forward(chunk_rows or self.chunk_sizes(_MAX_FORWARD_CHUNK))
        sizes = chunk_rows or self.chunk_sizes(_MAX_CHUNK)
        plans: list[CpuPlan] = []
        if schedule == "store":
            plans += self.stored(_MIN_STORED_SHARE, sizes)
        if schedule == "auto":
            plans += filter(self.worth_storing, self.stored(0.0, sizes))
        if schedule != "store":
            plans += self.recomputed(sizes)
        return plans

    def worth_storing(self, plan: CpuPlan) -> bool:
        """Whether a plan's chunks are not so small that making logits twice would be faster."""
        return plan.num_chunks == 1 or plan.chunk_rows >= _MIN_STORE_ROWS

    def forward(self, sizes: Sequence[int]) -> list[CpuPlan]:
        """Without gradients."""
        return [p for rows in sizes if self.fits(p := self.candidate("forward", rows, 1))]

    def stored(self, least_share: float, sizes: Sequence[int]) -> list[CpuPlan]:
        """For each size of chunk and of group, with as many tiles stored as the budget has room for."""
        plans: list[CpuPlan] = []
        for rows in sizes:
            for tile_group in self.tile_groups(rows):
                none, one = (self.candidate("store", rows, tile_group, n) for n in (0, 1))
                every = self.candidate("store", rows, tile_group, self.num_tiles)
                room, of_tile = self.budget - none.workspace_bytes, one.workspace_bytes - none.workspace_bytes
                tiles = max(0, min(room // max(1, of_tile), self.num_tiles))
                plan = every if self.fits(every) else self.candidate("store", rows, tile_group, tiles)
                if self.fits(plan) and plan.stored_share >= least_share:
                    plans.append(plan)
                    if plan.stored_share == 1.0:
                        return plans  # smaller groups, and smaller chunks, only cost more
        return plans

    def recomputed(self, sizes: Sequence[int]) -> list[CpuPlan]:
        """For each size of chunk and of group, without logits that are kept."""
        return [
            plan
            for rows in sizes
            for tile_group in self.tile_groups(rows)
            if self.fits(plan := self.candidate("recompute", rows, tile_group))
        ]

    def tile_groups(self, rows: int) -> list[int]:
        """Tiles between two passes of dX, the best first: smaller ones take less memory."""
        best = min(group_of_tiles(self.work(rows, 0), self.caches), max(1, self.num_tiles))
        return sorted({best, *halves(best)}, reverse=True)

    def work(self, rows: int, stored_tiles: int) -> Work:
        """What is divided into blocks."""
        tokens, sides = min(rows, -(-self.num_tokens // PANEL) * PANEL), 1 if self.outcomes else 2
        return Work(
            tokens=tokens,
            tile=self.tile,
            hidden_size=self.student_hidden_size,
            sides=sides,
            operand_bytes=ENGINES[self.engine][0].itemsize,
            accumulate_bytes=self.accumulate_bytes,
            grad_head_bytes=self.grad_head_bytes,
            converts_head=self.converts_head,
            kept_bytes=sides * stored_tiles * self.tile * tokens * self.accumulate_bytes,
            lent_bytes=self.vocab_size * self.student_hidden_size * self.grad_head_bytes * self.lent,
            threads=self.threads,
        )

    def chunk_sizes(self, most: int) -> list[int]:
        """Rows of a chunk, largest first: whole panels that share the tokens out evenly."""
        panels = max(1, -(-self.num_tokens // PANEL))
        sizes = {-(-panels // -(-panels // size)) for size in range(1, min(most // PANEL, panels) + 1)}
        return [size * PANEL for size in sorted(sizes, reverse=True)]

    def cost(self, plan: CpuPlan) -> float:
        """Time: flops of a thread, and what else takes time in units of flops, as measured on AVX-512 CPUs.

        An element of a head that is widened or fetched for a chunk costs as much as about 50 flops, one of
        its gradient that is added up over one chunk more 300, one of a hidden state that is packed 100, and a
        barrier between threads 1e6 each. In a group each tile is a task: threads beyond its tiles wait. What
        goes through memory does so no faster with more than a few threads.
        """
        heads = self.student_hidden_size + self.teacher_hidden_size
        passes = plan.num_chunks * (2 - plan.stored_share if plan.schedule != "forward" else 1)
        fetched = self.vocab_size * (passes * heads + plan.num_chunks * self.student_hidden_size)
        again = (plan.num_chunks - 1) * self.vocab_size * self.student_hidden_size * self.grad_head
        whole, rest = divmod(self.num_tiles, plan.tile_group)
        groups = whole + (rest > 0)
        packs = groups if plan.schedule == "recompute" and plan.num_chunks > 1 else 1
        packed = packs * self.num_tokens * (heads + self.student_hidden_size)
        made_again = {"store": 1.0 - plan.stored_share, "recompute": 1.0}.get(plan.schedule, 0.0)
        of_tiles = made_again * heads + self.student_hidden_size * self.grad_head
        turns = whole * -(-plan.tile_group // plan.threads) + -(-rest // plan.threads)
        waits = (turns * plan.threads - self.num_tiles) * 2 * self.num_tokens * self.tile * of_tiles
        work = (plan.flops + 100 * packed + waits) / plan.threads
        moved = (50 * fetched + 300 * again) / min(plan.threads, _THREADS_OF_MEMORY)
        return work + moved + 1e6 * groups * plan.num_chunks

    def fits(self, plan: CpuPlan) -> bool:
        """Whether a plan is within the budget."""
        return plan.workspace_bytes <= self.budget

    @property
    def tile(self) -> int:
        """Entries of the vocabulary that are one task."""
        return 256 if self.vocab_size >= 16384 else 128 if self.vocab_size >= 1024 else 64

    @property
    def num_tiles(self) -> int:
        """How many of them there are."""
        return -(-self.vocab_size // self.tile)

    def candidate(self, schedule: str, chunk_rows: int, tile_group: int, stored_tiles: int = 0) -> CpuPlan:
        """The plan with these numbers, fitting or not."""
        chosen = blocks(self.work(chunk_rows, stored_tiles), self.caches)
        sizes = (chunk_rows, self.tile, tile_group, stored_tiles)
        *parts, _ = torch.ops.minitron_kernels.linear_kl_loss_layout(
            self.num_tokens,
            self.vocab_size,
            self.student_hidden_size,
            self.teacher_hidden_size,
            self.accumulate_bytes,
            self.grad_hidden,
            self.grad_head,
            self.head_in_place,
            _plan_numbers(schedule, self.engine, sizes, chosen, self.threads),
            self.metrics,
            self.outcomes,
        )
        looks = 1 + self.divergence_needs_kl  # at each logit, for sums
        # with a grad_head_accumulator the backward makes them once more, see linear.py
        stored = 1 + looks * self.adds_to_buffer
        logits = {"store": stored, "forward": looks, "recompute": looks + 1}[schedule]
        grads = self.grad_hidden + self.grad_head
        widths = (
            logits * (self.student_hidden_size + self.teacher_hidden_size) + grads * self.student_hidden_size
        )
        again = max(0, self.vocab_size - stored_tiles * self.tile) if schedule == "store" else 0
        again *= (1 if self.adds_to_buffer else looks) * (self.student_hidden_size + self.teacher_hidden_size)
        return CpuPlan(
            schedule=schedule,
            engine=self.engine,
            num_tokens=self.num_tokens,
            vocab_size=self.vocab_size,
            student_hidden_size=self.student_hidden_size,
            teacher_hidden_size=self.teacher_hidden_size,
            num_gemms=(1 if self.outcomes else 2) * logits + grads,
            flops=2 * self.num_tokens * (self.vocab_size * widths + again),
            chunk_rows=chunk_rows,
            tile=self.tile,
            tile_group=tile_group,
            stored_tiles=stored_tiles,
            blocks=chosen,
            caches=self.caches,
            threads=self.threads,
            budget_bytes=self.budget,
            part_bytes=tuple(parts),
        )


def halves(number: int) -> list[int]:
    """It, half of it, and so on to 1."""
    return [number >> i for i in range(max(1, number).bit_length())]
