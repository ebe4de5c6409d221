"""A file that is read once: from the page cache where it is there, and around it where it is not."""

from __future__ import annotations

import contextlib
import errno
import os
import resource

import numpy as np

from minitron_kernels.pruning.checkpoint.pages import (
    DIRECT_BYTES,
    DIRECT_FILE_BYTES,
    PAGE,
    REFUSED,
    PageBuffer,
    open_direct,
)
from minitron_kernels.pruning.checkpoint.safetensors_files import SafetensorsFile

_NO_WAIT = getattr(os, "RWF_NOWAIT", None)


class InputFile:
    """A second way into an open file, for several threads. close() closes it, not the file.

    A read that has to wait fills pages of the cache, which costs a CPU more time than cutting what was read:
    up to 1.8 s/GB where the pages are new to a virtual machine, and 0.03 s/GB around the cache (measured on a
    Xeon). read_cached() takes what is there at once; read_rest() waits for the disk.
    """

    def __init__(self, file: SafetensorsFile) -> None:
        self._file = file
        self._direct: int | None = None
        if _NO_WAIT is not None and file.size >= DIRECT_FILE_BYTES:
            with contextlib.suppress(OSError):  # the plain way is there
                self._direct = open_direct(file.path, os.O_RDONLY | os.O_NONBLOCK)
        if self._direct is None:
            return
        another = not os.path.samestat(os.fstat(self._direct), os.fstat(file.fd))  # has its name now
        if another or not _leaves_half(self._direct):
            self.close()

    def close(self) -> None:
        """Closes it. Errors are ignored, since it was only read."""
        if self._direct is not None:
            with contextlib.suppress(OSError):
                os.close(self._direct)
        self._direct = None

    def read_cached(self, data: memoryview, begin: int) -> int:
        """Fills `data` (bytes) from byte `begin` of the file on, up to the first that is not in the cache.

        Returns how many bytes it read. Where nothing can be read around the cache these are all.

        Raises:
            ValueError, OSError: as SafetensorsFile.read_into().
        """
        done = 0
        if self._direct is not None and len(data) >= DIRECT_BYTES:
            assert _NO_WAIT is not None
            while done < len(data):
                # the first byte alone tells: the system begins to fetch all that is asked for and not there
                part = data[done:] if done else data[:1]
                try:
                    count = os.preadv(self._file.fd, [part], begin + done, _NO_WAIT)
                except OSError as error:
                    if error.errno == errno.EAGAIN:
                        return done
                    break  # not known here, or a fault, which the plain way names
                if count == 0:
                    break
                done += count
        self._file.read_into(data[done:], begin + done)
        return len(data)

    def read_rest(self, buffer: PageBuffer, begin: int, nbytes: int) -> np.ndarray:
        """The bytes at this position, in `buffer` as they lie in their pages; waits for the disk.

        Raises:
            ValueError, OSError: as SafetensorsFile.read_into().
        """
        first = begin % PAGE
        pages = buffer.pages(first + nbytes)
        wanted, done = first + nbytes, 0
        while done < wanted and done % PAGE == 0 and self._direct is not None:
            try:
                count = os.preadv(self._direct, [pages[done:].data], begin - first + done)
            except OSError as error:
                if error.errno not in REFUSED:
                    raise self._file.read_error(error) from None
                break
            if count == 0:
                break
            done += count
        if done < wanted:  # refused, or at its end: the plain way knows which
            self._file.read_into(pages[first:wanted].data, begin)
        return pages[first:wanted]


def _leaves_half(descriptor: int) -> bool:
    """Whether half of the descriptors that a process may have are free: a new one is the lowest free number.

    A checkpoint in hundreds of files would else take all, and none would be left for what is written.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most == resource.RLIM_INFINITY or 2 * descriptor < most
