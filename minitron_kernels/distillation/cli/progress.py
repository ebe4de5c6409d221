"""Progress on standard error: a bar in a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

_SECONDS = 30.0  # between lines, where there is no terminal


class Progress:
    """Counts steps, with figures beside them and the time that is left.

    In a terminal it is tqdm's bar, where that is installed. Elsewhere it prints a line at the first and the
    last step, and at most every 30 seconds between them.

    Args:
        what: is being done, in a word.
        total: steps.
        done: steps that were done before.
        unit: of a step.
        quiet: nothing is printed.
    """

    def __init__(
        self, what: str, total: int, *, done: int = 0, unit: str = "step", quiet: bool = False
    ) -> None:
        self._what, self._total, self._unit, self._quiet = what, total, unit, quiet
        self._done = self._first = done
        self._begin = time.monotonic()
        self._said, self._due = -_SECONDS, False
        self._figures: dict[str, float] = {}
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(desc=what, total=total, initial=done, unit=unit, dynamic_ncols=True)

    def advance(
        self, steps: int = 1, figures: Mapping[str, float] | None = None, *, more_comes: bool = False
    ) -> None:
        """`steps` more are done.

        Args:
            steps: how many.
            figures: shown until others come.
            more_comes: show() follows with this step's figures; a line waits for them.
        """
        self._done += steps
        self._due = not self._quiet and (
            self._done >= self._total or time.monotonic() - self._said >= _SECONDS
        )
        self.show(figures or {}, more_comes=more_comes)
        if self._bar is not None:
            self._bar.update(steps)

    def show(self, figures: Mapping[str, float], *, more_comes: bool = False) -> None:
        """Figures to be shown from now on."""
        self._figures |= figures
        if self._bar is not None:
            self._bar.set_postfix_str(_written(self._figures), refresh=False)
        elif self._due and not more_comes:
            self._due, self._said = False, time.monotonic()
            print(self._line(self._said), file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _line(self, now: float) -> str:
        made, seconds = self._done - self._first, now - self._begin
        left = (self._total - self._done) * seconds / made if made else 0.0
        parts = [f"{self._what}: {self._unit} {self._done:,} of {self._total:,}"]
        parts += [_written(self._figures)] if self._figures else []
        parts.append(f"{duration(left)} left" if self._done < self._total else f"in {duration(seconds)}")
        return ", ".join(parts)


def _written(figures: Mapping[str, float]) -> str:
    return ", ".join(
        f"{value:,.0f} {name}" if name.endswith("/s") else f"{name} {value:.4g}"
        for name, value in figures.items()
    )


def duration(seconds: float) -> str:
    """Seconds as 45 s, 3:20 min or 27:05 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02} h" if hours else f"{minutes}:{whole % 60:02} min"
