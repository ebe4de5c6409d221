"""Scratch memory that is kept between calls, since fresh pages cost more time than the work done in them.

For each device one buffer is kept, the largest that was asked for. Simultaneous calls on several threads get
separate buffers.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_lock = threading.Lock()
_kept: dict[torch.device, Tensor] = {}


class borrow:
    """`with borrow(nbytes, device) as buffer`: a uint8 buffer of at least `nbytes` bytes, for the block."""

    # a class, since a generator costs a small call two microseconds

    __slots__ = ("_buffer", "_device", "_nbytes")

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._nbytes, self._device = nbytes, device

    def __enter__(self) -> Tensor:
        with _lock:
            buffer = _kept.pop(self._device, None)
        if buffer is None or buffer.numel() < self._nbytes:
            del buffer  # frees it before the larger one is made
            with torch.inference_mode(False):  # later calls may be outside of it, and write into this one
                buffer = torch.empty(self._nbytes, dtype=torch.uint8, device=self._device)
        self._buffer = buffer
        return buffer

    def __exit__(self, *_: object) -> None:
        buffer = self._buffer
        del self._buffer
        with _lock:
            other = _kept.get(self._device)
            if other is None or other.numel() < buffer.numel():
                _kept[self._device] = buffer


def release_workspaces() -> None:
    """Frees the scratch memory that is kept between calls. The next call allocates it anew."""
    with _lock:
        _kept.clear()


def workspace_bytes_held() -> int:
    """Bytes of scratch memory that are kept between calls, on all devices together."""
    with _lock:
        return sum(buffer.numel() for buffer in _kept.values())
