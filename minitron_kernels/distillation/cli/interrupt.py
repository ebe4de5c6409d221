"""SIGINT and SIGTERM: the first one asks for a clean stop, the second one stops at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME_SECONDS = 5.0  # torchrun passes on to its processes what they got from the terminal already


class Stopped(BaseException):
    """A second signal: stop at once."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interrupt:
    """While it is entered, `number` becomes the first signal's number, which work looks at between its steps.

    Args:
        on_first: called in the handler of the first signal, to say that work goes on to the end of its step.

    A second signal raises Stopped. Under torchrun, which sends a SIGTERM of its own after a Ctrl-C that all
    processes got, another one within 5 seconds counts as the same.
    """

    def __init__(self, on_first: Callable[[int], object]) -> None:
        self.number: int | None = None
        self._on_first = on_first
        self._at = 0.0
        self._before: dict[int, Any] = {}
        self._same = _SAME_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def __enter__(self) -> Interrupt:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._at = number, time.monotonic()
            self._on_first(number)
        elif time.monotonic() - self._at >= self._same:
            raise Stopped(number)


def exit_code(number: int) -> int:
    """What a shell says of a process that a signal ended."""
    return 128 + number
