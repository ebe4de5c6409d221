"""Plans linear_kl_loss on CUDA and ROCm: its schedule, the rows of a chunk, the entries of a tile.

    store      logits of the whole vocabulary for a chunk of rows at a time, turned into dz. The dz of many
               chunks, of all rows where the budget allows it, is kept: dX and dW are one GEMM each then.
               4 GEMMs.
    recompute  a tile of the vocabulary at a time: logits once for the sums, again for the gradient. 6 GEMMs
               (8 for JSD), memory that does not grow with the vocabulary.
    forward    no gradient needed: logits are reduced and dropped. 2 GEMMs (4 for JSD).

Of the plans within the budget it is the quickest by gpu_figures.py, or the smallest that is hardly slower.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from minitron_kernels.ops.kl_loss.budget import too_small
from minitron_kernels.ops.kl_loss.gpu_figures import FIGURES, GEMM_TILE, GpuFigures
from minitron_kernels.ops.kl_loss.plan import LinearKLPlan

_ALIGN = 64  # columns; rows of logits start at 128-byte borders
_PANEL = GEMM_TILE[0]
_MOST_ROWS = 4096  # of a chunk: more gain nothing
_TILES = (8192, 4096, 2048, 1024, 512, 256, 128)  # of the vocabulary, for recompute
_HARDLY_SLOWER = 1.005
_LOGIT = 4  # bytes


@dataclass(frozen=True, kw_only=True)
class GpuPlan(LinearKLPlan):
    """A plan for a GPU, and the time that it would take there: a prediction."""

    dz_rows: int  # whose dz is kept until one GEMM each makes their dX and adds to dW
    gpu: str
    phase_seconds: tuple[float, ...]

    PARTS = (
        "logits of a chunk, fp32",
        "dz",
        "head gradient of a tile, fp32",
        "hidden gradient, accumulated in fp32",
        "head gradient, accumulated in fp32",
    )
    PHASES = ("logits", "statistics and dz", "hidden gradient", "head gradient")

    @property
    def accumulator_bytes(self) -> int:
        """The fp32 gradients that wait for further parts: their size is the problem's, not the budget's.

        The hidden states' always, since sums over a vocabulary are not left to 16 bits. The head's where
        the dz of all rows do not fit, and it has no buffer of its own.
        """
        return sum(self.part_bytes[-2:])

    @property
    def predicted_seconds(self) -> float:
        """The time of the call on the GPU `gpu`: a prediction from rates, not a measurement."""
        return sum(self.phase_seconds)

    def _explain_kept(self) -> str:
        if self.schedule == "forward" or not self.num_tokens:
            return ""
        return f", dz of {self.dz_rows} rows kept for each hidden and head gradient's GEMM"

    def _explain_more(self) -> list[str]:
        lines = [f"{self.predicted_seconds * 1e3:9.2f} ms   predicted for an {self.gpu}, not measured"]
        lines += [
            f"{seconds * 1e3:9.2f} ms   {name}"
            for name, seconds in zip(self.PHASES, self.phase_seconds, strict=True)
            if seconds
        ]
        return lines


@dataclass(frozen=True)
class GpuProblem:
    """What a plan depends on besides the budget."""

    num_tokens: int
    vocab_size: int
    student_hidden_size: int
    teacher_hidden_size: int  # 0 for a sparse teacher, which has no logits
    itemsize: int = 2  # of the student's operands, and so of dz
    teacher_itemsize: int = 2
    grad_hidden: bool = True
    grad_head: bool = True
    grad_bias: bool = False
    # which gradients have an fp32 sum beside them; the head's where several products are added, or always
    hidden_sum: bool = True
    head_sum: bool = False
    head_sum_of_parts: bool = True
    spare_columns: int = 0  # behind those of a tile, in the buffers of logits and dz
    stats_first: bool = False  # statistics of all rows before the first dz
    stats_known: bool = False
    looks: int = 1  # at each logit for the statistics; 2 for JSD
    ranks: int = 1  # that share the vocabulary; vocab_size is the largest of their parts
    gpu: GpuFigures = FIGURES["H100"]

    @property
    def models(self) -> int:
        """Whose logits are made: the student, and a teacher with a head."""
        return 1 + (self.teacher_hidden_size > 0)

    @property
    def entry_bytes(self) -> int:
        """The fp32 logits of an entry of the vocabulary, those of all models."""
        return _LOGIT * self.models

    def logit_buffers(self, schedule: str, chunk_rows: int, dz_rows: int) -> int:
        """Store has two chunks of logits where ranks exchange their statistics: one waits for them."""
        exchanged = self.ranks > 1 and schedule == "store" and not (self.stats_known or self.stats_first)
        return 2 if exchanged and chunk_rows < dz_rows else 1

    def head_sum_beside(self, parts: int) -> bool:
        """Whether the head's gradient has an fp32 sum beside it, where it is made of so many products."""
        return self.grad_head and (self.head_sum or (parts > 1 and self.head_sum_of_parts))


def plan(problem: GpuProblem, schedule: str, budget: int) -> GpuPlan:
    """The plan of a call.

    Args:
        problem: its sizes and dtypes.
        schedule: "auto", "store" or "recompute"; not looked at where no gradient is needed.
        budget: bounds logits, dz and the head's gradient of a tile, in bytes. fp32 sums of whole gradients,
            O(N H) and O(V H), are the problem's and not the budget's.

    Raises:
        ValueError: the budget is too small; says the least that would do.
    """
    needs_grad = problem.grad_hidden or problem.grad_head or problem.grad_bias
    return _plan(problem, schedule if needs_grad else "forward", budget)


@functools.lru_cache(maxsize=256)
def _plan(problem: GpuProblem, schedule: str, budget: int) -> GpuPlan:
    planner = _Planner(problem, budget)
    wanted = ("store", "recompute") if schedule == "auto" else (schedule,)
    plans: list[GpuPlan] = []
    for name in wanted:
        if not plans or planner.least_seconds(name) < min(plan.predicted_seconds for plan in plans):
            plans += [plan for plan in planner.candidates(name) if plan.workspace_bytes <= budget]
    if not plans:
        least = min(map(planner.smallest, wanted), key=lambda plan: plan.workspace_bytes)
        raise too_small(budget, least.workspace_bytes, least.schedule, problem.vocab_size)
    quickest = min(plan.predicted_seconds for plan in plans)
    good = [plan for plan in plans if plan.predicted_seconds <= _HARDLY_SLOWER * quickest]
    return min(good, key=lambda plan: (plan.total_bytes, plan.predicted_seconds))


def padded(columns: int) -> int:
    """From row to row of scratch memory, in columns."""
    return -(-columns // _ALIGN) * _ALIGN


def sum_has_memory(out: torch.dtype, kind: torch.dtype, parts: int, adds: bool, rounds: bool) -> bool:
    """Whether the sum of `parts` products of dtype `kind` needs fp32 memory beside `out`.

    Args:
        out: dtype of the gradient.
        kind: dtype of the products' operands.
        parts: how many products are added.
        adds: whether `out` already holds a sum.
        rounds: whether a single product may be rounded to the dtype of `out` by its GEMM.
    """
    if out == torch.float32:
        return adds and kind == torch.float16  # whose products are scaled, unlike what they are added to
    return not (rounds and out == kind and parts == 1)


def sums_with_memory(
    hidden: torch.dtype, head: torch.dtype, kind: torch.dtype, adds: bool
) -> dict[str, bool]:
    """The fields of GpuProblem that say which gradients of these dtypes have an fp32 sum beside them.

    The hidden states' is never rounded by a GEMM: its sum is over the vocabulary, and a few bytes a row.
    """
    return {
        "hidden_sum": sum_has_memory(hidden, kind, 1, False, False),
        "head_sum": sum_has_memory(head, kind, 1, adds, True),
        "head_sum_of_parts": sum_has_memory(head, kind, 2, adds, True),
    }


@dataclass(frozen=True)
class _Planner:
    """A problem and a budget, and the plans that may suit them."""

    problem: GpuProblem
    budget: int

    def candidates(self, schedule: str) -> Iterator[GpuPlan]:
        p = self.problem
        tiles: Iterable[int] = (p.vocab_size,)
        if schedule != "store":
            tiles = sorted({min(tile, p.vocab_size) for tile in _TILES})
        for tile in tiles:
            for dz_rows in self.row_counts(tile, schedule):
                for chunk_rows in self.chunk_sizes(tile, dz_rows, schedule):
                    yield self.candidate(schedule, tile, dz_rows, chunk_rows)

    def row_counts(self, tile: int, schedule: str) -> list[int]:
        """Rows whose dz is kept: the most that the budget allows beside a chunk's logits, in equal parts."""
        if schedule == "forward" or self.problem.num_tokens == 0:
            return [self.problem.num_tokens]
        width = padded(tile + self.problem.spare_columns)
        counts = set()
        logits = self.problem.entry_bytes * width
        most = self.problem.logit_buffers(schedule, 0, 1)
        for buffers in range(1, most + 1):
            for chunk in (1, *(_PANEL << shift for shift in range(5))):
                room = self.budget - self.tile_bytes(schedule, tile) - buffers * logits * chunk
                rows = min(self.problem.num_tokens, room // (self.problem.itemsize * width))
                if buffers < most:  # one buffer is enough for one chunk
                    rows = min(rows, chunk)
                if rows >= 1:
                    counts.add(_even(self.problem.num_tokens, rows))
        return sorted(counts)

    def chunk_sizes(self, tile: int, dz_rows: int, schedule: str) -> list[int]:
        """Rows of a chunk: whole panels up to what the budget leaves, or the few rows that it leaves."""
        width = padded(tile + self.problem.spare_columns)
        kept = 0 if schedule == "forward" else self.problem.itemsize * width * dz_rows
        room = self.budget - kept - self.tile_bytes(schedule, tile)
        rows, logits = max(dz_rows, 1), self.problem.entry_bytes * width
        buffers = self.problem.logit_buffers(schedule, 0, 1)
        sizes = {rows} if buffers > 1 and rows <= min(_MOST_ROWS, room // logits) else set()
        most = min(rows, _MOST_ROWS, room // (buffers * logits))
        if most >= 1:
            sizes |= {*range(_PANEL, most + 1, _PANEL), _even(rows, most)}
        return sorted(sizes)

    def smallest(self, schedule: str) -> GpuPlan:
        tile = self.problem.vocab_size if schedule == "store" else min(_TILES[-1], self.problem.vocab_size)
        return self.candidate(schedule, tile, 1, 1)

    def tile_bytes(self, schedule: str, tile: int) -> int:
        """Of a tile's head gradient in fp32, while parts of the rows add to it; at most."""
        p = self.problem
        own = schedule == "recompute" and p.grad_head and p.head_sum_of_parts
        return 4 * tile * p.student_hidden_size if own else 0

    def candidate(self, schedule: str, tile: int, dz_rows: int, chunk_rows: int) -> GpuPlan:
        """The plan with these numbers, fitting or not."""
        p, width = self.problem, padded(tile + self.problem.spare_columns)
        grads = schedule != "forward"
        parts = -(-p.num_tokens // max(1, dz_rows))
        tiles = -(-p.vocab_size // max(1, tile))
        # of a sum over several tiles all rows wait; over one, those that are at work
        waiting_rows = p.num_tokens if tiles > 1 or p.ranks > 1 else dz_rows
        hidden_sum = grads and p.grad_hidden and p.hidden_sum
        head_sum_bytes = 4 * tile * p.student_hidden_size * (grads and p.head_sum_beside(parts))
        part_bytes = (
            p.entry_bytes * chunk_rows * width * p.logit_buffers(schedule, chunk_rows, dz_rows),
            p.itemsize * dz_rows * width * grads,
            head_sum_bytes if schedule == "recompute" else 0,
            4 * waiting_rows * p.student_hidden_size * hidden_sum,
            head_sum_bytes if schedule == "store" else 0,
        )
        logits = self.passes(schedule)
        heads = p.student_hidden_size + p.teacher_hidden_size
        widths = logits * heads + grads * (p.grad_hidden + p.grad_head) * p.student_hidden_size
        return GpuPlan(
            schedule=schedule,
            num_tokens=p.num_tokens,
            vocab_size=p.vocab_size,
            student_hidden_size=p.student_hidden_size,
            teacher_hidden_size=p.teacher_hidden_size,
            num_gemms=p.models * logits + grads * (p.grad_hidden + p.grad_head),
            flops=2 * p.num_tokens * p.vocab_size * widths,
            chunk_rows=chunk_rows,
            tile=tile,
            budget_bytes=self.budget,
            part_bytes=part_bytes,
            dz_rows=dz_rows if grads else 0,
            gpu=p.gpu.name,
            phase_seconds=self.seconds(schedule, tile, dz_rows, chunk_rows),
        )

    def least_seconds(self, schedule: str) -> float:
        """No plan of this schedule is quicker."""
        p = self.problem
        rows = max(1, p.num_tokens)
        return self.candidate(schedule, p.vocab_size, rows, rows).flops / p.gpu.gemm_rate(p.itemsize)

    def passes(self, schedule: str) -> int:
        """How often the logits are made."""
        p = self.problem
        if schedule == "forward":
            return p.looks
        first = schedule == "recompute" or p.stats_first
        return 1 + (p.looks if first and not p.stats_known else 0)

    def seconds(self, schedule: str, tile: int, dz_rows: int, chunk_rows: int) -> tuple[float, ...]:
        """Predicted, of each of GpuPlan.PHASES."""
        p, gpu = self.problem, self.problem.gpu
        N, V, H = p.num_tokens, p.vocab_size, p.student_hidden_size
        if N == 0:
            return (0.0,) * 4
        kept, chunks = list(_parts(N, dz_rows)), []
        for rows, count in kept:
            chunks += [(size, count * many) for size, many in _parts(rows, chunk_rows)]
        tiles = list(_parts(V, tile))
        logits = sum(
            many * count * gpu.gemm_seconds(rows, columns, width, itemsize, 4)
            for rows, many in chunks
            for columns, count in tiles
            for width, itemsize in ((H, p.itemsize), (p.teacher_hidden_size, p.teacher_itemsize))
            if width
        )
        logits *= self.passes(schedule)
        hidden = head = 0.0
        if schedule != "forward":
            for rows, many in kept:
                for columns, count in tiles:
                    hidden += many * count * gpu.gemm_seconds(rows, H, columns, p.itemsize, 4)
                    head += many * count * gpu.gemm_seconds(columns, H, rows, p.itemsize, 4)
            # what the GEMMs do not hide: sums that are read and written again, and rounded at the end
            again = 8 * N * H * (_count(tiles) - 1)
            hidden += gpu.traffic_seconds(again + 6 * N * H * p.hidden_sum)
            parts = _count(kept)
            head += gpu.traffic_seconds(8 * V * H * (parts - 1) + 6 * V * H * p.head_sum_beside(parts))
        return (
            logits,
            self.epilogue_seconds(schedule),
            hidden * p.grad_hidden,
            head * p.grad_head,
        )

    def epilogue_seconds(self, schedule: str) -> float:
        p, gpu = self.problem, self.problem.gpu
        pairs = p.num_tokens * p.vocab_size
        looks = p.entry_bytes * p.looks * pairs  # of the statistics
        grad = (p.entry_bytes + p.itemsize) * pairs
        if schedule == "forward":
            return gpu.traffic_seconds(looks)
        bias = 2 * p.grad_bias * p.itemsize * pairs
        if p.stats_known:
            return gpu.traffic_seconds(grad + bias)
        one_look = schedule == "store" and not p.stats_first and p.models == 2 and p.ranks == 1
        if one_look and gpu.clusters:
            # a row is read once from memory, and for all that follows out of L2
            return gpu.traffic_seconds(grad + bias, out_of_l2=looks)
        return gpu.traffic_seconds(looks + grad + bias)


def _parts(total: int, size: int) -> list[tuple[int, int]]:
    """(size, how many) of the parts of `total`: whole ones, and what is left."""
    whole, rest = divmod(total, max(1, size))
    return [(s, n) for s, n in ((size, whole), (rest, 1)) if s and n]


def _count(parts: list[tuple[int, int]]) -> int:
    """How many parts _parts() has found."""
    return sum(many for _, many in parts)


def _even(total: int, most: int) -> int:
    """The size of equal chunks of at most `most`, in whole panels where that fits."""
    chunks = -(-total // most)
    size = -(-total // chunks)
    return min(-(-size // _PANEL) * _PANEL, most)
