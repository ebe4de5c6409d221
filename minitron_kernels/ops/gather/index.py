"""ChannelIndex: the kept channels of one axis, checked once for any number of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minitron_kernels._tensors import check_tensor

_BLOCKS = (16, 8, 4, 2)


class ChannelIndex:
    """Channels kept of an axis of `size`, checked once on the host.

    The weights of a model share a few of these: every layer's norms, rows and columns keep the same hidden
    channels. An index is checked, and copied to a device, only once.

    Args:
        keep: [K] int64 or int32 in [0, size), in any order, repeated or not; on any device. On a GPU this
            costs one host sync here, and none at later uses, from whichever stream.
        size: C, how many channels the axis has.
        name: what error messages call it.

    A copy to a GPU is made at the first use there, is there when that returns, and is kept: it may be used on
    any stream. It cannot be made while a CUDA graph is captured: use the index on that device once before,
    and keep it as long as the graph.

    Attributes:
        values: [K] int64 on the CPU.
        size: C.
        block: the largest b of 1, 2, 4, 8, 16 for which `keep` consists of whole blocks b·j ... b·j + b − 1.
            Kernels can then move one wide element instead of b narrow ones.

    Raises:
        TypeError: `keep` is not a tensor of integers.
        ValueError: `keep` is not one-dimensional, or an index is out of range; the message names the first.
    """

    def __init__(self, keep: Tensor, size: int, *, name: str = "keep") -> None:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"size must be an int, got {type(size).__name__}")
        if size < 0:
            raise ValueError(f"size must not be negative, got {size}")
        check_index_tensor(name, keep)
        if _has_streams(keep.device) and _is_capturing():
            raise RuntimeError(
                f"{name} cannot be checked while a CUDA graph is captured: make the ChannelIndex before"
            )
        # a copy, so that the checked values do not change with the caller's tensor
        copy = keep.detach().to(torch.int64, copy=True).contiguous()
        values = copy.to("cpu")  # waits for this stream, and with it for the copy on the device
        if not _within(values, size):
            bad = (values < 0) | (values >= size)
            at = int(bad.int().argmax())
            raise ValueError(
                f"{name}[{at}] is {int(values[at])}: indices must be in [0, {size})"
                + (f"; {int(bad.sum())} of {len(values)} are not" if int(bad.sum()) > 1 else "")
            )
        self.values = values
        self.size = size
        self._block: int | None = None
        self._on: dict[tuple[torch.device, int], Tensor] = {}
        self._streams: set[tuple[torch.device, int, int]] = set()  # that are known to use one of these
        if keep.device.type != "cpu":
            self._on[keep.device, 1] = copy

    def __len__(self) -> int:
        return self.values.shape[0]

    def __repr__(self) -> str:
        return f"ChannelIndex({len(self)} of {self.size}, block {self.block})"

    @property
    def block(self) -> int:
        """The largest block size that `keep` consists of; see the class."""
        if self._block is None:
            self._block = next((b for b in _BLOCKS if self._consists_of(b)), 1)
        return self._block

    def _consists_of(self, block: int) -> bool:
        if len(self) == 0 or len(self) % block or self.size % block:
            return False
        groups = self.values.view(-1, block)
        first = groups[:, :1]
        return not bool(
            (first % block).any() | (groups - first != torch.arange(block, device=self.values.device)).any()
        )

    def on(self, device: torch.device, block: int = 1) -> Tensor:
        """[K / block] int64 on `device`: the indices of the blocks. They are cached for later calls.

        The current stream may read them, and they are not freed before it has.

        Raises:
            RuntimeError: a CUDA graph is being captured, and there is no copy on that device yet.
        """
        if device.type == "cpu" and block == 1:
            return self.values
        on_gpu = _has_streams(device) and not torch.compiler.is_compiling()
        if (device, block) not in self._on:
            if on_gpu and _is_capturing():
                raise RuntimeError(
                    f"{self!r} has no copy on {device} yet, and none can be made while a CUDA graph is "
                    "captured: make the same call once before the capture"
                )
            values = self.values if block == 1 else self.values[::block] // block
            # blocking, so that no stream needs to wait for it: the copy is there when the next line runs
            self._on[device, block] = values.to(device)
        values = self._on[device, block]
        if on_gpu:
            self._record(values, block)
        return values

    def _record(self, values: Tensor, block: int) -> None:
        """Tells the allocator, which knows only the stream of the copy, that the current one reads it too."""
        stream = torch.cuda.current_stream(values.device)
        use = values.device, block, stream.cuda_stream
        if use not in self._streams and not _is_capturing():
            values.record_stream(stream)
            self._streams.add(use)


def _within(values: Tensor, size: int) -> bool:
    """Whether all are in [0, size)."""
    if not len(values):
        return True
    low, high = torch.aminmax(values)
    return int(low) >= 0 and int(high) < size


def _has_streams(device: torch.device) -> bool:
    """Not where tensors only pass for a GPU's, as under ttsem, which a torch without CUDA runs."""
    return device.type == "cuda" and torch.backends.cuda.is_built()


def _is_capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def check_index_tensor(name: str, keep: Any) -> None:
    """Checks that `keep` is a one-dimensional tensor of int64 or int32."""
    if not isinstance(keep, Tensor) or keep.dtype not in (torch.int64, torch.int32):
        got = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise TypeError(f"{name} must be an int64 or int32 tensor, got {got}")
    check_tensor(name, keep)
    if keep.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got {tuple(keep.shape)}")
