"""State, the description of what a layer keeps in a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from minitron_kernels.pruning.families.axes import dims_of
from minitron_kernels.pruning.families.configs import Config

When = Callable[[Config, int], bool]


@dataclass(frozen=True)
class State:
    """What a layer keeps in a cache: of a sequence, as much of a long one as of a short one, or of a token.

    Args:
        axes: of its dimensions, separated by ", ".
        when: (config, layer) -> whether the layer has it.
        wide: whether it is in float32 whatever the dtype of the cache, as sums over all tokens are.
    """

    axes: str
    when: When
    wide: bool = False

    @property
    def dims(self) -> tuple[tuple[str, ...], ...]:
        """The parts of each dimension."""
        return dims_of(self.axes)
