"""Plans linear_kl_loss on the CPU: which schedule, how many rows at a time, and what memory that takes.

    store      for a chunk of rows: both logits of the whole vocabulary are kept, then turned into gradients.
               4 GEMMs. Several chunks add their head gradients in fp32.
    recompute  a stretch of the vocabulary at a time: logits once for the sums, again for the gradient. 6 GEMMs
               (8 for JSD), memory that does not grow with the vocabulary.
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
        "hidden gradient, fp32",
        "head gradient, fp32",
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
            f"schedule   {self.schedule}: {self.num_gemms} GEMMs, {self.flops / 1e9:.1f} Gflop, operands {self.engine}",
            f"rows       {self.num_chunks} chunk(s) of {self.chunk_rows}",
            f"vocabulary tiles of {self.tile}"
            + (f", {self.super_tiles} at a time" if self.schedule == "recompute" else ""),
        ]
        for name, nbytes in zip(self.PARTS, self.part_bytes, strict=True):
            if nbytes:
                lines.append(f"{mib(nbytes)}  {name}")
        lines.append(f"{mib(self.total_bytes)}  in all, kept between calls (release_workspaces() frees it)")
        lines.append(f"{mib(self.workspace_bytes)}  of it counts towards workspace_bytes = {self.budget_bytes}")
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
    masked: bool = False,
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
        masked: whether some rows of the tensors do not count; a float32 grad_hidden then needs a copy without them.
        divergence_needs_kl: JSD with 0 < beta < 1, which looks at the logits once more.
        schedule: "auto", "store" or "recompute".
        workspace_bytes: budget in bytes, 512 MiB by default. It bounds all that the call allocates beyond inputs
            and outputs, but for the fp32 accumulators of gradients (accumulator_bytes).
        engine: "bf16", "f32", "f64" or "portable" operands; what runs fastest here by default.

    Returns:
        The plan.

    Raises:
        ValueError: an unknown schedule, or a budget too small for any: says the least that would do.
        RuntimeError: the extension is not built.
    """
    if not _native.available():
        raise RuntimeError(f"linear_kl_loss has nothing to plan without the C++ extension: {_native.reason()}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}")
    budget = DEFAULT_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
    engine = engine or operand_type(dtype, teacher_dtype or dtype)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    threads = torch.get_num_threads()
    tile = 256 if vocab_size >= 16384 else 128 if vocab_size >= 1024 else 64
    num_tiles = -(-vocab_size // tile)
    has_grad = grad_hidden or grad_head or grad_bias

    def gemms(name: str) -> int:
        looks = 1 + divergence_needs_kl
        logits = {"store": 1, "forward": looks, "recompute": looks + 1}[name]
        return 2 * logits + grad_hidden + grad_head

    def flops(name: str) -> int:
        logits = (gemms(name) - grad_hidden - grad_head) // 2 * (student_hidden_size + teacher_hidden_size)
        return 2 * num_tokens * vocab_size * (logits + (grad_hidden + grad_head) * student_hidden_size)

    def candidate(name: str, chunk_rows: int, super_tiles: int) -> LinearKLPlan:
        *parts, total = torch.ops.minitron_kernels.linear_kl_loss_layout(
            num_tokens,
            vocab_size,
            student_hidden_size,
            teacher_hidden_size,
            {"bf16": 2, "f64": 8}.get(engine, 4),
            accumulate.itemsize,
            grad_hidden,
            grad_head,
            grad_head_accumulator or dtype == accumulate,
            dtype == accumulate and not masked,
            name,
            chunk_rows,
            tile,
            super_tiles,
            threads,
        )
        plan = LinearKLPlan(
            name,
            engine,
            num_tokens,
            vocab_size,
            student_hidden_size,
            teacher_hidden_size,
            gemms(name),
            flops(name),
            chunk_rows,
            tile,
            super_tiles,
            budget,
            tuple(parts),
        )
        assert plan.total_bytes == total  # the layout's parts are all there is
        return plan

    def fits(plan: LinearKLPlan) -> bool:
        return plan.workspace_bytes <= budget

    def balanced(rows: int) -> int:
        """As many chunks as `rows` gives, of equal size in whole panels."""
        chunks = -(-num_tokens // rows)
        return max(_PANEL, -(-num_tokens // chunks // _PANEL) * _PANEL) if chunks else _PANEL

    most_rows = max(_PANEL, min(_MAX_CHUNK, -(-num_tokens // _PANEL) * _PANEL))

    def largest(name: str, super_tiles: int, at_most: int = most_rows) -> LinearKLPlan | None:
        low, high = 0, at_most // _PANEL  # in panels; the bytes grow with the rows
        while low < high:
            middle = (low + high + 1) // 2
            if fits(candidate(name, middle * _PANEL, super_tiles)):
                low = middle
            else:
                high = middle - 1
        return candidate(name, balanced(low * _PANEL), super_tiles) if low else None

    def stored() -> LinearKLPlan | None:
        return largest("store", 1)

    def recomputed() -> LinearKLPlan | None:
        # Long stretches spread the repacking of hidden states; all rows in one chunk need no repacking at all.
        stretches = [n for n in (max(16, 2 * threads), 8, 4, 2, 1) if n <= max(num_tiles, 1)]
        for super_tiles in stretches:
            plan = candidate("recompute", most_rows, super_tiles)
            if plan.num_chunks <= 1 and super_tiles >= min(4, num_tiles) and fits(plan):
                return plan
        for super_tiles in stretches:
            plan = largest("recompute", super_tiles, min(most_rows, 512))
            if plan is not None and (plan.chunk_rows >= min(256, most_rows) or super_tiles == stretches[-1]):
                return plan
        return None

    if not has_grad:
        plan, smallest = largest("forward", 1, min(most_rows, 1024)), [candidate("forward", _PANEL, 1)]
    elif schedule == "store":
        plan, smallest = stored(), [candidate("store", _PANEL, 1)]
    elif schedule == "recompute":
        plan, smallest = recomputed(), [candidate("recompute", _PANEL, 1)]
    else:
        plan = stored()
        if plan is None or plan.chunk_rows < min(_MIN_STORE_ROWS, most_rows):
            plan = recomputed() or plan
        smallest = [candidate("store", _PANEL, 1), candidate("recompute", _PANEL, 1)]
    if plan is None:
        least = min(smallest, key=lambda p: p.workspace_bytes)
        raise ValueError(
            f"workspace_bytes={budget} is too small: the least that would do is {least.workspace_bytes} "
            f"(schedule={least.schedule!r}, {num_tokens} tokens, vocabulary {vocab_size}, {threads} threads)"
        )
    return plan
