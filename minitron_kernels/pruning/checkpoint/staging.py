"""Staging: creates a folder that appears complete or not at all; after a crash the work can be resumed.

It works in a hidden folder beside the target `dst`:

    .dst.partial/lock            held while a process works here
    .dst.partial/journal.jsonl   what is being made, and which files of it are finished
    .dst.partial/checkpoint/     becomes dst by one rename
    .dst.partial/replaced/       the old dst, where the file system cannot exchange two names

A file is listed in the journal only after its bytes and its name are on the disk. The rename comes after all
files are.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minitron_kernels._files import DISK_IS_FULL, reason

ASIDE = "replaced"  # folder of a checkpoint that is being replaced
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # arguments of renameat2 on Linux


def fsync_path(path: Path) -> None:
    """Waits until a file's bytes, or the names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview, begin: int) -> None:
    """Writes all of `data` (bytes) from byte `begin` of the file on."""
    done, view = 0, memoryview(data)
    while done < len(view):
        done += os.pwrite(fd, view[done:], begin + done)


def partial_path(dst: Path) -> Path:
    """The hidden folder in which `dst` is made."""
    return dst.parent / f".{dst.name}.partial"


def write_error(error: OSError, path: Path) -> OSError:
    """The same error, saying which file could not be written and what to do."""
    advice = "the finished files are kept, and the same call goes on from there"
    if error.errno in DISK_IS_FULL:
        advice = f"free some space; {advice}"
    return OSError(error.errno, f"could not be written ({reason(error)}): {advice}", str(path))


def check_target(dst: Path, overwrite: bool) -> None:
    """Raises FileExistsError unless `dst` does not exist, or is a checkpoint that may be replaced."""
    if not os.path.lexists(dst):
        return
    if not overwrite:
        raise FileExistsError(errno.EEXIST, "is there already: choose another dst, or overwrite it", str(dst))
    if dst.is_symlink() or not (dst / "config.json").is_file():
        raise FileExistsError(
            errno.EEXIST,
            "is not the folder of a checkpoint, and overwrite replaces nothing else: move it away",
            str(dst),
        )


def check_paths(src: Path, dst: Path, overwrite: bool) -> tuple[Path, Path]:
    """(src, dst as an absolute path), checked before anything is read.

    Raises:
        FileNotFoundError, FileExistsError: `src` is not a folder; `dst` is there and may not be replaced.
        ValueError: one of them is inside the other.
    """
    if not src.is_dir():
        why = "this is a file" if src.exists() else "there is none"
        raise FileNotFoundError(errno.ENOENT, f"src must be the folder of a checkpoint: {why}", str(src))
    target = Path(os.path.abspath(dst))
    inside, around = target.resolve(), src.resolve()
    if inside == around or inside in around.parents or around in inside.parents:
        raise ValueError(f"dst must be neither src, nor inside it, nor around it; got {dst} for src {src}")
    check_target(target, overwrite)
    return src, target


class Staging:
    """Makes `dst`; `with Staging.open(dst, job) as staging`, then write into `staging.folder`.

    Args:
        dst: the folder to create.
        job: an identifier of this work. Finished files of the same job are kept, those of another removed.
    """

    def __init__(self, dst: Path, job: str) -> None:
        self.dst = dst
        self.path = partial_path(dst)
        self.folder = self.path / "checkpoint"
        self._journal = self.path / "journal.jsonl"
        self._journal_lock = threading.Lock()
        self._torn = False
        self.finished = self._read_journal(job)
        self._keep_only(set(self.finished))
        if not self.finished:
            self._torn = False
            self._append({"job": job}, anew=True)

    @classmethod
    @contextmanager
    def open(cls, dst: Path, job: str, *, overwrite: bool) -> Iterator[Staging]:
        """Locks the hidden folder. After a failure it keeps only what a second call can continue from.

        Raises:
            OSError: the folder cannot be written to; another process is working there.
            FileExistsError: `dst` exists and may not be replaced.
        """
        path = partial_path(dst)
        if path.is_dir() and any(path.iterdir()) and not (path / "lock").exists():
            raise FileExistsError(errno.EEXIST, "was not made here, and is in the way: move it", str(path))
        was_there = path.exists()
        try:
            dst.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(exist_ok=True)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            message = f"cannot be written to ({reason(error)}): choose another dst, or change its rights"
            raise OSError(error.errno, message, str(path)) from None
        staging, mine = None, False
        try:
            _take_lock(lock, path)
            mine = not was_there
            _put_back(path / ASIDE, dst)
            check_target(dst, overwrite)
            staging = cls(dst, job)
            yield staging
        finally:
            if staging is not None:
                staging._leave()
            elif mine:  # its journal could not be written
                shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):  # nothing was written to the lock file
                os.close(lock)

    def _read_journal(self, job: str) -> dict[str, dict[str, Any]]:
        """{name: entry} of the finished files of this job; empty if the journal is another job's."""
        text = self._journal.read_text(errors="replace") if self._journal.is_file() else ""
        self._torn = not text.endswith("\n")  # the process was killed while it wrote the last line
        entries = []
        for line in text.splitlines():
            with suppress(ValueError):
                entries.append(json.loads(line))
        if entries and isinstance(entries[0], dict) and entries[0].get("job") == job:
            files = [entry for entry in entries[1:] if isinstance(entry, dict) and "file" in entry]
            return {str(entry["file"]): entry for entry in files}
        if entries:
            warnings.warn(
                f"{self.path} was left by another job (another plan, source or shard size); it is cleared",
                stacklevel=2,
            )
        return {}

    def _keep_only(self, names: set[str]) -> None:
        self.folder.mkdir(exist_ok=True)
        for path in self.folder.iterdir():
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self.finished = {name: e for name, e in self.finished.items() if (self.folder / name).is_file()}

    def _append(self, entry: dict[str, Any], *, anew: bool = False) -> None:
        line = ("\n" if self._torn else "") + json.dumps(entry) + "\n"
        try:
            _write_file(self._journal, line.encode(), anew=anew)
            fsync_path(self._journal)
            fsync_path(self.path)
        except OSError as error:
            raise write_error(error, self._journal) from None
        self._torn = False  # an incomplete last line has been ended

    def forget(self, name: str) -> None:
        """Removes a file that turned out to be damaged from the finished ones of this run."""
        del self.finished[name]

    def finish(self, name: str, **facts: Any) -> None:
        """Records that a file of `folder` is complete; its bytes must be on the disk already."""
        try:
            fsync_path(self.folder)
        except OSError as error:
            raise write_error(error, self.folder) from None
        entry = {"file": name, **facts}
        with self._journal_lock:  # several threads may finish files at the same time
            self._append(entry)
            self.finished[name] = entry

    def write(self, contents: Mapping[str, bytes]) -> None:
        """Writes small files into `folder`: {path in it: content}."""
        for name, content in contents.items():
            path = self.folder / name
            try:
                path.parent.mkdir(exist_ok=True)
                _write_file(path, content, anew=True)
            except OSError as error:
                raise write_error(error, path) from None

    def publish(self, overwrite: bool) -> None:
        """Renames the folder to `dst`, once all its files are on the disk.

        Raises:
            FileExistsError: `dst` has appeared meanwhile and may not be replaced.
            OSError: the disk fails; says whether `dst` is complete.
        """
        for path in [*self.folder.rglob("*"), self.folder]:
            if path.parent != self.folder or path.name not in self.finished:
                try:
                    fsync_path(path)
                except OSError as error:
                    raise write_error(error, path) from None
        check_target(self.dst, overwrite)  # again: it may have appeared meanwhile
        try:
            replaced = _swap(self.folder, self.dst, self.path / ASIDE)
        except OSError as error:
            raise write_error(error, self.dst) from None
        self.finished = {}
        try:
            fsync_path(self.dst.parent)
        except OSError as error:
            message = (
                f"is complete, but its name may not be on the disk yet ({reason(error)}): check the disk"
            )
            raise OSError(error.errno, message, str(self.dst)) from None
        shutil.rmtree(replaced, ignore_errors=True)

    def _leave(self) -> None:
        if self.finished:
            self._keep_only(set(self.finished))
        else:
            shutil.rmtree(self.path, ignore_errors=True)


def _take_lock(lock: int, path: Path) -> None:
    busy = BlockingIOError(
        errno.EWOULDBLOCK, "another process is working there: wait for it, or choose another dst", str(path)
    )
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    except OSError as error:  # network file systems without locks
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
    try:
        same = os.path.samestat(os.fstat(lock), os.stat(path / "lock"))
    except FileNotFoundError:
        same = False
    if not same:  # the other process has just finished and removed the folder
        raise busy


def _swap(new: Path, old: Path, aside: Path) -> Path:
    """Renames `new` to `old`; returns where the old folder is then.

    This is one step where the kernel and the file system can exchange names. Elsewhere there are two, between
    which `old` does not exist: after an error it is put back at once, after a kill by the next call.
    """
    if not os.path.lexists(old):
        os.rename(new, old)
        return new
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = os.fsencode(new), os.fsencode(old)
    if renameat2 and renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return new
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except BaseException:
        os.rename(aside, old)
        raise
    return aside


def _put_back(aside: Path, dst: Path) -> None:
    """Moves a checkpoint that was being replaced back to `dst`, if a kill left no `dst`."""
    if os.path.lexists(dst):
        shutil.rmtree(aside, ignore_errors=True)
    elif os.path.lexists(aside):
        os.rename(aside, dst)


def _write_file(path: Path, content: bytes, *, anew: bool) -> None:
    """Appends `content` to a file; with `anew`, replaces what the file held."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if anew else 0)
    fd = os.open(path, flags, 0o666)
    try:
        write_all(fd, content, os.fstat(fd).st_size)
    finally:
        os.close(fd)
