"""A vocabulary that is spread over the ranks of a group: who has which tokens, and what the ranks exchange.

Each rank has the rows of both heads of a range of the vocabulary, and looks at all tokens. What it knows of a
token from its range alone (its state) merges with what the others know by the chain rule of KL, as tiles of a
vocabulary do. So a call is this, in the same order on all ranks:

    1 all-gather of 8 int64      how each rank calls: find_shard()
    2 all-gathers                of both hidden states, with sequence parallelism
    1 all-gather a chunk         of the states of its tokens: 5 numbers each (fp32; float64 for float64)
    1 all-gather a chunk         JSD alone: 2 numbers a token, of its second look
    1 all-reduce                 of the gradient to the hidden states, fp32; reduce-scattered with sequence
                                 parallelism

States are gathered and not reduced: one collective does for maxima, sums and KL, and all ranks merge the same
numbers in the order of their ranks, so that the loss is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_kernels.ops.kl_loss.checks import integer, refuse

# where the size of the whole vocabulary comes with find_shard(), and check_labels() after it
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


def group_of(name: str) -> dist.ProcessGroup:
    """The group that Parallel names."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def group_size(name: str) -> int:
    """Ranks of a group."""
    return group_of(name).size()
