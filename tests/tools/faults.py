"""Faults planted in copies of the sources, by which a check shows that it is alive."""

from __future__ import annotations

from dataclasses import dataclass


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
