"""A file that several threads write at their own positions, around the page cache where that is possible.

Where a file system refuses that, and at the edges of what is written, it is a plain write (see `pages`).
Either way bytes are on the disk only after sync().
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from minitron_kernels.pruning.checkpoint.pages import (
    DIRECT_BYTES,
    DIRECT_FILE_BYTES,
    PAGE,
    REFUSED,
    open_direct,
)
from minitron_kernels.pruning.checkpoint.staging import write_all


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
                self._direct = open_direct(path, os.O_WRONLY)
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


def _allocate(fd: int, size: int) -> None:
    """Reserves the whole file on the disk: a full disk is noticed early, and the file is contiguous."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
