"""Sums of a loss's parts over tokens, and the clock beside them; read only where something is logged."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minitron_kernels.distillation.loss import DistillationRecord

_PARTS = ("loss", "kl", "ce", "entropy", "label_logprob", "hidden", "hidden_weight")
_LOGGED = ("kl", "ce", "entropy", "hidden", "hidden_weight")


class Sums:
    """Σ over tokens of each part of the loss, on the device."""

    def __init__(self, device: torch.device) -> None:
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._device = device
        self._sums: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, record: DistillationRecord, num_items: Tensor | int | None) -> None:
        """Adds a micro-batch whose parts were divided by `num_items`, or by its own tokens."""
        tokens = record.num_tokens.to(self._dtype)
        divisor = tokens if num_items is None else num_items
        found = {name: getattr(record, name) for name in _PARTS}
        sums = {name: x.detach().to(self._dtype) * divisor for name, x in found.items() if x is not None}
        if record.hidden_weight is not None:  # one for the call, and no sum over its tokens
            sums["hidden_weight"] = record.hidden_weight.to(self._dtype) * tokens
        for name, value in (sums | {"tokens": tokens}).items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def totals(self, accelerator: Any, **seconds: float) -> dict[str, float]:
        """The sums over all processes, which all call; `seconds` are summed with them."""
        names = [*self._sums, *seconds]
        own = torch.tensor(list(seconds.values()), dtype=self._dtype, device=self._device)
        values = torch.cat((torch.stack(list(self._sums.values())), own)) if self._sums else own
        return dict(zip(names, accelerator.reduce(values, reduction="sum").tolist(), strict=True))

    def means(self, accelerator: Any) -> dict[str, float]:
        """Means over all tokens of all processes, the perplexity, and the number of tokens."""
        totals = self.totals(accelerator)
        return means_of(totals) | {"tokens": int(totals.get("tokens", 0))}


def means_of(totals: dict[str, float]) -> dict[str, float]:
    """{part: mean over tokens}; NaN where no token counts."""
    tokens = totals.get("tokens", 0)
    means = {name: totals[name] / tokens if tokens else float("nan") for name in _PARTS if name in totals}
    if (logprob := means.pop("label_logprob", None)) is not None:
        means["perplexity"] = float(torch.tensor(-logprob, dtype=torch.float64).exp())
    return means


class Window:
    """What happened since the last logging step: sums, seconds, and those of them that the teacher took."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.sums = Sums(device)
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._teacher = 0.0
        self._seconds = 0.0
        self._since: float | None = None  # None: the clock stands still

    def start(self) -> None:
        """Starts the clock, if it stands still."""
        if self._since is None:
            self._since = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock for what is not training."""
        running = self._since is not None
        self._stop()
        teacher = self._teacher, len(self._events)
        yield
        self._teacher = teacher[0]
        while len(self._events) > teacher[1]:
            self._events.pop()
        if running:
            self.start()

    def _stop(self) -> None:
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    @contextlib.contextmanager
    def teacher_timed(self) -> Iterator[None]:
        """Measures the teacher; on a GPU by events of its stream, which nobody waits for."""
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            self._collect()
        else:
            since = time.perf_counter()
            yield
            self._teacher += time.perf_counter() - since

    def _collect(self) -> None:
        """Adds up the events that have happened."""
        while self._events and self._events[0][1].query():
            begin, end = self._events.popleft()
            self._teacher += begin.elapsed_time(end) / 1000

    def close(self, accelerator: Any) -> dict[str, float]:
        """What to log of the window, over all processes, which all call; a new one begins."""
        running = self._since is not None
        self._stop()
        self._collect()  # the loss was read just before: all events have happened
        totals = self.sums.totals(accelerator, seconds=self._seconds, teacher=self._teacher)
        logs = {name: value for name, value in means_of(totals).items() if name in _LOGGED}
        if totals["seconds"] > 0:
            # seconds are summed over processes, and they all ran at the same time
            logs["tokens_per_second"] = (
                totals.get("tokens", 0.0) / totals["seconds"] * accelerator.num_processes
            )
            logs["teacher_share"] = totals["teacher"] / totals["seconds"]
        self.sums, self._teacher, self._seconds = Sums(self._device), 0.0, 0.0
        if running:
            self.start()
        return logs
