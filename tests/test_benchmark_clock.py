"""The benchmarks' clock on a GPU, against a stream that is simulated: what each launch costs host and GPU is
given, so that what must be measured is known.
"""

import pytest

from tools.benchmark_scripts import FOLDER

if not FOLDER.is_dir():  # an sdist may be tested without it
    pytest.skip("no benchmarks folder here", allow_module_level=True)

from common import gpu_clock
from common.gpu_clock import MOST_SPIN_S, TRIES, GpuTimer

HZ = 1.7e9  # of the spin


class Stream:
    """A host and a GPU, each with the second until which it is busy; stands in for torch.cuda."""

    def __init__(self, queue=10**9):
        self.host = self.gpu = 0.0
        self.queue = queue  # launches that wait at most; the host then waits too
        self.pending = []
        self.spins = []

    def enqueue(self, seconds, host_s=0.0):
        self.host += host_s
        self.pending = [end for end in self.pending if end > self.host]
        if len(self.pending) >= self.queue:
            self.host = self.pending[-self.queue]
        self.gpu = max(self.gpu, self.host) + seconds
        self.pending.append(self.gpu)

    def synchronize(self):
        self.host = max(self.host, self.gpu)

    def _sleep(self, cycles):
        self.spins.append(cycles / HZ)
        self.enqueue(cycles / HZ)

    def Event(self, enable_timing):
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, stream):
        self.stream = stream

    def record(self):
        self.at = max(self.stream.gpu, self.stream.host)

    def query(self):
        return self.at <= self.stream.host

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


def timer(stream, call, flush_s=0.0):
    return GpuTimer(call, stream, lambda: stream.host, lambda: stream.enqueue(flush_s))


def launches(stream, number, host_s, gpu_s):
    def call():
        for _ in range(number):
            stream.enqueue(gpu_s, host_s)

    return call


@pytest.mark.parametrize("host_s", [1e-6, 20e-6, 1e-3])
def test_device_time_is_without_launch_latency(host_s):
    """20 kernels of 2 us each are 40 us, however slowly they are launched; the wall time shows that."""
    stream = Stream()
    clock = timer(stream, launches(stream, 20, host_s, 2e-6))
    for _ in range(3):
        sample = clock.sample()
        assert sample.busy_s == pytest.approx(40e-6, rel=1e-6) and sample.hidden
        assert sample.wall_s == pytest.approx(20 * max(host_s, 2e-6), rel=0.1)
    assert clock.calls == 6  # one for either time: the spin was long enough at once


def test_a_spin_that_was_too_short_is_repeated_with_a_longer_one():
    """The second call takes the host longer than the first, by which the spin was chosen."""
    stream, costs = Stream(), iter([1e-6, 5e-3, 5e-3, 5e-3, 5e-3])

    def call():
        stream.enqueue(1e-5, next(costs))
        stream.enqueue(1e-5, 0.0)

    clock = timer(stream, call)
    sample = clock.sample()
    assert sample.hidden and sample.busy_s == pytest.approx(2e-5, rel=1e-6)
    assert clock.calls == 3 and stream.spins[-1] > 5e-3 > stream.spins[-2]


def test_a_call_that_waits_is_marked_and_not_tried_again_and_again():
    stream = Stream()

    def call():
        stream.enqueue(1e-3, 1e-5)
        stream.synchronize()
        stream.enqueue(1e-3, 1e-5)

    clock = timer(stream, call)
    first = clock.sample()
    assert not first.hidden and clock.calls == 1 + TRIES
    second = clock.sample()
    assert not second.hidden and clock.calls == 1 + TRIES + 2
    assert second.busy_s == pytest.approx(2e-3, rel=0.05)
    assert max(stream.spins) <= MOST_SPIN_S * 1.001


def test_a_full_queue_of_launches_is_marked():
    """The host stops behind 1024 launches until the GPU goes on: no spin hides what comes after."""
    stream = Stream(queue=1024)
    assert not timer(stream, launches(stream, 5000, 5e-6, 1e-6)).sample().hidden
    assert timer(stream, launches(stream, 500, 5e-6, 1e-6)).sample().hidden


def test_the_flush_is_not_timed():
    stream = Stream()
    clock = timer(stream, launches(stream, 1, 1e-6, 1e-5), flush_s=0.3)
    assert clock.sample().busy_s == pytest.approx(1e-5, rel=1e-6)


def test_cycles_are_measured_once():
    stream = Stream()
    assert gpu_clock.cycles_per_s(stream) == pytest.approx(HZ)
    count = len(stream.spins)
    assert gpu_clock.cycles_per_s(stream) == pytest.approx(HZ) and len(stream.spins) == count
