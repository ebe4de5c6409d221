"""Times work on a CUDA stream by events, without the latency of its launches and with a cold L2 cache.

Events around a call measure the host too where the host is slower than the GPU: the stream is empty when
the first kernel comes. So the GPU is first given a kernel that only spins, for longer than the host needs to
enqueue the call; the first event comes after it, and the work then runs without gaps. Whether the spin was
long enough can be seen: the first event must not have been reached when the host is done. If it was, the
sample is repeated with a longer spin, and at last marked. A call that waits for the GPU itself is always
marked: its gaps are its own.

The L2 cache is emptied by reading: lines that a flush had written would go to memory during the timed work.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

TRIES = 4
FIRST_SPIN_S, MOST_SPIN_S = 1e-3, 0.25
CALIBRATION_CYCLES = 20_000_000


class Sample(NamedTuple):
    """One measurement of a call.

    Attributes:
        wall_s: from the call until its result is there, seen by the host.
        busy_s: of the processor that does the work: CPU seconds, or between two events on the stream.
        hidden: whether busy_s is without the latency of launches.
    """

    wall_s: float
    busy_s: float
    hidden: bool = True


@functools.cache
def cycles_per_s(cuda: Any) -> float:
    """How fast torch.cuda._sleep() counts."""
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    cuda._sleep(1000)
    cuda.synchronize()
    start.record()
    cuda._sleep(CALIBRATION_CYCLES)
    end.record()
    cuda.synchronize()
    return CALIBRATION_CYCLES / (start.elapsed_time(end) / 1e3)


@functools.cache
def _flush_buffer() -> torch.Tensor:
    size = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0)
    return torch.zeros(max(4 * size, 64 << 20) // 4, dtype=torch.int32, device="cuda")


def flush() -> None:
    """Fills the L2 cache of the current GPU with what no benchmark uses."""
    _flush_buffer().sum(dtype=torch.int32)


class GpuTimer:
    """Samples of one call, which keep the length of the spin that the call needs.

    Args:
        call: what is timed, on the current stream.
        cuda: torch.cuda, or what stands in for it.
        now: the host's clock, in seconds.
        flush: empties the L2 cache.
    """

    def __init__(
        self,
        call: Callable[[], object],
        cuda: Any = None,
        now: Callable[[], float] = time.perf_counter,
        flush: Callable[[], None] = flush,
    ) -> None:
        self.call, self.now, self.flush = call, now, flush
        self.cuda = torch.cuda if cuda is None else cuda
        self.calls = 0
        self.spin_s = 0.0
        self.tries = TRIES

    def sample(self) -> Sample:
        """Calls at least twice: once for the wall time of a call on an idle GPU, once behind a spin."""
        wall, enqueued = self._wall()
        self.spin_s = min(MOST_SPIN_S, max(FIRST_SPIN_S, self.spin_s, 1.5 * enqueued))
        for attempt in range(self.tries):
            busy, hidden, enqueued = self._behind_a_spin()
            if hidden or attempt + 1 == self.tries:
                break
            self.spin_s = min(MOST_SPIN_S, max(2 * self.spin_s, 1.5 * enqueued))
        if not hidden:  # no spin hides a wait inside the call: do not try again in every sample
            self.tries, self.spin_s = 1, 0.0
        return Sample(wall, busy, hidden)

    def _wall(self) -> tuple[float, float]:
        """Seconds until the result is there, and until the host may go on."""
        self.cuda.synchronize()
        begin = self.now()
        self.call()
        enqueued = self.now() - begin
        self.cuda.synchronize()
        self.calls += 1
        return self.now() - begin, enqueued

    def _behind_a_spin(self) -> tuple[float, bool, float]:
        cuda = self.cuda
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        cycles = int(self.spin_s * cycles_per_s(cuda))
        self.flush()
        cuda._sleep(cycles)
        start.record()
        begin = self.now()
        self.call()
        end.record()
        hidden = not start.query()
        enqueued = self.now() - begin
        cuda.synchronize()
        self.calls += 1
        return start.elapsed_time(end) / 1e3, hidden, enqueued
