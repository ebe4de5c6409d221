"""Memory that lies in its pages as bytes lie in their file; files that are read and written around the cache.

Two things decide how fast gigabytes go from and to files, and both depend on addresses:

- The kernel copies between a buffer and the page cache by `rep movsb`. On CPUs with the flag fsrm this can be
  four to six times slower while 0 < (destination − source) mod 4096 < 32 (seen on Zen 3), and malloc and the
  length of a header decide whether it is. `PageBuffer` gives memory at the same place in a page as the bytes
  have in their file, so that the difference is 0.
- Pages of the cache must be allocated and filled, and when written also cleaned, all by the CPU. What is not
  in the cache is therefore read from the disk, and whole pages are written to it, by O_DIRECT, while other
  threads compute. A virtual disk took bytes from huge pages five times as fast as from as many pages of
  4 KiB, since they are fewer pieces.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from pathlib import Path

import numpy as np

PAGE = max(4096, mmap.PAGESIZE)  # bytes; a multiple of what O_DIRECT asks for on any disk
DIRECT_FILE_BYTES = 16 << 20  # smaller files go through the cache, which holds them
DIRECT_BYTES = 64 << 10  # and so does less than this at a time
_HUGE_PAGE = 2 << 20  # bytes, on x86 and usually on ARM
# what file systems answer that know no such call, or not with these arguments
REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


def copies_fast(source: int, destination: int) -> bool:
    """Whether the kernel copies between these two addresses, or positions in a file, at full speed."""
    return not 0 < (destination - source) % 4096 < 32


def open_direct(path: Path, flags: int) -> int | None:
    """A descriptor around the page cache; None where the file system or the kernel has none."""
    direct = getattr(os, "O_DIRECT", None)
    if direct is None:
        return None
    try:
        return os.open(path, flags | direct | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in REFUSED:
            return None
        raise


class PageBuffer:
    """Memory of one thread, reused for each piece: a fresh page costs more time than the copy into it."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def at(self, position: int, nbytes: int) -> np.ndarray:
        """`nbytes` uninitialised bytes, [nbytes] uint8, whose address is `position` modulo a page."""
        begin = position % PAGE
        return self.pages(begin + nbytes)[begin : begin + nbytes]

    def pages(self, nbytes: int) -> np.ndarray:
        """As many whole pages as hold `nbytes`, [pages] uint8, uninitialised."""
        nbytes = -(-nbytes // PAGE) * PAGE
        if len(self._bytes) < nbytes:
            self._bytes = np.empty(0, np.uint8)  # frees the old one first
            memory = _memory(nbytes + PAGE - 1)
            self._bytes = memory[-memory.ctypes.data % PAGE :]
        return self._bytes[:nbytes]


def _memory(nbytes: int) -> np.ndarray:
    """At least `nbytes`, [n] uint8; in huge pages where it is that large and the system has them.

    A direct write takes apart what it writes into runs of memory that are contiguous in hardware.
    """
    if nbytes < _HUGE_PAGE // 2 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(nbytes, np.uint8)
    nbytes = -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE
    region = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = np.frombuffer(region, np.uint8)  # keeps the region as long as it lives
    begin = -memory.ctypes.data % _HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without huge pages
        region.madvise(mmap.MADV_HUGEPAGE)
    return memory[begin : begin + nbytes]
