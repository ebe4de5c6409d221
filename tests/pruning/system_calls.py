"""A layer over the calls by which pruning meets the disk: notes them, makes one fail, or all come short."""

import errno
import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path

from minitron_kernels.pruning.checkpoint.pages import PAGE

# what takes a descriptor first, and what takes a path; os.open is apart, for it makes the one of the other
OF_DESCRIPTORS = ("pwrite", "preadv", "fsync", "posix_fallocate", "ftruncate", "close")
OF_PATHS = ("rename", "mkdir", "unlink")


def is_direct(fd):
    """Whether a descriptor goes around the page cache."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


@dataclass(frozen=True)
class Call:
    """One call: its name, the path it is for, the new name of a rename."""

    name: str
    path: str
    target: str = ""
    flags: int = 0


@dataclass
class Disk:
    """While patched in: `calls` in their order. The call number `fail_at` raises `error`; see also `short`.

    Args:
        below: only calls on paths in this folder are noted.
        fail_at: number of the call that fails; None for none.
        error: of the failing call.
        short: whether every read and write does a part of what was asked.
    """

    below: Path
    fail_at: int | None = None
    error: int = errno.EIO
    short: bool = False
    calls: list[Call] = field(default_factory=list)

    def patch(self, monkeypatch):
        """Takes the place of the calls of `os`, until monkeypatch gives them back."""
        for name in ("open", *OF_DESCRIPTORS, *OF_PATHS):
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))
        return self

    def _wrap(self, name, call):
        def wrapped(*args, **kwargs):
            path = args[0]
            try:
                path = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
            except OSError:  # a descriptor that is none
                path = ""
            if kwargs.get("dir_fd") is not None or not str(path).startswith(str(self.below)):
                return call(*args, **kwargs)
            target = os.fspath(args[1]) if name == "rename" else ""
            self.calls.append(Call(name, str(path), str(target), args[1] if name == "open" else 0))
            if len(self.calls) - 1 == self.fail_at:
                if name == "close":
                    call(*args)  # Linux has closed it all the same
                named = () if name in OF_DESCRIPTORS else (str(path),)  # as the call itself names it
                raise OSError(self.error, os.strerror(self.error), *named)
            if self.short and name in ("pwrite", "preadv"):
                args = (args[0], self._part(args[1]), *args[2:])
            return call(*args, **kwargs)

        return wrapped

    @staticmethod
    def _part(data):
        """The first part of a buffer to write, or of the one buffer to read into; of any number of bytes.

        Of several pages it is whole pages, as file systems come short in direct writes.
        """
        if isinstance(data, list):
            return [Disk._part(data[0])]
        part = max(1, len(data) * 3 // 7)
        if len(data) > PAGE and len(data) % PAGE == 0:
            part = max(PAGE, part // PAGE * PAGE)
        return data[:part]
