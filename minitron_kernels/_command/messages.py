"""What a command prints: results on standard output, all else as one line on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


def say(program: str, kind: str, message: object) -> None:
    """One line on standard error: the command, what kind of message, and the message."""
    print(f"{program}: {kind}: {' '.join(str(message).split())}", file=sys.stderr)


def message_of(error: Exception, in_words: Callable[[str], str] = str) -> str:
    """An error in one line.

    Args:
        error: what was raised.
        in_words: puts options of the command line in place of the library's arguments.
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return in_words(f"{error.filename}: {error.strerror}")
    if isinstance(error, ValueError | TypeError | OSError | RuntimeError | ImportError) and str(error):
        return in_words(str(error))
    return f"{type(error).__name__}: {error} (--debug shows where)"  # an unexpected error


def show(text: str) -> None:
    """Prints with substitutes for characters that standard output cannot encode, so that it never fails."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    for sign, plain in (("→", "->"), ("·", "*"), ("√", "root of "), ("τ", "temperature")):
        if sign.encode(encoding, errors="ignore") == b"":
            text = text.replace(sign, plain)
    print(text.encode(encoding, errors="replace").decode(encoding))


def few(names: Sequence[str]) -> str:
    """The first of many names, and how many there are besides."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
