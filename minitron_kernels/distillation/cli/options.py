"""An option of minitron-distill: a flag of the command line and a key of a TOML file, one and the same.

The flag --seq-len is the key seq_len. A value of either is parsed and checked by the same function.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minitron_kernels._command.values import MOST, MOST_SEED, at_least, byte_count, count


@dataclass(frozen=True)
class Option:
    """One option.

    Args:
        name: with underscores, as in TOML.
        parse: text -> value; raises ValueError or ArgumentTypeError.
        help: a few words; the default is added.
        default: where it is given nowhere; None: it is not set.
        many: whether it takes several values, a list in TOML.
        metavar: what stands for the value in the help.
        toml: types that TOML may have for it.
        short: a flag of one letter.
        may_change: whether a run that is resumed may have another value.
    """

    name: str
    parse: Callable[[str], Any]
    help: str
    default: Any = None
    many: bool = False
    metavar: str = ""
    toml: tuple[type, ...] = (str,)
    short: str = ""
    may_change: bool = False

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return "--" + self.name.replace("_", "-")

    def read(self, value: Any, where: str) -> Any:
        """The value of a TOML file, parsed and checked.

        Raises:
            ValueError: it is of another type, or wrong; begins with `where`, which names the key.
        """
        entries = value if isinstance(value, list) else [value]
        if isinstance(value, list) and not self.many:
            raise ValueError(f"{where} must be one value, got a list")
        if not entries:
            raise ValueError(f"{where} must not be an empty list")
        return [self._entry(entry, where) for entry in entries] if self.many else self._entry(value, where)

    def _entry(self, entry: Any, where: str) -> Any:
        # a bool is an int in Python, and none of them here
        if not isinstance(entry, self.toml) or (isinstance(entry, bool) and bool not in self.toml):
            wanted = " or ".join(_TOML_NAMES[kind] for kind in self.toml)
            raise ValueError(f"{where} must be {wanted}, got {entry!r}")
        if isinstance(entry, bool):
            return entry
        try:
            return self.parse(repr(entry) if isinstance(entry, float) else str(entry))
        except (ValueError, argparse.ArgumentTypeError) as error:
            said = str(error) if isinstance(error, argparse.ArgumentTypeError) else "has a wrong value"
            raise ValueError(f"{where} {said}" + ("" if repr(entry) in said else f": {entry!r}")) from None


_TOML_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def path(name: str, help: str, **more: Any) -> Option:
    """A file or folder."""
    return Option(name, str, help, **{"metavar": "PATH", **more})


def whole(name: str, help: str, least: int = 1, most: int = MOST, **more: Any) -> Option:
    """A whole number from `least` to `most`."""
    return Option(name, at_least(least, most), help, metavar="N", toml=(int,), **more)


def seed(help: str, **more: Any) -> Option:
    """The seed of random numbers."""
    return whole("seed", help, 0, MOST_SEED, **more)


def amount(name: str, help: str, **more: Any) -> Option:
    """A count such as 8.4B."""

    def parse(text: str) -> int:
        try:
            value = int(count(text))
        except ValueError:
            value = 0
        if value < 1:
            raise argparse.ArgumentTypeError(f"must be a number such as 500M or 8.4B, got {text!r}")
        return value

    return Option(name, parse, help, metavar="N", toml=(int, float, str), **more)


def size(name: str, help: str, **more: Any) -> Option:
    """A number of bytes such as 256MiB."""

    def parse(text: str) -> int:
        try:
            return byte_count(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a size such as 256MiB or 2GB, got {text!r}") from None

    return Option(name, parse, help, metavar="SIZE", toml=(int, str), **more)


def real(name: str, help: str, least: float = 0.0, *, above: bool = False, **more: Any) -> Option:
    """A finite number from `least` on, or above it; `most` and `below` are its other end."""
    most = more.pop("most", math.inf)

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least < value if above else least <= value) or not value <= most or value == math.inf:
            end = f" and at most {most:g}" if most < math.inf else ""
            begin = f"above {least:g}" if above else f"at least {least:g}"
            raise argparse.ArgumentTypeError(f"must be a number {begin}{end}, got {text!r}")
        return value

    return Option(name, parse, help, metavar="X", toml=(int, float), **more)


def real_or(name: str, words: tuple[str, ...], help: str, most: float = math.inf, **more: Any) -> Option:
    """One of some words, or a number from 0 on."""
    number = real(name, help, most=most)

    def parse(text: str) -> Any:
        if text in words:
            return text
        try:
            return number.parse(text)
        except argparse.ArgumentTypeError:
            end = f" to {most:g}" if most < math.inf else " on"
            wanted = f"{', '.join(words)} or a number from 0{end}"
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}") from None

    metavar = "|".join((*words, "X"))
    return Option(name, parse, help, metavar=metavar, toml=(str, int, float), **more)


def one_of(name: str, words: tuple[str, ...], help: str, **more: Any) -> Option:
    """One of some words."""

    def parse(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(words)}, got {text!r}")
        return text

    return Option(name, parse, help, metavar="|".join(words), **more)


def switch(name: str, help: str, **more: Any) -> Option:
    """On or off: --name, --no-name, or true and false."""
    return Option(name, str, help, **{"default": False, "toml": (bool,), **more})
