"""Public names that are imported when they are asked for: what needs no torch does not wait for it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def load(package: str, homes: Mapping[str, str], name: str) -> Any:
    """A package's public name, imported from its module and kept in the package from then on.

    Args:
        package: its full name, whose `__getattr__` calls this.
        homes: {public name: the module that has it}.
        name: what is asked for.

    Raises:
        AttributeError: it is not a public name.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(homes[name]), name)
    setattr(sys.modules[package], name, value)
    return value


def attach(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package all of whose public names are imported so; see load()."""

    def get(name: str) -> Any:
        return load(package, homes, name)

    return get, lambda: sorted(homes)
