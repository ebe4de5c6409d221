"""Recorder: adds activations to the states of ImportanceScores, many layers at a time.

Hooks must be fast, since each layer has several. A hook only computes the moments of its activations (one
kernel) and keeps them. At the end of a forward pass, or when enough have been kept, the moments of all layers
are added to the axis's state together, by as many small tensor operations as one layer would take. With
context parallelism that is also one all-reduce for all layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from minitron_kernels.ops.importance.moments import Moments, backend_for, combine, moments_by, rows_by
from minitron_kernels.ops.importance.state import ImportanceState, TokenMeanState
from minitron_kernels.pruning.score.batches import Tokens
from minitron_kernels.pruning.score.scores import ImportanceScores, ModuleKey

HELD_BYTES = 32 << 20  # kept moments of an axis, above which they are added before the pass has ended


class _Held(NamedTuple):
    """What hooks have computed for neighbouring layers or norms of an axis."""

    begin: int  # the position of the first
    parts: list[Tensor]  # moments of each, or a value per token
    counts: Tensor | None  # tokens of the sequences, the same for all parts; None with values per token


class Recorder:
    """Adds activations to scores, without gradients.

    Call start() before a forward pass and flush() after it; at other times `listens` is false, and hooks do
    nothing. `position` below is that of a layer or norm in the axis's `modules`.

    Args:
        scores: changed in place.
        group: context-parallel ranks, which hold pieces of the same sequences.
        backend: see accumulate_importance_().
    """

    def __init__(self, scores: ImportanceScores, group: ProcessGroup | None, backend: str) -> None:
        self.scores, self.group, self.backend = scores, group, backend
        self.tokens = Tokens((0, 0), None, None)
        # Looked up once, not in every hook: a layer's data drives Python's own objects out of the caches, and
        # each object that a hook touches costs more than the kernel's dispatch.
        self._moment_flags = {
            name: axis.state.kinds
            for name, axis in scores.axes.items()
            if isinstance(axis.state, ImportanceState)
        }
        self._backends: dict[tuple[torch.device, torch.dtype], str] = {}
        self._held: dict[str, _Held] = {}
        self._held_bytes: dict[str, int] = {}
        self.listens = False
        self._seen: dict[str, list[int]] = {}

    def start(self, tokens: Tokens) -> None:
        """Call before a forward pass over these tokens."""
        self.tokens = tokens
        self._seen = {axis: [] for axis in self.scores.axes}
        self.listens = True

    def flush(self) -> None:
        """Call after a forward pass: adds everything that was kept to the states.

        Raises:
            ValueError: a layer did not run in the forward pass, or ran more than once.
        """
        self.listens = False
        for axis in list(self._held):
            self._flush(axis)
        for axis, seen in self._seen.items():
            modules = self.scores.axes[axis].modules
            if sorted(seen) != list(range(len(modules))):
                off = next(at for at in range(len(modules)) if seen.count(at) != 1)
                raise ValueError(
                    f"the model must run each layer once in a forward pass, but {axis} at {modules[off]} was "
                    f"seen {seen.count(off)} times: is it skipped, shared or compiled? Score the plain model"
                )

    def totals(self) -> dict[str, tuple[tuple[ModuleKey, ...], Tensor]]:
        """{axis: (layers or norms, [layers or norms] float64)}: a sum of each one's scores, which is finite
        only if all its activations so far were. No host sync.
        """
        made = {}
        for name, axis in self.scores.axes.items():
            if axis.modules:
                sums = axis.state.sums.unflatten(-1, (len(axis.modules), -1)).sum(-1)
                made[name] = axis.modules, sums.view(-1, len(axis.modules)).sum(0)
        return made

    def channels(self, axis: str, position: int, x: Tensor, num_heads: int = 0) -> None:
        """Takes the channels (or, with `num_heads`, the heads) of x [B, S, C]."""
        mask, cu_seqlens = self.tokens.on(x.device)
        x = self.tokens.arrange(x)
        moments = moments_by(self._chosen(x), x, mask, cu_seqlens, num_heads, self._moment_flags[axis])
        self._hold(axis, position, moments.values, moments.counts)

    def blocks(self, position: int, block_input: Tensor, block_output: Tensor) -> None:
        """Takes a layer's input and output [B, S, H], for its block importance."""
        x, y = block_input.flatten(0, 1), block_output.flatten(0, 1)
        if x.dtype != y.dtype:
            x, y = x.float(), y.float()
        self._hold("layers", position, rows_by(self._chosen(x), x, y), None)

    def _chosen(self, x: Tensor) -> str:
        where = x.device, x.dtype
        chosen = self._backends.get(where)
        if chosen is None:
            chosen = self._backends[where] = backend_for(x, self.backend)
        return chosen

    def experts(self, position: int, sums: Tensor, counts: Tensor) -> None:
        """Takes a layer's sums and counts [experts], over the tokens that were routed to each expert."""
        self._seen["experts"].append(position)
        axis = self.scores.axes["experts"]
        self._add_means(axis.state, position * len(sums), sums, counts)

    def neurons(self, position: int, moments: Moments) -> None:
        """Takes the moments of all experts' neurons of a layer: values [moments, B, E·F], counts [B, E]."""
        self._seen["expert_mlp"].append(position)
        state, experts = self._state("expert_mlp"), moments.counts.shape[1]
        self._move(state, moments.values)
        self._add(state, position * experts, (position + 1) * experts, moments)

    def moment_flags(self, axis: str) -> int:
        """The moments that an axis needs: flags of ops/importance/reference.py."""
        return self._moment_flags[axis]

    def _state(self, axis: str) -> ImportanceState:
        state = self.scores.axes[axis].state
        assert isinstance(state, ImportanceState)
        return state

    def _move(self, state: ImportanceState | TokenMeanState, like: Tensor) -> None:
        """Moves a state to the kind of device that its activations are on."""
        if state.sums.device.type != like.device.type:
            state.to(like.device)

    def _hold(self, axis: str, position: int, part: Tensor, counts: Tensor | None) -> None:
        self._seen[axis].append(position)
        held = self._held.get(axis)
        if held is not None and held.begin + len(held.parts) != position:
            self._flush(axis)
            held = None
        if held is None:
            held = self._held[axis] = _Held(position, [], counts)
            self._held_bytes[axis] = 0
        held.parts.append(part)
        self._held_bytes[axis] += part.nbytes
        if self._held_bytes[axis] >= HELD_BYTES:
            self._flush(axis)

    def _flush(self, axis: str) -> None:
        held = self._held.pop(axis)
        state = self.scores.axes[axis].state
        self._move(state, held.parts[0])
        device = held.parts[0].device
        parts = [part.to(device) for part in held.parts]  # layers may be on several devices
        if isinstance(state, TokenMeanState):
            rows = torch.stack(parts).double()
            mask, _ = self.tokens.on(device)
            if mask is None:
                counts = rows.new_full((), rows.shape[1], dtype=torch.int64)
            else:
                rows = torch.where(mask.reshape(-1), rows, 0.0)  # padding may hold NaN
                counts = mask.sum()
            self._add_means(state, held.begin, rows.sum(1), counts.expand(len(parts)))
            return
        assert held.counts is not None
        moments = Moments(torch.cat(parts, dim=2), held.counts.to(device), self._moment_flags[axis])
        self._add(state, held.begin, held.begin + len(parts), moments)

    def _add(self, state: ImportanceState, begin: int, end: int, moments: Moments) -> None:
        if self.group is not None:
            moments = combine(moments, self.group)
        device = state.sums.device
        state.part(begin, end).add_(
            moments._replace(values=moments.values.to(device), counts=moments.counts.to(device))
        )

    def _add_means(
        self, state: ImportanceState | TokenMeanState, begin: int, sums: Tensor, counts: Tensor
    ) -> None:
        assert isinstance(state, TokenMeanState)
        self._move(state, sums)
        sums, counts = sums.double(), counts.clone()
        if self.group is not None:
            torch.distributed.all_reduce(sums, group=self.group)
            torch.distributed.all_reduce(counts, group=self.group)
        part = state.part(begin, begin + len(sums))
        part.sums += sums.to(state.sums.device)
        part.counts += counts.to(state.sums.device)
