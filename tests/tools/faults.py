"""Faults planted in copies of the sources, by which a check shows that it is alive."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

_Fault = TypeVar("_Fault")
_Name = TypeVar("_Name")


def some(faults: Mapping[_Name, _Fault]) -> list[_Name]:
    """Names of the faults that are planted: two of a table; all with MINITRON_TEST_FAULTS=all.

    Each takes a build of the kernels. Two show that a check is alive; all are for a change of kernels or of
    checks.
    """
    names = list(faults)
    if os.environ.get("MINITRON_TEST_FAULTS") == "all":
        return names
    return names[:: max(1, len(names) // 2)][:2]


@dataclass(frozen=True)
class Fault:
    """In `file` (under csrc/, or under ops/ of the package), the one occurrence of `old` becomes `new`."""

    file: str
    old: str
    new: str

    def plant(self, text: str) -> str:
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.file} has {count} times, wanted once: {self.old!r}")
        return text.replace(self.old, self.new)
