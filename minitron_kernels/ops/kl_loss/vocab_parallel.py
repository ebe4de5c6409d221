"""A vocabulary that is spread over the ranks of a group: who has which tokens, and what the ranks exchange.

Each rank has the rows of both heads of a range of the vocabulary, and looks at all tokens. What it knows of a
token from its range alone (its state) merges with what the others know by the chain rule of KL, as tiles of a
vocabulary do. So a call is this, in the same order on all ranks:

    1 all-gather of 8 int64      how each rank calls
    2 all-gathers                of both hidden states, with sequence parallelism
    1 all-gather a chunk         of the states of its tokens: 5 numbers each (fp32; float64 for float64)
    1 all-gather a chunk         JSD alone: 2 numbers a token, of its second look
    1 all-reduce                 of the gradient to the hidden states, fp32; reduce-scattered with sequence
                                 parallelism

States are gathered and not reduced: one collective does for maxima, sums and KL, and all ranks merge the same
numbers in the order of their ranks, so that the loss is the same to the bit.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_kernels.ops.kl_loss.checks import integer, refuse

# where the size of the whole vocabulary comes with the ranks' exchange, and check_labels() after it
LABELS_CHECKED_LATER = (2**62, 2**62)

# torch 2.13 renamed them
_all_gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_reduce_scatter = (
    "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
)


class Parallel(NamedTuple):
    """What the caller says of the group; arguments of an op."""

    group: str | None = None  # its name; None for a vocabulary in one piece
    sequence_parallel: bool = False
    vocab_range: Sequence[int] = ()  # of this rank, if it is given

    @staticmethod
    def of(tp_group: Any, sequence_parallel: bool, vocab_range: Any) -> Parallel:
        """Checks the arguments of linear_kl_loss()."""
        if tp_group is None:
            for name, value in (("sequence_parallel", sequence_parallel), ("vocab_range", vocab_range)):
                if value:
                    raise ValueError(f"{name}={value} needs tp_group, the ranks that share the vocabulary")
            return Parallel()
        if not (dist.is_available() and isinstance(tp_group, dist.ProcessGroup)):
            raise TypeError(
                "tp_group must be a torch.distributed ProcessGroup that this rank belongs to, got "
                f"{type(tp_group).__name__}"
            )
        limits: tuple[int, ...] = ()
        if vocab_range is not None:
            if not isinstance(vocab_range, (tuple, list)) or len(vocab_range) != 2:
                raise TypeError(f"vocab_range must be (start, end), got {vocab_range!r}")
            limits = tuple(integer("vocab_range", value) for value in vocab_range)
            if not 0 <= limits[0] <= limits[1]:
                raise ValueError(f"vocab_range must be (start, end), 0 <= start <= end; got {vocab_range}")
        return Parallel(tp_group.group_name, bool(sequence_parallel), limits)

    @staticmethod
    def sizes(
        tp_group: dist.ProcessGroup, sequence_parallel: bool, vocab_size: int | None, shape: torch.Size
    ) -> tuple[int, torch.Size]:
        """The number of tokens of the whole vocabulary, 0 if not known here; and the shape of all tokens.

        What the ranks have together is checked where they exchange it; labels then, too.
        """
        if vocab_size is not None:
            vocab_size = integer("vocab_size", vocab_size)
            if vocab_size < 1:
                refuse("vocab_size", "at least 1", vocab_size)
        if sequence_parallel:
            if not shape:
                raise ValueError(
                    "sequence_parallel=True cuts the tokens along their first dimension: hidden states must "
                    "be [..., H] with at least one dimension of tokens, got [H]"
                )
            shape = torch.Size((shape[0] * tp_group.size(), *shape[1:]))
        return vocab_size or 0, shape


class Gathered:
    """What all ranks know, [R, F, n], on its way while this rank works on.

    On a GPU the collective runs on a stream of its own, behind what is queued on the current one. wait()
    makes the current stream, not the host, wait for it. Until then both buffers are held here: torch's
    allocator would otherwise give their memory to work that does not wait. Afterwards they may be freed and
    written like any others of the current stream.
    """

    def __init__(self, part: Tensor, group: dist.ProcessGroup) -> None:
        self._part, self._ranks = part, group.size()
        self._parts = part.new_empty((self._ranks * part.shape[0], *part.shape[1:]))
        self._work = None
        if part.numel():
            self._work = getattr(dist, _all_gather)(self._parts, part, group=group, async_op=True)

    def wait(self) -> Tensor:
        """The parts by rank, to be read by what is queued from now on."""
        if self._work is not None:
            self._work.wait()
        return self._parts.view(self._ranks, *self._part.shape)


@dataclass(frozen=True)
class Shard:
    """This rank's range of the vocabulary."""

    group: dist.ProcessGroup
    start: int
    widths: tuple[int, ...]  # by rank
    sequence_parallel: bool = False

    @property
    def width(self) -> int:
        """Tokens of this rank."""
        return self.widths[self.group.rank()]

    @property
    def widest(self) -> int:
        """The most tokens of a rank: by them all ranks plan alike."""
        return max(self.widths)

    @property
    def total_vocab(self) -> int:
        """Tokens of all ranks."""
        return sum(self.widths)

    def gather(self, part: Tensor) -> Gathered:
        """What all ranks have in the place of `part`, [F, n] -> [R, F, n]."""
        return Gathered(part.contiguous(), self.group)

    def all_tokens(self, hidden: Tensor) -> Tensor:
        """The hidden states of all tokens."""
        return self.gather(hidden).wait().flatten(0, 1) if self.sequence_parallel else hidden

    def own_labels(self, labels: Tensor | None) -> Tensor | None:
        """Labels as columns of this rank's logits; `width`, which is none of them, for those of others."""
        if labels is None:
            return None
        own = labels - self.start
        others = (labels >= 0) & ((own < 0) | (own >= self.width))
        return torch.where(labels < 0, labels, own.masked_fill(others, self.width))


class HiddenSum:
    """The gradient to the hidden states, summed over the ranks: in fp32, so that it is rounded once.

    `partial` [N, H] is for this rank's part. start() may be called as soon as it is there; finish() does the
    rest. For memory and streams see Gathered.
    """

    def __init__(self, out: Tensor, dtype: torch.dtype, shard: Shard) -> None:
        self._out, self._shard = out, shard
        rows = out.shape[0] * (shard.group.size() if shard.sequence_parallel else 1)
        self.in_place = out.dtype == dtype and not shard.sequence_parallel
        self.partial = out if self.in_place else out.new_empty((rows, out.shape[1]), dtype=dtype)
        self._total = self.partial
        self._work: dist.Work | None = None

    def start(self) -> None:
        """Lets it go; nobody may write into `partial` from then on."""
        if self._out.numel() == 0:
            return
        group = self._shard.group
        if self._shard.sequence_parallel:
            self._total = self.partial.new_empty(self._out.shape)
            scatter = getattr(dist, _reduce_scatter)
            self._work = scatter(self._total, self.partial, group=group, async_op=True)
        else:
            self._work = dist.all_reduce(self.partial, group=group, async_op=True)

    def finish(self) -> None:
        """Writes what the sum is for."""
        if self._work is None:
            self.start()
        if self._work is not None:
            self._work.wait()
        if self._total is not self._out:
            self._out.copy_(self._total)


def _group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def group_size(name: str) -> int:
    """Ranks of a group."""
    return _group(name).size()


# ---- how each rank calls


class _Call(NamedTuple):
    student_rows: int
    teacher_rows: int
    vocab_size: int  # 0 where it is not given
    range_start: int  # -1, -1 where they are not given
    range_end: int
    tokens: int  # that this rank brings
    asked: int  # which gradients and what else, as one number
    workspace_bytes: int


_HEADS = 5  # the first fields: those that a cache is found by

# Of each group, the heads' fields of all ranks by those of this one; and calls as they are expected.
_heads: weakref.WeakKeyDictionary[Any, dict[Any, list[Sequence[int]]]] = weakref.WeakKeyDictionary()
_expected: weakref.WeakKeyDictionary[Any, dict[Any, tuple[Tensor, Tensor]]] = weakref.WeakKeyDictionary()
_MOST_CALLS = 256


def find_shard(
    parallel: Parallel,
    student_rows: int,
    teacher_rows: int,
    vocab_size: int,
    tokens: int,
    asked: Sequence[bool | str],
    workspace_bytes: int,
    device: torch.device,
    waits: bool | None = None,
) -> Shard:
    """This rank's shard, after every rank has said how it calls: one all-gather of 64 bytes.

    On the CPU what the others say is read. On a GPU that would wait for the device: there it is read the
    first time that the heads have these sizes, and compared on the device from then on.

    Args:
        parallel: of a group that is not None.
        student_rows: of this rank's heads, padding included.
        teacher_rows: likewise.
        vocab_size: tokens of the whole vocabulary, 0 where it is not given.
        tokens: rows of this rank's hidden states.
        asked: what must be the same on all ranks.
        workspace_bytes: likewise.
        device: of the tensors.
        waits: whether the host reads; None for what suits the device.

    Raises:
        ValueError: the ranks' heads, ranges, tokens or requests do not fit each other; on every rank.
    """
    assert parallel.group is not None
    group = _group(parallel.group)
    start, end = parallel.vocab_range or (-1, -1)
    mine = _Call(
        student_rows, teacher_rows, vocab_size, start, end, tokens, _number(asked, parallel), workspace_bytes
    )
    known = None
    if not (device.type == "cpu" if waits is None else waits):
        known = _heads.setdefault(group, {}).get(mine[:_HEADS])
    if known is None:
        gathered = _exchange(torch.tensor([mine], dtype=torch.int64, device=device), group)
        calls = [_Call(*numbers) for numbers in gathered.tolist()]
        _check_alike(calls)
        _heads.setdefault(group, {})[mine[:_HEADS]] = known = [call[:_HEADS] for call in calls]
    else:
        own, expected = _as_expected(group, mine, known, device)
        torch._assert_async(
            (_exchange(own, group) == expected).all(),
            "the ranks of tp_group call linear_kl_loss with different tokens, requests or heads",
        )
    ranges = ranges_of([_Call._make((*numbers, 0, 0, 0)) for numbers in known])
    widths = tuple(len(r) for r in ranges)
    return Shard(group, ranges[group.rank()].start, widths, parallel.sequence_parallel)


def _number(asked: Sequence[bool | str], parallel: Parallel) -> int:
    """The same on all ranks that ask for the same, and hardly ever where they do not."""
    return zlib.crc32(repr((*asked, parallel.sequence_parallel)).encode())


def _exchange(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    return Gathered(mine, group).wait().flatten(0, 1)


def _as_expected(
    group: dist.ProcessGroup, mine: _Call, known: list[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """This rank's call and those of all, on the device; made once, since a CUDA graph cannot copy them."""
    made = _expected.setdefault(group, {})
    key = (mine, str(device))
    if key not in made:
        if len(made) >= _MOST_CALLS:
            made.clear()
        rows = [mine, *((*heads, *mine[_HEADS:]) for heads in known)]
        numbers = torch.tensor(rows, dtype=torch.int64, device=device)
        made[key] = numbers[:1], numbers[1:]
    return made[key]


def _check_alike(calls: list[_Call]) -> None:
    for name, what in (
        ("tokens", "bring the same number of tokens (pad those of sequence parallelism)"),
        ("asked", "want the same gradients, schedule, reduction and metrics"),
        ("workspace_bytes", "have the same workspace_bytes"),
        ("vocab_size", "say the same vocab_size"),
    ):
        values = [getattr(call, name) for call in calls]
        if len(set(values)) > 1:
            raise ValueError(f"all ranks of tp_group must {what}; by rank: {values}")


def ranges_of(calls: list[_Call]) -> list[range]:
    """The tokens of each rank; a ValueError if they do not fit each other."""
    given = [call.range_start >= 0 for call in calls]
    vocab_size = calls[0].vocab_size
    if any(given):
        if not all(given):
            raise ValueError(f"vocab_range must be given on all ranks of tp_group or on none; given: {given}")
        ranges = [range(call.range_start, call.range_end) for call in calls]
        ends = [0, *(r.stop for r in ranges)]
        wrong = any(r.start != end for r, end in zip(ranges, ends, strict=False))
        if wrong or (vocab_size and ends[-1] != vocab_size):
            raise ValueError(
                "the vocab_range of the ranks must follow each other from 0 to vocab_size"
                f"{f' = {vocab_size}' if vocab_size else ''}, got {_text(ranges)}"
            )
        for rank, (r, call) in enumerate(zip(ranges, calls, strict=True)):
            for name, rows in (("student_head", call.student_rows), ("teacher_head", call.teacher_rows)):
                if len(r) > rows:
                    raise ValueError(
                        f"rank {rank} has vocab_range {_text([r])}, that is {len(r)} tokens, but {rows} rows "
                        f"of {name}"
                    )
        return ranges
    student, teacher = ([getattr(call, f"{side}_rows") for call in calls] for side in ("student", "teacher"))
    if not vocab_size:
        vocab_size = sum(student)
        if vocab_size != sum(teacher):
            raise ValueError(
                f"the shards of student and teacher have {sum(student)} and {sum(teacher)} tokens in all: "
                "pass vocab_size=, the number of tokens that both share (rows beyond it count as padding)"
            )
    elif vocab_size > min(sum(student), sum(teacher)):
        raise ValueError(
            f"vocab_size must be from 1 to {min(sum(student), sum(teacher))}, which the shards of student "
            f"and teacher have in all; got {vocab_size}"
        )
    ranges, of_teacher = (_cut(rows, vocab_size) for rows in (student, teacher))
    for rank, (r, other) in enumerate(zip(ranges, of_teacher, strict=True)):
        if r != other and (r or other):
            raise ValueError(
                f"rank {rank} has the student's tokens {_text([r])} and the teacher's {_text([other])}: both "
                "heads must be cut alike. Where shards have padding inside, pass vocab_range=(start, end)"
            )
    return ranges


def _cut(rows: list[int], vocab_size: int) -> list[range]:
    """The tokens of each rank where padding is behind all of them."""
    begin, ranges = 0, []
    for count in rows:
        ranges.append(range(min(begin, vocab_size), min(begin + count, vocab_size)))
        begin += count
    return ranges


def _text(ranges: list[range]) -> str:
    return ", ".join(f"[{r.start}, {r.stop})" for r in ranges)


def check_labels(labels: Tensor | None, vocab_size: int) -> None:
    """Labels, -1 where there is none, are tokens; on a GPU the device raises the error."""
    if labels is None:
        return
    wrong = labels >= vocab_size
    if labels.device.type != "cpu":
        torch._assert_async(~wrong.any())
    elif wrong.any():
        position = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"labels must be ignore_index or in [0, {vocab_size}), got {int(labels[position])} at position "
            f"{position}"
        )
