"""Values of a command line: how they are parsed, and what an error says of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def count(text: str) -> float:
    """A number such as 8.4e9, 8.4B or 500M."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    number = float(text[:-1]) * units[text[-1]] if text[-1:] in units else float(text)
    if not 0 < number < math.inf:
        raise ValueError(text)
    return number


def byte_count(text: str) -> int:
    """A size such as 2GB, 500MB or 1GiB, or a number of bytes."""
    units = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6, "KB": 10**3}
    for unit, size in units.items():
        if text.endswith(unit):
            return _positive(int(float(text.removesuffix(unit)) * size))
    return _positive(int(text))


def _positive(size: int) -> int:
    if size < 1:
        raise ValueError(size)
    return size


def at_least(least: int) -> Callable[[str], int]:
    """A parser of whole numbers that must not be less."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, got {text!r}")
        return value

    return read


def typed(name: str, parse: Any) -> Any:
    """`parse`, with the name that argparse shows in error messages."""

    def typed(text: str) -> Any:
        return parse(text)

    typed.__name__ = name
    return typed
