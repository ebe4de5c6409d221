"""What states of importance have in common: sums by name, which add over batches and ranks, and are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class Sums:
    """Named tensors that can be added: over batches, over data-parallel ranks, and after a resume."""

    _names: tuple[str, ...] = ()

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._names}

    def _check_alike(self, other: Any) -> None:
        if type(other) is not type(self):
            raise TypeError(f"other must be a {type(self).__name__}, got {type(other).__name__}")
        for name, x in self._tensors().items():
            y = getattr(other, name)
            if x.shape != y.shape:
                raise ValueError(
                    f"other must have the same channels and aggregations: its {name} is {tuple(y.shape)}, "
                    f"this one's {tuple(x.shape)}"
                )

    def _merge(self, other: Any) -> None:
        self._check_alike(other)
        for name, x in self._tensors().items():
            x.add_(getattr(other, name).to(x.device))

    def _all_reduce(self, group: ProcessGroup | None) -> None:
        for x in self._tensors().values():
            torch.distributed.all_reduce(x, group=group)

    @property
    def _kept(self) -> dict[str, Tensor]:
        """What the tensors are of, to be kept with them: sums of another kind have the same shapes."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the tensors, by name; and what an ImportanceState's are of, its `seq` as numbers."""
        return {name: x.detach().clone() for name, x in self._tensors().items()} | self._kept

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies in what state_dict() gave. Scores are then bitwise the same as without an interruption.

        Raises:
            ValueError: a tensor is missing, has another shape, or is of other aggregations; nothing is
                changed then.
        """
        for name, x in self._tensors().items():
            if name not in state:
                raise ValueError(f"state must have {', '.join(self._names)}; {name} is missing")
            if state[name].shape != x.shape:
                raise ValueError(
                    f"state's {name} must be {tuple(x.shape)}, got {tuple(state[name].shape)}: it has "
                    "other channels or aggregations"
                )
        for name, x in self._kept.items():
            if name in state and not torch.equal(state[name].cpu(), x):  # older files have none
                raise ValueError(
                    f"state's {name} must be {x.tolist()}, got {state[name].tolist()}: it has other "
                    "aggregations, or in another order"
                )
        for name, x in self._tensors().items():
            x.copy_(state[name])

    def _move(self, device: torch.device | str) -> None:
        for name, x in self._tensors().items():
            setattr(self, name, x.to(device))
