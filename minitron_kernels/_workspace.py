"""Scratch memory that is kept between calls: fresh pages cost more than the work done in them.

One buffer per device is kept, the largest that was asked for; calls at the same time on several threads get
buffers of their own.
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
    """A uint8 buffer of at least `nbytes` bytes, handed back at the end of the block."""
    with _lock:
        buffer = _kept.pop(device, None)
    if buffer is None or buffer.numel() < nbytes:
        del buffer  # before the larger one is made
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
    try:
        yield buffer
    finally:
        with _lock:
            other = _kept.get(device)
            if other is None or other.numel() < buffer.numel():
                _kept[device] = buffer


def release_workspaces() -> None:
    """Frees the scratch memory kept between calls; the next call allocates anew."""
    with _lock:
        _kept.clear()


def workspace_bytes_held() -> int:
    """Bytes of scratch memory kept between calls, all devices together."""
    with _lock:
        return sum(buffer.numel() for buffer in _kept.values())
