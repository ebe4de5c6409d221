"""Scratch memory that is kept between calls, since fresh pages cost more time than the work done in them.

For each device one buffer is kept, the largest that was asked for. Simultaneous calls on several threads get
separate buffers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_lock = threading.Lock()
_kept: dict[torch.device, Tensor] = {}


@contextmanager
def borrow(nbytes: int, device: torch.device) -> Iterator[Tensor]:
    """Gives a uint8 buffer of at least `nbytes` bytes, and takes it back at the end of the block."""
    with _lock:
        buffer = _kept.pop(device, None)
    if buffer is None or buffer.numel() < nbytes:
        del buffer  # frees it before the larger one is made
        with torch.inference_mode(False):  # later calls may be outside of it, and write into this one
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
    try:
        yield buffer
    finally:
        with _lock:
            other = _kept.get(device)
            if other is None or other.numel() < buffer.numel():
                _kept[device] = buffer


def release_workspaces() -> None:
    """Frees the scratch memory that is kept between calls. The next call allocates it anew."""
    with _lock:
        _kept.clear()


def workspace_bytes_held() -> int:
    """Bytes of scratch memory that are kept between calls, on all devices together."""
    with _lock:
        return sum(buffer.numel() for buffer in _kept.values())
