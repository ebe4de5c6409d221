"""Files that several threads write at their own positions, around the page cache where that is possible.

Two things decide how fast gigabytes reach a file, and both depend on addresses:

- The kernel copies between a buffer and the page cache by `rep movsb`. On CPUs with the flag fsrm this can be
  four to six times slower while 0 < (destination − source) mod 4096 < 32 (seen on Zen 3), and malloc and the
  length of a header decide whether it is. `PageBuffer` gives memory at the same place in a page as the bytes
  have in their file, so that the difference is 0.
- Pages of the cache must be allocated, filled and written back, all by the CPU. Whole pages are therefore
  written with O_DIRECT, from the buffer to the disk, while other threads compute. Where a file system refuses
  that, and at the edges of what is written, it is a plain write. A virtual disk took bytes from huge pages
  five times as fast as from as many pages of 4 KiB, since they are fewer pieces.

Either way bytes are on the disk only after sync().
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from pathlib import Path

import numpy as np

from minitron_kernels.pruning.checkpoint.staging import write_all

PAGE = max(4096, mmap.PAGESIZE)  # bytes; a multiple of what O_DIRECT asks for on any disk
_HUGE_PAGE = 2 << 20  # bytes, on x86 and usually on ARM
DIRECT_FILE_BYTES = 16 << 20  # smaller files are written plainly: the cache holds them, and each write waits
DIRECT_BYTES = 64 << 10  # so is less than this
# what file systems answer that know no such call, or not with these arguments
REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


def copies_fast(source: int, destination: int) -> bool:
    """Whether the kernel copies between these two addresses, or positions in a file, at full speed."""
    return not 0 < (destination - source) % 4096 < 32


class PageBuffer:
    """Memory of one thread, reused for each piece: a fresh page costs more time than the copy into it."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def at(self, position: int, nbytes: int) -> np.ndarray:
        """`nbytes` uninitialised bytes, [nbytes] uint8, whose address is `position` modulo a page."""
        if len(self._bytes) < nbytes + PAGE - 1:
            self._bytes = np.empty(0, np.uint8)  # frees the old one first
            self._bytes = _memory(nbytes + PAGE - 1)
        begin = (position - self._bytes.ctypes.data) % PAGE
        return self._bytes[begin : begin + nbytes]


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


class OutputFile:
    """A new file of `size` bytes at `path`, reserved on the disk; an older one is emptied.

    Raises:
        OSError: it cannot be created, or the disk is too full for it.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._direct: int | None = None
        try:
            _allocate(self._fd, size)
            if size >= DIRECT_FILE_BYTES:
                self._direct = _open_direct(path)
        except BaseException:
            os.close(self._fd)
            raise
        self.direct = self._direct is not None

    def write(self, data: memoryview, begin: int) -> None:
        """Writes all of `data` (bytes) from byte `begin` of the file on. Threads may write at the same time.

        Bytes go around the cache where their address is their position modulo a page, see PageBuffer.
        """
        first = -begin % PAGE
        last = len(data) - (begin + len(data)) % PAGE
        if not self.direct or last - first < DIRECT_BYTES or not _at_page(data[first:last]):
            write_all(self._fd, data, begin)
            return
        write_all(self._fd, data[:first], begin)
        done = first + self._write_direct(data[first:last], begin + first)
        write_all(self._fd, data[done:], begin + done)

    def _write_direct(self, data: memoryview, begin: int) -> int:
        """Writes whole pages; returns how many bytes: fewer where that is refused, or ends inside a page."""
        assert self._direct is not None
        done = 0
        while done < len(data) and done % PAGE == 0:
            try:
                count = os.pwrite(self._direct, data[done:], begin + done)
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                self.direct = False  # other threads that have begun find that out themselves
                break
            if count == 0:
                break
            done += count
        return done

    def sync(self) -> None:
        """Waits until all that was written is on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Closes it, also where one of its descriptors reports an error."""
        try:
            if self._direct is not None:
                os.close(self._direct)
        finally:
            os.close(self._fd)


def _at_page(data: memoryview) -> bool:
    return np.frombuffer(data, np.uint8).ctypes.data % PAGE == 0


def _open_direct(path: Path) -> int | None:
    """A second descriptor, around the page cache; None where the file system or the kernel has none."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        return os.open(path, os.O_WRONLY | flag | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in REFUSED:
            return None
        raise


def _allocate(fd: int, size: int) -> None:
    """Reserves the whole file on the disk: a full disk is noticed early, and the file is contiguous."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
