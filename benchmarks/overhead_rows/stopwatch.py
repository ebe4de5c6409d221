"""Divides the time of a call among its parts: functions of the library that are replaced by timed ones."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock


class Boundary(NamedTuple):
    """While `owner.name` runs, time belongs to `part`; what it calls may belong to another."""

    owner: Any
    name: str
    part: str
    lends: bool = False  # it returns a context manager, whose begin and end belong to the part too


class Stopwatch:
    """While it is entered, time is divided at the boundaries. Each moment belongs to one part."""

    def __init__(self, boundaries: Sequence[Boundary], rest: str) -> None:
        self._boundaries, self._rest = boundaries, rest
        self._part, self._since = rest, 0
        self._spent: dict[str, int] = defaultdict(int)
        self._patches = ExitStack()

    def __enter__(self) -> Stopwatch:
        for one in self._boundaries:
            timed = self._timed(getattr(one.owner, one.name), one)
            if isinstance(one.owner, type) and isinstance(vars(one.owner).get(one.name), staticmethod):
                timed = staticmethod(timed)  # type: ignore[assignment]
            self._patches.enter_context(mock.patch.object(one.owner, one.name, timed))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def measure(self, call: Callable[[], object]) -> dict[str, float]:
        """Seconds of one call in each part, whose sum is that of the call."""
        self._spent.clear()
        self._part, self._since = self._rest, time.perf_counter_ns()
        call()
        self._turn_to(self._rest)
        return {part: ns / 1e9 for part, ns in self._spent.items()}

    def _turn_to(self, part: str) -> str:
        now, before = time.perf_counter_ns(), self._part
        self._spent[before] += now - self._since
        self._part, self._since = part, now
        return before

    def _timed(self, function: Callable[..., Any], one: Boundary) -> Callable[..., Any]:
        @functools.wraps(function, updated=())
        def timed(*args: Any, **kwargs: Any) -> Any:
            before = self._turn_to(one.part)
            try:
                result = function(*args, **kwargs)
                return _Lent(result, self, one.part) if one.lends else result
            finally:
                self._turn_to(before)

        return timed


class _Lent:
    """A context manager, timed."""

    def __init__(self, inner: Any, watch: Stopwatch, part: str) -> None:
        self._inner, self._watch, self._part = inner, watch, part

    def __enter__(self) -> Any:
        before = self._watch._turn_to(self._part)
        try:
            return self._inner.__enter__()
        finally:
            self._watch._turn_to(before)

    def __exit__(self, *args: Any) -> Any:
        before = self._watch._turn_to(self._part)
        try:
            return self._inner.__exit__(*args)
        finally:
            self._watch._turn_to(before)
