"""Plans linear_kl_loss on the CPU: which schedule, how many rows at a time, and what memory that takes.

    store      for a chunk of rows: both logits of the whole vocabulary are kept, then turned into gradients.
               4 GEMMs. Several chunks add their head gradients in fp32.
    recompute  a stretch of the vocabulary at a time: logits once for the sums, again for the gradient.
               6 GEMMs (8 for JSD), memory that does not grow with the vocabulary.
    forward    no gradient wanted: logits are reduced and dropped. 2 GEMMs (4 for JSD).

The bytes come from the kernel's own layout function, so a plan says what a call will use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minitron_kernels import _native

DEFAULT_WORKSPACE_BYTES = 512 << 20
SCHEDULES = ("auto", "store", "recompute")
_PANEL = 64  # rows come in panels of 64, kPanel in csrc/common/gemm.h
_MAX_CHUNK = 4096  # more rows at a time gain nothing
_MIN_STORE_ROWS = 128  # with fewer, a chunk's share of the fp32 head gradient costs more than recomputing


@dataclass(frozen=True)
class LinearKLPlan:
    """What linear_kl_loss does with a problem; made by plan_linear_kl_loss, told by explain()."""

    schedule: str
    engine: str
    num_tokens: int
    vocab_size: int
    student_hidden_size: int
    teacher_hidden_size: int
    num_gemms: int
    flops: int
    chunk_rows: int
    tile: int
    super_tiles: int
    budget_bytes: int
    part_bytes: tuple[int, ...]

    # Names of part_bytes, in the order of linear_kl_loss_layout
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

    @property
    def num_chunks(self) -> int:
        """Chunks of rows."""
        return -(-self.num_tokens // self.chunk_rows) if self.num_tokens else 0

    @property
    def total_bytes(self) -> int:
        """All bytes of the call beyond its inputs and outputs."""
        return sum(self.part_bytes)

    @property
    def accumulator_bytes(self) -> int:
        """fp32 gradients that are not the budget's: their size is the problem's, not the schedule's."""
        hidden, head = self.part_bytes[-2:]
        return hidden + (head if self.schedule == "store" else 0)

    @property
    def workspace_bytes(self) -> int:
        """The bytes that the budget bounds: all but accumulator_bytes."""
        return self.total_bytes - self.accumulator_bytes

    def explain(self) -> str:
        """The plan as text for people: schedule, flops, and each part's memory."""

        def mib(nbytes: int) -> str:
            return f"{nbytes / 2**20:9.1f} MiB"

        lines = [
            f"linear_kl_loss: {self.num_tokens} tokens, vocabulary {self.vocab_size}, hidden sizes "
            f"{self.student_hidden_size} (student) and {self.teacher_hidden_size} (teacher)",
            f"schedule   {self.schedule}: {self.num_gemms} GEMMs, {self.flops / 1e9:.1f} Gflop, "
            f"operands {self.engine}",
            f"rows       {self.num_chunks} chunk(s) of {self.chunk_rows}",
            f"vocabulary tiles of {self.tile}"
            + (f", {self.super_tiles} at a time" if self.schedule == "recompute" else ""),
        ]
        for name, nbytes in zip(self.PARTS, self.part_bytes, strict=True):
            if nbytes:
                lines.append(f"{mib(nbytes)}  {name}")
        lines.append(f"{mib(self.total_bytes)}  in all, kept between calls (release_workspaces() frees it)")
        lines.append(
            f"{mib(self.workspace_bytes)}  of it counts towards workspace_bytes = {self.budget_bytes}"
        )
        logits = self.num_tokens * self.vocab_size * 8
        lines.append(f"{mib(logits)}  is what both fp32 logits would take")
        return "\n".join(lines)


def operand_type(dtype: torch.dtype, other: torch.dtype) -> str:
    """The type that GEMM operands are packed in: f64, bf16 or f32."""
    if dtype == torch.float64:
        return "f64"
    if dtype == other == torch.bfloat16:
        return torch.ops.minitron_kernels.bf16_operands()
    return "f32"


def plan_linear_kl_loss(
    num_tokens: int,
    vocab_size: int,
    student_hidden_size: int,
    teacher_hidden_size: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    teacher_dtype: torch.dtype | None = None,
    grad_hidden: bool = True,
    grad_head: bool = True,
    grad_bias: bool = False,
    grad_head_accumulator: bool = False,
    divergence_needs_kl: bool = False,
    schedule: str = "auto",
    workspace_bytes: int | None = None,
    engine: str | None = None,
) -> LinearKLPlan:
    """Plans a CPU call of linear_kl_loss without making it; print(plan.explain()) shows schedule and memory.

    Args:
        num_tokens: rows that count (unmasked).
        vocab_size: columns of the logits.
        student_hidden_size: width of the student's hidden states.
        teacher_hidden_size: width of the teacher's.
        dtype: of the student's hidden states and head.
        teacher_dtype: of the teacher's; the student's by default.
        grad_hidden: whether the gradient to the student's hidden states is wanted.
        grad_head: whether the gradient to the student's head is wanted.
        grad_bias: whether the gradient to the student's bias is wanted.
        grad_head_accumulator: whether a buffer for it is lent.
        divergence_needs_kl: JSD with 0 < beta < 1, which looks at the logits once more.
        schedule: "auto", "store" or "recompute".
        workspace_bytes: budget in bytes, 512 MiB by default. It bounds all that the call allocates beyond
            inputs and outputs, but for the fp32 accumulators of gradients (accumulator_bytes).
        engine: "bf16", "f32", "f64" or "portable" operands; what runs fastest here by default.

    Returns:
        The plan.

    Raises:
        ValueError: an unknown schedule, or a budget too small for any: says the least that would do.
        RuntimeError: the extension is not built.
    """
    if not _native.available():
        raise RuntimeError(
            f"linear_kl_loss has nothing to plan without the C++ extension: {_native.reason()}"
        )
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}")
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    planner = _Planner(
        num_tokens,
        vocab_size,
        student_hidden_size,
        teacher_hidden_size,
        engine=engine or operand_type(dtype, teacher_dtype or dtype),
        accumulate_bytes=accumulate.itemsize,
        grad_hidden=grad_hidden,
        grad_head=grad_head,
        head_in_place=grad_head_accumulator or dtype == accumulate,
        divergence_needs_kl=divergence_needs_kl,
        budget=DEFAULT_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes,
        threads=torch.get_num_threads(),
    )
    return planner.plan(schedule if grad_hidden or grad_head or grad_bias else "forward")


@dataclass(frozen=True)
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
    divergence_needs_kl: bool
    budget: int
    threads: int

    def plan(self, schedule: str) -> LinearKLPlan:
        """The best plan within the budget; ValueError if there is none."""
        plan = {
            "forward": lambda: self.largest("forward", 1, 1024),
            "store": lambda: self.largest("store", 1),
            "recompute": self.recomputed,
            "auto": self.best,
        }[schedule]()
        if plan is not None:
            return plan
        names = ("store", "recompute") if schedule == "auto" else (schedule,)
        least = min((self.candidate(name, _PANEL, 1) for name in names), key=lambda p: p.workspace_bytes)
        raise ValueError(
            f"workspace_bytes={self.budget} is too small: the least that would do is "
            f"{least.workspace_bytes} (schedule={least.schedule!r}, {self.num_tokens} tokens, vocabulary "
            f"{self.vocab_size}, {self.threads} threads)"
        )

    def best(self) -> LinearKLPlan | None:
        stored = self.largest("store", 1)
        if stored is not None and stored.chunk_rows >= min(_MIN_STORE_ROWS, self.most_rows):
            return stored
        return self.recomputed() or stored

    def recomputed(self) -> LinearKLPlan | None:
        """Long stretches spread the repacking of hidden states; all rows in one chunk need none at all."""
        wanted = (max(16, 2 * self.threads), 8, 4, 2, 1)
        stretches = sorted({max(1, min(n, self.num_tiles)) for n in wanted}, reverse=True)
        for super_tiles in stretches:
            plan = self.candidate("recompute", self.most_rows, super_tiles)
            if plan.num_chunks <= 1 and super_tiles >= min(4, self.num_tiles) and self.fits(plan):
                return plan
        found = None
        for super_tiles in stretches:
            found = self.largest("recompute", super_tiles, 512)
            if found is not None and found.chunk_rows >= min(256, self.most_rows):
                break
        return found

    def largest(self, schedule: str, super_tiles: int, at_most: int = _MAX_CHUNK) -> LinearKLPlan | None:
        """The plan with the most rows at a time that fits, in chunks of equal size; None if none fits."""
        low, high = 0, min(at_most, self.most_rows) // _PANEL  # in panels; the bytes grow with the rows
        while low < high:
            middle = (low + high + 1) // 2
            if self.fits(self.candidate(schedule, middle * _PANEL, super_tiles)):
                low = middle
            else:
                high = middle - 1
        if not low:
            return None
        panels = -(-self.num_tokens // _PANEL)
        chunks = max(1, -(-panels // low))
        return self.candidate(schedule, max(1, -(-panels // chunks)) * _PANEL, super_tiles)

    def fits(self, plan: LinearKLPlan) -> bool:
        return plan.workspace_bytes <= self.budget

    @property
    def tile(self) -> int:
        return 256 if self.vocab_size >= 16384 else 128 if self.vocab_size >= 1024 else 64

    @property
    def num_tiles(self) -> int:
        return -(-self.vocab_size // self.tile)

    @property
    def most_rows(self) -> int:
        return max(_PANEL, min(_MAX_CHUNK, -(-self.num_tokens // _PANEL) * _PANEL))

    def candidate(self, schedule: str, chunk_rows: int, super_tiles: int) -> LinearKLPlan:
        """The plan with these numbers, fitting or not."""
        *parts, _ = torch.ops.minitron_kernels.linear_kl_loss_layout(
            self.num_tokens,
            self.vocab_size,
            self.student_hidden_size,
            self.teacher_hidden_size,
            {"bf16": 2, "f64": 8}.get(self.engine, 4),
            self.accumulate_bytes,
            self.grad_hidden,
            self.grad_head,
            self.head_in_place,
            schedule,
            chunk_rows,
            self.tile,
            super_tiles,
            self.threads,
        )
        looks = 1 + self.divergence_needs_kl  # at each logit, for sums
        logits = {"store": 1, "forward": looks, "recompute": looks + 1}[schedule]
        grads = self.grad_hidden + self.grad_head
        widths = (
            logits * (self.student_hidden_size + self.teacher_hidden_size) + grads * self.student_hidden_size
        )
        return LinearKLPlan(
            schedule,
            self.engine,
            self.num_tokens,
            self.vocab_size,
            self.student_hidden_size,
            self.teacher_hidden_size,
            num_gemms=2 * logits + grads,
            flops=2 * self.num_tokens * self.vocab_size * widths,
            chunk_rows=chunk_rows,
            tile=self.tile,
            super_tiles=super_tiles,
            budget_bytes=self.budget,
            part_bytes=tuple(parts),
        )
