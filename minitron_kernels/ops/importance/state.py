"""What calibration has gathered so far: small sums, which can be added over batches and ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from minitron_kernels import _native
from minitron_kernels.ops.importance.moments import MOMENT_OF, Moments, num_moments
from minitron_kernels.ops.importance.sums import Sums

BATCH_AGGREGATIONS = ("L2", "mean", "var")


class ImportanceState(Sums):
    """Moments, over the calibration sequences, of the activations of one axis: C channels (or heads).

    With a[b, c] the sequence aggregation of sequence b, (1/n)Σ|x|, √Σx² or (1/n)Σ(x−x̄)² over its n tokens:

        sums[k, c] = Σ_b a[b, c],   squares[k, c] = Σ_b a[b, c]²        for the k-th aggregation in `seq`

    All nine (batch, seq) scores follow from these, and states add, so the split into batches, the number of
    data-parallel ranks and an interruption do not matter.

    Args:
        num_channels: C.
        seq: the sequence aggregations to collect, of "mean", "L2" and "var".
        groups: G, for one state of many layers or experts, C / G channels each; tokens are counted for each.
        device: where the sums are kept: the device of the activations.

    Attributes:
        sums: float64 [len(seq), C].
        squares: float64 [len(seq), C].
        sequences: int64 [], sequences that had at least one token; with `groups`, [G].
        tokens: int64 [], or [G].

    Raises:
        TypeError, ValueError: num_channels is not an int of at least 0, seq holds other names, or groups does
            not divide num_channels.

    Source: Minitron (arXiv 2407.14679) section 2.2.
    """

    _names = ("sums", "squares", "sequences", "tokens")

    def __init__(
        self,
        num_channels: int,
        *,
        seq: Sequence[str] = ("mean",),
        groups: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        _check_size("num_channels", num_channels)
        if groups is not None:
            _check_size("groups", groups)
            if num_channels % groups if groups else num_channels:
                raise ValueError(f"groups must divide the {num_channels} channels, got {groups}")
        seq = (seq,) if isinstance(seq, str) else tuple(seq)
        if not seq or len(set(seq)) != len(seq) or not set(seq) <= set(MOMENT_OF):
            raise ValueError(f"seq must be different names out of {', '.join(MOMENT_OF)}, got {seq!r}")
        self.seq = seq
        shape = (len(seq), num_channels)
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self.squares = torch.zeros(shape, dtype=torch.float64, device=device)
        counts = () if groups is None else (groups,)
        self.sequences = torch.zeros(counts, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(counts, dtype=torch.int64, device=device)

    @property
    def _kept(self) -> dict[str, Tensor]:
        return {"seq": torch.tensor([MOMENT_OF[name] for name in self.seq], device="cpu")}

    @property
    def num_channels(self) -> int:
        """C."""
        return self.sums.shape[1]

    @property
    def groups(self) -> int | None:
        """G; None where all channels see the same tokens."""
        return self.tokens.shape[0] if self.tokens.dim() else None

    @property
    def kinds(self) -> int:
        """The moments that the kernels have to add up: flags of reference.py."""
        return sum(MOMENT_OF[name] for name in self.seq)

    def add_(self, moments: Moments) -> ImportanceState:
        """Adds sequences by their moments (moments_of() with this state's `kinds`). Returns itself.

        Raises:
            ValueError: they are of other aggregations, channels or groups; nothing is added then.
        """
        self._check(moments)
        if self._is_native(moments):
            aggregations = [MOMENT_OF[name] for name in self.seq]
            torch.ops.minitron_kernels.importance_add_.default(
                *self._tensors().values(), *moments[:2], aggregations, moments.flags
            )
            return self
        for k, name in enumerate(self.seq):
            value = moments.aggregate(name)
            # += on an entry would also copy the sum to where it is
            self.sums[k].add_(value.sum(0))
            self.squares[k].add_(value.square_().sum(0))
        self.sequences += (moments.counts > 0).sum(0)
        self.tokens += moments.counts.sum(0)
        return self

    def _check(self, moments: Moments) -> None:
        """That they are this state's: torch would spread one channel, or one count, over all."""
        values, counts, flags = moments
        if self.kinds & ~flags:
            raise ValueError(f"moments.flags must have those of {', '.join(self.seq)}, got {flags}")
        C, sums = self.num_channels, num_moments(flags)
        if values.dim() != 3 or values.shape[0] != sums or values.shape[2] != C:
            raise ValueError(f"moments.values must be [{sums}, B, {C}], got {tuple(values.shape)}")
        of_all = counts.dim() == 1 or counts.shape[1:] == self.tokens.shape
        if (
            counts.dim() == 0
            or counts.shape[0] != values.shape[1]
            or not of_all
            or counts.is_floating_point()
        ):
            raise ValueError(
                f"moments.counts must be {[values.shape[1], *self.tokens.shape]} integers, one for each "
                f"sequence (and group), got {counts.dtype} {list(counts.shape)}"
            )

    def _is_native(self, moments: Moments) -> bool:
        """Whether one native call can add them, in place of seventeen of torch."""
        values, counts = moments.values, moments.counts
        return (
            not torch.compiler.is_compiling()  # which fuses them
            and values.device.type == self.sums.device.type == "cpu"
            and _native.available()
            and values.dtype in (torch.float32, torch.float64)
            and values.is_contiguous()
            and counts.dtype == torch.int64
            and counts.is_contiguous()
            and counts.shape[1:] == self.tokens.shape
        )

    def part(self, begin: int, end: int) -> ImportanceState:
        """The groups from `begin` to `end` as a state that shares memory with this one: what is added to it
        is added here.

        Raises:
            ValueError: the state has no groups, or not these.
        """
        if self.groups is None:
            raise ValueError("part() needs a state of groups: ImportanceState(..., groups=)")
        _check_part(begin, end, self.groups)
        size = self.num_channels // max(self.groups, 1)
        view = copy.copy(self)
        view.sums = self.sums[:, begin * size : end * size]
        view.squares = self.squares[:, begin * size : end * size]
        view.sequences, view.tokens = self.sequences[begin:end], self.tokens[begin:end]
        return view

    def scores(self, *, batch: str = "L2", seq: str = "mean") -> Tensor:
        """The importance of each channel, float64 [C]; zeros before any sequence was added.

        Args:
            batch: how sequences are aggregated: "L2" √Σa², "mean" (1/n)Σ|a|, "var" (1/n)Σ(a−ā)².
            seq: how tokens were aggregated; one of this state's. ("L2", "mean") is the paper's best for the
                width of a model.

        Raises:
            ValueError: `batch` or `seq` is not an aggregation, or `seq` was not collected.
        """
        if batch not in BATCH_AGGREGATIONS:
            raise ValueError(f"batch must be one of {', '.join(BATCH_AGGREGATIONS)}; got {batch!r}")
        if seq not in self.seq:
            raise ValueError(
                f"seq must be one that was collected ({', '.join(self.seq)}), got {seq!r}: collect it by "
                f"ImportanceState(..., seq=({', '.join(map(repr, (*self.seq, seq)))},))"
            )
        k = self.seq.index(seq)
        if batch == "L2":
            return self.squares[k].sqrt()
        n = self.sequences.clamp(min=1).double()
        if self.groups:
            n = n.repeat_interleave(self.num_channels // self.groups)
        mean = self.sums[k] / n
        if batch == "mean":
            return mean
        return (self.squares[k] / n - mean.square()).clamp(min=0)

    def merge_(self, other: ImportanceState) -> ImportanceState:
        """Adds the sequences of another state with the same channels and aggregations. Returns itself."""
        if isinstance(other, ImportanceState) and other.seq != self.seq:
            raise ValueError(f"other must have collected {self.seq}, got {other.seq}")
        self._merge(other)
        return self

    def all_reduce_(self, group: ProcessGroup | None = None) -> ImportanceState:
        """Adds the states of data-parallel ranks, each of which saw other sequences. Returns itself."""
        self._all_reduce(group)
        return self

    def all_gather(self, group: ProcessGroup | None = None) -> ImportanceState:
        """The state of all channels, in rank order, where each tensor- or expert-parallel rank holds some.

        All ranks must have equally many channels and have seen the same sequences.
        """
        states = []
        gathered = {name: _gather(x, group) for name, x in self._tensors().items()}
        for rank in range(torch.distributed.get_world_size(group)):
            state = copy.copy(self)
            for name, parts in gathered.items():
                setattr(state, name, parts[rank])
            states.append(state)
        return ImportanceState.cat(states)

    @classmethod
    def cat(cls, states: Iterable[ImportanceState]) -> ImportanceState:
        """One state with the channels of all, in order.

        States without groups must be of the same sequences; the counts are taken from the first.
        """
        states = list(states)
        if not states:
            raise ValueError("states must have at least one ImportanceState, got none")
        if len({state.seq for state in states}) != 1:
            raise ValueError(f"states must have the same seq, got {[state.seq for state in states]}")
        if len({state.groups is None for state in states}) != 1:
            raise ValueError("states must all have groups or all have none, got some of each")
        whole = copy.copy(states[0])
        whole.sums = torch.cat([state.sums for state in states], 1)
        whole.squares = torch.cat([state.squares for state in states], 1)
        if whole.groups is None:
            whole.sequences, whole.tokens = whole.sequences.clone(), whole.tokens.clone()
        else:
            whole.sequences = torch.cat([state.sequences for state in states])
            whole.tokens = torch.cat([state.tokens for state in states])
        return whole

    def to(self, device: torch.device | str) -> ImportanceState:
        """Moves the sums. Returns itself."""
        self._move(device)
        return self

    def __repr__(self) -> str:
        groups = "" if self.groups is None else f"groups={self.groups}, "
        return (
            f"ImportanceState({self.num_channels}, seq={self.seq}, {groups}device={str(self.sums.device)!r})"
        )


class TokenMeanState(Sums):
    """Means over tokens of one number per token: for layers (block importance) and experts.

    Args:
        num_items: M, the number of layers or experts.
        device: where the sums are kept.

    Attributes:
        sums: float64 [M].
        counts: int64 [M], tokens that were added to each.

    Raises:
        TypeError, ValueError: num_items is not an int of at least 0.
    """

    _names = ("sums", "counts")

    def __init__(self, num_items: int, *, device: torch.device | str | None = None) -> None:
        _check_size("num_items", num_items)
        self.sums = torch.zeros(num_items, dtype=torch.float64, device=device)
        self.counts = torch.zeros(num_items, dtype=torch.int64, device=device)

    @property
    def num_items(self) -> int:
        """M."""
        return self.sums.shape[0]

    def scores(self) -> Tensor:
        """Mean per item, float64 [M]; 0, not NaN, for an item that saw no token."""
        return self.sums / self.counts.clamp(min=1)

    def part(self, begin: int, end: int) -> TokenMeanState:
        """The items from `begin` to `end` as a state that shares memory with this one."""
        _check_part(begin, end, self.num_items)
        view = copy.copy(self)
        view.sums, view.counts = self.sums[begin:end], self.counts[begin:end]
        return view

    def merge_(self, other: TokenMeanState) -> TokenMeanState:
        """Adds the tokens of another state. Returns itself."""
        self._merge(other)
        return self

    def all_reduce_(self, group: ProcessGroup | None = None) -> TokenMeanState:
        """Adds the states of ranks, each of which saw other tokens. Returns itself."""
        self._all_reduce(group)
        return self

    def all_gather(self, group: ProcessGroup | None = None) -> TokenMeanState:
        """The state of all items, in rank order, where each expert-parallel rank holds equally many."""
        whole = TokenMeanState(0, device=self.sums.device)
        whole.sums = torch.cat(_gather(self.sums, group))
        whole.counts = torch.cat(_gather(self.counts, group))
        return whole

    @classmethod
    def cat(cls, states: Iterable[TokenMeanState]) -> TokenMeanState:
        """One state with the items of all, in order."""
        states = list(states)
        whole = cls(0)
        if states:
            whole.sums = torch.cat([state.sums for state in states])
            whole.counts = torch.cat([state.counts for state in states])
        return whole

    def to(self, device: torch.device | str) -> TokenMeanState:
        """Moves the sums. Returns itself."""
        self._move(device)
        return self

    def __repr__(self) -> str:
        return f"TokenMeanState({self.num_items}, device={str(self.sums.device)!r})"


def _check_size(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must be 0 or greater, got {value}")


def _check_part(begin: int, end: int, length: int) -> None:
    if not 0 <= begin <= end <= length:
        raise ValueError(f"begin and end must be in order in [0, {length}], got {begin} and {end}")


def _gather(x: Tensor, group: ProcessGroup | None) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, x.contiguous(), group=group)
    return parts
