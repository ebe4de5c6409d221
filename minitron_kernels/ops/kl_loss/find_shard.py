"""How each rank of a group calls linear_kl_loss, and which tokens of the vocabulary are whose."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_kernels.ops.kl_loss.vocab_parallel import Gathered, Parallel, Shard, group_of


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
    group = group_of(parallel.group)
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
