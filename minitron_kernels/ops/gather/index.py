"""ChannelIndex: the channels of one axis that are kept, checked once for any number of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minitron_kernels._tensors import check_tensor

_BLOCKS = (16, 8, 4, 2)


class ChannelIndex:
    """Channels kept of an axis of `size`, checked once on the host.

    A model's weights share a few of these (every layer's norms, rows and columns keep the same hidden
    channels): made once, an index is neither checked nor copied to a device again.

    Args:
        keep: [K] int64 or int32, on any device (on a GPU: one host sync, here and at no later use); in
            [0, size), in any order, repeated or not.
        size: C, how many channels the axis has.
        name: what errors call it.

    Attributes:
        values: [K] int64 on the CPU.
        size: C.
        block: the largest b in 1, 2, 4, 8, 16 for which `keep` is made of whole blocks b·j ... b·j + b − 1: a
            wider element can be moved in place of b narrow ones.

    Raises:
        TypeError: `keep` is no tensor of integers.
        ValueError: `keep` is not one-dimensional, or an index is out of range; names the first one.
    """

    def __init__(self, keep: Tensor, size: int, *, name: str = "keep") -> None:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"size must be an int, got {type(size).__name__}")
        if size < 0:
            raise ValueError(f"size must not be negative, got {size}")
        check_kind(name, keep)
        # a copy: what was checked must not change with the caller's tensor
        values = keep.detach().to("cpu", torch.int64, copy=True).contiguous()
        bad = (values < 0) | (values >= size)
        if bool(bad.any()):
            at = int(bad.int().argmax())
            raise ValueError(
                f"{name}[{at}] is {int(values[at])}: indices must be in [0, {size})"
                + (f"; {int(bad.sum())} of {len(values)} are not" if int(bad.sum()) > 1 else "")
            )
        self.values = values
        self.size = size
        self._block: int | None = None
        self._on: dict[tuple[torch.device, int], Tensor] = {}
        if keep.device.type != "cpu":
            self._on[keep.device, 1] = keep.detach().to(torch.int64, copy=True).contiguous()

    def __len__(self) -> int:
        return self.values.shape[0]

    def __repr__(self) -> str:
        return f"ChannelIndex({len(self)} of {self.size}, block {self.block})"

    @property
    def block(self) -> int:
        """See the class."""
        if self._block is None:
            self._block = next((b for b in _BLOCKS if self._is_made_of(b)), 1)
        return self._block

    def _is_made_of(self, block: int) -> bool:
        if len(self) == 0 or len(self) % block or self.size % block:
            return False
        groups = self.values.view(-1, block)
        first = groups[:, :1]
        return not bool((first % block).any() | (groups - first != torch.arange(block)).any())

    def on(self, device: torch.device, block: int = 1) -> Tensor:
        """[K / block] int64 on `device`: the indices of the blocks; kept for the next call."""
        if device.type == "cpu" and block == 1:
            return self.values
        if (device, block) not in self._on:
            values = self.values if block == 1 else self.values[::block] // block
            self._on[device, block] = values.to(device)
        return self._on[device, block]


def check_kind(name: str, keep: Any) -> None:
    """`keep` is a one-dimensional tensor of int64 or int32."""
    if not isinstance(keep, Tensor) or keep.dtype not in (torch.int64, torch.int32):
        got = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise TypeError(f"{name} must be an int64 or int32 tensor, got {got}")
    check_tensor(name, keep)
    if keep.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got {tuple(keep.shape)}")
