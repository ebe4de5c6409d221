"""Values of a command line: how they are parsed, and what an error says of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
MOST = 2**53  # of anything: what more is would only overflow somewhere, without saying where


def count(text: str) -> float:
    """A number such as 8.4e9, 8.4B or 500M."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    number = float(text[:-1]) * units[text[-1]] if text[-1:] in units else float(text)
    if not 0 < number <= MOST:  # NaN too
        raise ValueError(text)
    return number


def byte_count(text: str) -> int:
    """A size such as 2GB, 500MB or 1GiB, or a number of bytes."""
    units = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6, "KB": 10**3}
    for unit, size in units.items():
        if text.endswith(unit):
            number = float(text.removesuffix(unit)) * size
            break
    else:
        number = int(text)
    if not 1 <= number <= MOST:  # NaN too
        raise ValueError(text)
    return int(number)


def at_least(least: int, most: int = MOST) -> Callable[[str], int]:
    """A parser of whole numbers that must not be less, nor more than `most`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            end = f"to {most}" if value > most or most < MOST else "on"
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} {end}, got {text!r}")
        return value

    return read


MOST_SEED = 2**32 - 1  # that NumPy takes, and so all libraries that draw


def typed(wanted: str, parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse`, whose errors say what is wanted."""

    def read(text: str) -> Any:
        try:
            return parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}") from None

    return read
