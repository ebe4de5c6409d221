"""What a command prints: results on standard output, all else as one line on standard error."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable, Sequence

from minitron_kernels._files import reason

# what to do about an error of which the system's own words are all that is said
_ADVICE = {
    errno.ENOSPC: "free some space, or take another disk",
    errno.EDQUOT: "free some space, or take another disk",
    errno.EACCES: "change its rights, or take another",
    errno.EROFS: "take a place that can be written to",
    errno.EISDIR: "give a file, not a folder",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
}
CLOSED = 141  # the exit code of a program that SIGPIPE ended


def say(program: str, kind: str, message: object) -> None:
    """One line on standard error: the command, what kind of message, and the message."""
    print(f"{program}: {kind}: {' '.join(str(message).split())}", file=sys.stderr)


def message_of(error: Exception, in_words: Callable[[str], str] = str) -> str:
    """An error in one line.

    Args:
        error: what was raised.
        in_words: puts options of the command line in place of the library's arguments.
    """
    if isinstance(error, MemoryError):
        return f"there is not enough memory{f': {error}' if str(error) else ''}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        advice = _ADVICE.get(error.errno or 0, "")
        advice = f": {advice}" if advice and error.strerror == os.strerror(error.errno or 0) else ""
        return in_words(f"{error.filename}: {error.strerror}{advice}")
    if isinstance(error, ValueError | TypeError | OSError | RuntimeError | ImportError) and str(error):
        return in_words(str(error))
    return f"{type(error).__name__}: {error} (--debug shows where)"  # an unexpected error


def show(text: str) -> None:
    """Prints with substitutes for characters that standard output cannot encode.

    Raises:
        SystemExit: its reader has closed it, and wants no more.
        OSError: it cannot be written to, as a file on a full disk.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    for sign, plain in (("→", "->"), ("·", "*"), ("√", "root of "), ("τ", "temperature")):
        if sign.encode(encoding, errors="ignore") == b"":
            text = text.replace(sign, plain)
    try:
        print(text.encode(encoding, errors="replace").decode(encoding), flush=True)
    except OSError as error:
        # what is left in its buffer would fail once more at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has closed the pipe
            raise SystemExit(CLOSED) from None
        raise OSError(error.errno, f"cannot be written to ({reason(error)})", "standard output") from None


def show_each(texts: Iterable[str]) -> None:
    """Prints texts, an empty line between them, each when it is made: an error hides none before it."""
    for number, text in enumerate(texts):
        show(f"\n{text}" if number else text)


def few(names: Sequence[str], most: int = 8) -> str:
    """The first of many names, and how many there are besides."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
