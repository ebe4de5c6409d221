"""Files that appear whole or not at all, beside others who write into the same folder.

A file is written under a hidden name of its own, which its writer keeps locked, and gets its name by one
rename when its bytes are on the disk. What a killed writer left is known by its name and by its lock, which
ended with the writer.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from minitron_kernels._files import DISK_IS_FULL, reason
from minitron_kernels.pruning.checkpoint.staging import fsync_path, write_all

BLOCK_BYTES = 4 << 20  # of one write
_TEMPORARY = re.compile(r"\.minitron-cache-[0-9a-f]{16}\.tmp")


def disk_error(error: OSError, path: Path) -> OSError:
    """The same error, saying which file could not be written and what to do."""
    if error.errno in DISK_IS_FULL:
        advice = "free some space; the finished shards are kept, and the same call goes on from there"
    else:
        advice = "choose another folder, or change its rights; finished shards are kept"
    return type(error)(error.errno, f"could not be written ({reason(error)}): {advice}", str(path))


def publish(path: Path, parts: Iterable[bytes | memoryview], *, replace: bool) -> None:
    """Writes `parts` one behind the other into a file that appears at `path` whole, and on the disk.

    replace: whether a file of that name is replaced; else it stays, and nothing is written.

    Raises:
        OSError: the disk fails; nothing has appeared.
    """
    temporary, fd = _own_file(path.parent)
    renamed = False
    try:
        _write(fd, parts)
        os.fsync(fd)
        if replace:
            os.rename(temporary, path)
            renamed = True
        else:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return
            except OSError:  # a file system without links
                os.rename(temporary, path)
                renamed = True
        fsync_path(path.parent)
    finally:
        if not renamed:
            with suppress(OSError):
                os.unlink(temporary)
        with suppress(OSError):  # its bytes are on the disk, or given up
            os.close(fd)


def _write(fd: int, parts: Iterable[bytes | memoryview]) -> None:
    """Small parts are joined: a shard has some for each of its sequences."""
    at, block = 0, bytearray()
    for part in parts:
        block += part
        if len(block) >= BLOCK_BYTES:
            write_all(fd, bytes(block), at)
            at, block = at + len(block), bytearray()
    write_all(fd, bytes(block), at)


def clean(folder: Path) -> list[str]:
    """Removes what killed writers left; the names removed. Files of live writers are locked, and stay."""
    removed = []
    for path in sorted(folder.iterdir()):
        if not _TEMPORARY.fullmatch(path.name):
            continue
        with suppress(OSError):  # it is gone, or belongs to someone else
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
                removed.append(path.name)
            finally:
                os.close(fd)
    return removed


def _own_file(folder: Path) -> tuple[Path, int]:
    """(a new file in `folder`, its descriptor, which holds its lock)."""
    while True:
        path = folder / f".minitron-cache-{secrets.token_hex(8)}.tmp"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return path, fd
        except (BlockingIOError, FileNotFoundError):
            pass  # another process took it for a left one, before it was locked: take a new name
        except OSError as error:  # a file system without locks: none is taken there, and nothing cleaned
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                return path, fd
            os.close(fd)
            raise
        os.close(fd)
        with suppress(OSError):
            os.unlink(path)
