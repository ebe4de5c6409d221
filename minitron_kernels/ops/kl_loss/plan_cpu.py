"""Plans linear_kl_loss on the CPU: which schedule, how many rows at a time, and what memory that takes.

    store      for a chunk of tokens: all logits of both models are kept, then turned into gradients.
               4 GEMMs. Where the budget ends, the last tiles of the vocabulary are made twice instead.
               Several chunks add their head gradients in fp32.
    recompute  a group of vocabulary tiles at a time: logits once for the sums, again for the gradient.
               6 GEMMs (8 for JSD), memory that does not grow with the vocabulary.
    forward    no gradient needed: logits are reduced and dropped. 2 GEMMs (4 for JSD).

A sparse teacher has no logits: 3, 4 and 1 GEMMs.

The bytes come from the kernel's own layout function, so a plan says what a call will use.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from minitron_kernels.ops.kl_loss.blocks_cpu import PANEL, Blocks, Caches, Work, blocks, group_of_tiles
from minitron_kernels.ops.kl_loss.budget import CPU_WORKSPACE_BYTES, too_small
from minitron_kernels.ops.kl_loss.plan import LinearKLPlan, grad_dtype

# by name: the operands' type, and whose GEMM multiplies them; see csrc/kl_loss/cpu/engine.h
ENGINES = {
    "bf16": (torch.bfloat16, "libtorch"),
    "portable_bf16": (torch.bfloat16, "portable"),
    "f32": (torch.float32, "libtorch"),
    "portable": (torch.float32, "portable"),
    "f64": (torch.float64, "portable"),
}
# the numbers of LinearPlan in csrc/kl_loss/cpu/linear_plan.h, which a test compares
_SCHEDULE_CODES = {"store": 0, "recompute": 1, "forward": 2}
_OPERAND_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2}
_IMPLEMENTATION_CODES = {"libtorch": 0, "portable": 1}
_MAX_CHUNK = 4096  # more rows at a time gain nothing
# smaller chunks multiply slowly, and a tight budget is not meant to buy an fp32 head gradient
_MIN_STORE_ROWS = 128
_MIN_STORED_SHARE = 0.75  # with schedule="store"


@dataclass(frozen=True, kw_only=True)
class CpuPlan(LinearKLPlan):
    """A plan for the CPU: the vocabulary in tiles, whose logits are kept or made twice."""

    engine: str
    tile_group: int
    stored_tiles: int
    blocks: Blocks
    caches: Caches

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
        return _plan_numbers(self.schedule, self.engine, *sizes, self.blocks)

    @property
    def accumulator_bytes(self) -> int:
        """The fp32 gradient that waits for further parts: its size is the problem's, not the budget's.

        store: the head's, where there are several chunks and no buffer for it. recompute: the hidden states'.
        """
        hidden, head = self.part_bytes[-2:]
        return {"store": head, "recompute": hidden}.get(self.schedule, 0)

    @property
    def stored_share(self) -> float:
        """The share of the logits that is kept from the sums to the gradient."""
        return self.stored_tiles / max(1, -(-self.vocab_size // self.tile))

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
            f"           for caches of {l1}, {l2} and {l3}; no bit of the result depends on them",
        ]

    def _explain_lifetime(self) -> str:
        return ", kept between calls (release_workspaces() frees it)"


def _plan_numbers(
    schedule: str, engine: str, chunk_rows: int, tile: int, tile_group: int, stored_tiles: int, blocks: Blocks
) -> list[int]:
    operands, implementation = ENGINES[engine]
    codes = _OPERAND_CODES[operands], _IMPLEMENTATION_CODES[implementation]
    return [_SCHEDULE_CODES[schedule], chunk_rows, tile, tile_group, stored_tiles, *codes, *blocks]


def operand_type(*dtypes: torch.dtype) -> str:
    """The type that GEMM operands of these dtypes are packed in: f64, bf16 or f32.

    bf16 only where every operand is bf16: rounding another to it would give a wrong result, silently.
    """
    if torch.float64 in dtypes:
        return "f64"
    if set(dtypes) == {torch.bfloat16}:
        return _bf16_operands()
    return "f32"


@functools.cache
def _bf16_operands() -> str:
    return torch.ops.minitron_kernels.bf16_operands()  # a property of the processor


def plan(
    num_tokens: int,
    vocab_size: int,
    student_hidden_size: int,
    teacher_hidden_size: int,
    *,
    dtype: torch.dtype,
    grad_hidden: bool,
    grad_head: bool,
    grad_bias: bool,
    grad_head_accumulator: bool,
    divergence_needs_kl: bool,
    schedule: str,
    workspace_bytes: int | None,
    engine: str,
    metrics: bool = False,
    outcomes: int = 0,
    lent: bool = False,
) -> CpuPlan:
    """The cheapest plan within the budget; see plan_linear_kl_loss() for the arguments and errors.

    dtype: of the student's head. outcomes: k + 1 of a sparse teacher, whose hidden size is 0; 0 for a
    teacher with a head. lent: whether the head's gradient goes to memory of the caller's.
    """
    return _plan(
        num_tokens,
        vocab_size,
        student_hidden_size,
        teacher_hidden_size,
        dtype,
        grad_hidden,
        grad_head,
        grad_bias,
        grad_head_accumulator,
        divergence_needs_kl,
        schedule,
        CPU_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes,
        engine,
        metrics,
        outcomes,
        lent,
        torch.get_num_threads(),
        Caches.of_this_cpu(),
    )


# all that a plan follows from is among the arguments: what is not would give another call's plan
@functools.lru_cache(maxsize=256)
def _plan(
    num_tokens: int,
    vocab_size: int,
    student_hidden_size: int,
    teacher_hidden_size: int,
    dtype: torch.dtype,
    grad_hidden: bool,
    grad_head: bool,
    grad_bias: bool,
    grad_head_accumulator: bool,
    divergence_needs_kl: bool,
    schedule: str,
    budget: int,
    engine: str,
    metrics: bool,
    outcomes: int,
    lent: bool,
    threads: int,
    caches: Caches,
) -> CpuPlan:
    storage, dtype = dtype, grad_dtype(dtype)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    planner = _Planner(
        num_tokens,
        vocab_size,
        student_hidden_size,
        teacher_hidden_size,
        engine=engine,
        accumulate_bytes=accumulate.itemsize,
        grad_hidden=grad_hidden,
        grad_head=grad_head,
        head_in_place=grad_head_accumulator or dtype == accumulate,
        adds_to_buffer=grad_head_accumulator,
        divergence_needs_kl=divergence_needs_kl,
        budget=budget,
        threads=threads,
        metrics=metrics,
        outcomes=outcomes,
        converts_head=storage != ENGINES[engine][0],
        grad_head_bytes=dtype.itemsize,
        lent=lent,
        caches=caches,
    )
    return planner.plan(schedule if grad_hidden or grad_head or grad_bias else "forward")


@dataclass(frozen=True, eq=False)
class _Planner:
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
        plans = {
            "forward": self.forward,
            "store": lambda: self.stored(_MIN_STORED_SHARE),
            "recompute": self.recomputed,
            "auto": lambda: [*filter(self.worth_storing, self.stored(0.0)), *self.recomputed()],
        }[schedule]()
        if plans:
            return min(plans, key=self.cost)
        names = ("store", "recompute") if schedule == "auto" else (schedule,)
        least = min((self.smallest(name) for name in names), key=lambda p: p.workspace_bytes)
        more = f"{self.num_tokens} tokens, {self.threads} threads, "
        raise too_small(self.budget, least.workspace_bytes, least.schedule, self.vocab_size, more)

    def smallest(self, schedule: str) -> CpuPlan:
        share = _MIN_STORED_SHARE if schedule == "store" else 0.0
        return self.candidate(schedule, PANEL, 1, math.ceil(share * self.num_tiles))

    def worth_storing(self, plan: CpuPlan) -> bool:
        return plan.num_chunks == 1 or plan.chunk_rows >= _MIN_STORE_ROWS

    def forward(self) -> list[CpuPlan]:
        return [p for rows in self.chunk_sizes(1024) if self.fits(p := self.candidate("forward", rows, 1))]

    def stored(self, least_share: float) -> list[CpuPlan]:
        """For each size of chunk, with as many tiles stored as the budget has room for."""
        plans = []
        for rows in self.chunk_sizes(_MAX_CHUNK):
            for tile_group in self.tile_groups(rows):
                none, one = (self.candidate("store", rows, tile_group, n) for n in (0, 1))
                every = self.candidate("store", rows, tile_group, self.num_tiles)
                room, of_tile = self.budget - none.workspace_bytes, one.workspace_bytes - none.workspace_bytes
                tiles = max(0, min(room // max(1, of_tile), self.num_tiles))
                plan = every if self.fits(every) else self.candidate("store", rows, tile_group, tiles)
                if self.fits(plan) and plan.stored_share >= least_share:
                    plans.append(plan)
                    break
            if plans and plans[-1].stored_share == 1.0:
                break  # smaller chunks only cost more
        return plans

    def recomputed(self) -> list[CpuPlan]:
        return [
            plan
            for rows in self.chunk_sizes(_MAX_CHUNK)
            for tile_group in self.tile_groups(rows)
            if self.fits(plan := self.candidate("recompute", rows, tile_group))
        ]

    def tile_groups(self, rows: int) -> list[int]:
        """Tiles between two passes of dX, the best first: smaller ones take less memory."""
        best = group_of_tiles(self.work(rows, 0), self.caches)
        return sorted({min(n, best, self.num_tiles) for n in (best, 8, 4, 2, 1)} - {0} or {1}, reverse=True)

    def work(self, rows: int, stored_tiles: int) -> Work:
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
        """Flops, and what else takes time in units of flops, as measured on AVX-512 CPUs.

        An element of a head that is widened or fetched for a chunk costs as much as about 50 flops, one of
        its gradient that is read and written once more 100, one of a hidden state that is packed 100.
        """
        heads = self.student_hidden_size + self.teacher_hidden_size
        passes = plan.num_chunks * (2 - plan.stored_share if plan.schedule != "forward" else 1)
        fetched = self.vocab_size * (passes * heads + plan.num_chunks * self.student_hidden_size)
        again = (plan.num_chunks - 1) * self.vocab_size * self.student_hidden_size * self.grad_head
        packs = 1
        if plan.schedule == "recompute" and plan.num_chunks > 1:
            packs = -(-self.num_tiles // plan.tile_group)
        packed = packs * self.num_tokens * (heads + self.student_hidden_size)
        barriers = -(-self.num_tiles // plan.tile_group) * plan.num_chunks * 1e6 * self.threads
        return plan.flops + 50 * fetched + 100 * again + 100 * packed + barriers

    def fits(self, plan: CpuPlan) -> bool:
        return plan.workspace_bytes <= self.budget

    @property
    def tile(self) -> int:
        return 256 if self.vocab_size >= 16384 else 128 if self.vocab_size >= 1024 else 64

    @property
    def num_tiles(self) -> int:
        return -(-self.vocab_size // self.tile)

    def candidate(self, schedule: str, chunk_rows: int, tile_group: int, stored_tiles: int = 0) -> CpuPlan:
        """The plan with these numbers, fitting or not."""
        sizes = blocks(self.work(chunk_rows, stored_tiles), self.caches)
        *parts, _ = torch.ops.minitron_kernels.linear_kl_loss_layout(
            self.num_tokens,
            self.vocab_size,
            self.student_hidden_size,
            self.teacher_hidden_size,
            self.accumulate_bytes,
            self.grad_hidden,
            self.grad_head,
            self.head_in_place,
            _plan_numbers(schedule, self.engine, chunk_rows, self.tile, tile_group, stored_tiles, sizes),
            self.threads,
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
            blocks=sizes,
            caches=self.caches,
            budget_bytes=self.budget,
            part_bytes=tuple(parts),
        )
