"""Progress on standard error: a bar in a terminal, by tqdm where it is installed; elsewhere lines."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

_SECONDS = 30.0  # between lines, where there is no terminal
_PATIENCE = 10.0  # before a bar's first line there: what is done by then needs none
_lines = False  # whether bars that nobody asked for are lines where there is no terminal


def in_terminal() -> bool:
    """Whether standard error is a terminal."""
    return sys.stderr.isatty()


def without_bars(quiet: bool) -> None:
    """Turns off the bars of transformers and datasets, for all of the process: in a log nobody wants them.

    Args:
        quiet: also where there is a terminal.
    """
    if not quiet and in_terminal():
        return
    from transformers.utils import logging

    logging.disable_progress_bar()
    if importlib.util.find_spec("datasets") is not None:
        import datasets

        datasets.disable_progress_bars()


def lines_wanted() -> bool:
    """Whether lines_in_logs() is in force."""
    return _lines


@contextlib.contextmanager
def lines_in_logs() -> Iterator[None]:
    """For commands: what shows a bar in a terminal by default prints lines elsewhere, as in a job's log."""
    global _lines
    before, _lines = _lines, True
    try:
        yield
    finally:
        _lines = before


def tqdm_for(progress: bool | None) -> Callable[..., Any] | None:
    """tqdm, or Lines, to be called as tqdm is; None where nothing is wanted, or it is not installed.

    Args:
        progress: whether a bar is shown; None: where standard error is a terminal, and lines elsewhere under
            lines_in_logs().

    Raises:
        ImportError: a bar is asked for, and tqdm is not installed.
    """
    if progress is False:
        return None
    if progress is None and _lines and not in_terminal():
        return Lines
    try:
        from tqdm import tqdm
    except ImportError:
        if progress:
            raise
        return None
    return functools.partial(tqdm, disable=None if progress is None else False)


class Progress:
    """Counts steps, with figures beside them and the time that is left.

    In a terminal it is tqdm's bar, where that is installed. Elsewhere it prints a line at the first and the
    last step, and at most every 30 seconds between them.

    Args:
        what: is being done, in a word.
        total: steps; None: not known, and lines alone.
        done: steps that were done before.
        unit: of a step.
        quiet: nothing is printed.
        patience: seconds before the first line.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        *,
        done: int = 0,
        unit: str = "step",
        quiet: bool = False,
        patience: float | None = None,
    ) -> None:
        self.what, self._total, self._unit, self._quiet = what, total, unit, quiet
        self._done = self._first = done
        self._begin = time.monotonic()
        self._patient = patience is not None
        self._said, self._due = -_SECONDS if patience is None else self._begin - _SECONDS + patience, False
        self._figures: dict[str, float] = {}
        self._bar: Any = None
        if not quiet and total is not None and in_terminal():
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
        late = time.monotonic() - self._said >= _SECONDS
        last = self._total is not None and self._done >= self._total and not self._patient
        self._due = not self._quiet and (last or late)
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
        figures = [_written(self._figures)] if self._figures else []
        if self._total is None:
            counted = f"{self._unit} {self._done:,}"
            return ", ".join([f"{self.what}: {counted}", *figures, f"after {duration(seconds)}"])
        left = (self._total - self._done) * seconds / made if made else 0.0
        counted = f"{self._unit} {self._done:,} of {self._total:,}"
        if self._unit == "B":
            counted = f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB"
        end = f"{duration(left)} left" if self._done < self._total else f"in {duration(seconds)}"
        return ", ".join([f"{self.what}: {counted}", *figures, end])


class Lines:
    """What is used of tqdm, as lines, for a log: the first after ten seconds, then one every thirty."""

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        *,
        desc: str = "",
        total: int | None = None,
        initial: int = 0,
        unit: str = "it",
        **_: Any,
    ) -> None:
        if total is None and isinstance(iterable, Sized):
            total = len(iterable)
        self._iterable = iterable
        self._progress = Progress(desc, total, done=initial, unit=unit, patience=_PATIENCE)

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable or ():
            yield item
            self.update()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, steps: int = 1) -> None:
        """`steps` more are done."""
        self._progress.advance(steps)

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Text that tqdm shows behind its bar; a line has the time that is left instead."""

    def close(self) -> None:
        """Nothing to close."""
        self._progress.close()


def _written(figures: Mapping[str, float]) -> str:
    return ", ".join(
        f"{value:,.0f} {name}" if name.endswith("/s") else f"{name} {value:.4g}"
        for name, value in figures.items()
    )


def duration(seconds: float) -> str:
    """Seconds as 45 s, 3:20 min, 27:05 h or 184 days."""
    whole = round(seconds)
    if whole >= 4 * 86400:
        return f"{whole / 86400:,.0f} days"
    if whole < 60:
        return f"{whole} s"
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02} h" if hours else f"{minutes}:{whole % 60:02} min"
