"""Text files that are there as a whole, or as they were before; hashes of files; what was wrong with one."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from pathlib import Path


def reason(error: OSError) -> str:
    """What went wrong, without the file. An error that was raised with a text alone has no `strerror`."""
    return error.strerror or str(error)


DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# what safetensors (Rust) and torch say of a full disk
_FULL = re.compile(
    r"No space left on device|Disk quota exceeded|os error 28\b|"
    r"PytorchStreamWriter failed writing file|inline_container.*unexpected pos"
)


def full_disk(error: BaseException, folder: str | os.PathLike[str]) -> str:
    """What to say where an error means that the disk of `folder` is full; "" where it does not.

    Libraries raise errors of their own, with the text alone.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in DISK_IS_FULL:
            return reason(seen)
        if _FULL.search(str(seen)):
            free = shutil.disk_usage(folder).free
            return f"the disk is full ({free / 1e9:.2f} GB are free)"
        seen = seen.__cause__ or seen.__context__
    return ""


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    found = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while piece := stream.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def sha256_of_folder(folder: str | os.PathLike[str], *, hidden: bool = True) -> str:
    """Of the names and bytes of all files below a folder, but for what Python compiles beside its modules.

    Args:
        folder: which.
        hidden: whether files in hidden folders count, such as what a download keeps of its own (`.cache`).
    """
    folder = Path(folder)
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and "__pycache__" not in path.parts
        and (hidden or not any(part.startswith(".") for part in path.relative_to(folder).parts[:-1]))
    ]
    lines = [f"{path.relative_to(folder).as_posix()} {sha256_of(path)}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file in UTF-8. One that was at `path` stays until the new one is complete and on the disk.

    Its mode is that of any new file, 0o666 without what the process's umask takes.

    Raises:
        OSError: it cannot be written; no other file is left beside it.
    """
    path = Path(path)
    try:
        _write(path, text)
    except OSError as error:  # the name of the file beside it says nothing to a reader
        raise OSError(error.errno, reason(error), str(path)) from None


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise
