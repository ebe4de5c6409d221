"""Floors of the benchmarks of memory: every way moves all bytes, the fastest is chosen, and a row that is
faster than its floor is shown as the floor's fault.
"""

import itertools

import numpy as np
import pytest
import torch

from tools.benchmark_scripts import FOLDER

if not FOLDER.is_dir():  # an sdist may be tested without it
    pytest.skip("no benchmarks folder here", allow_module_level=True)

from common import bandwidth as _bandwidth
from common import bandwidth_worker as _worker
from common import harness as _harness
from common import memory_ways as _ways
from common.scripts import script

gather, importance = map(script, ("gather", "importance"))

PIECE = 8 * 64 * 1024  # the largest of a way: 8 streams 64 KiB apart
LENGTHS = [7, 2 * PIECE + PIECE // 2 - 1]  # bytes


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def random_bytes(n):
    return torch.from_numpy(np.random.default_rng(n).integers(0, 256, n, dtype=np.uint8))


@pytest.mark.native
def test_every_way_reads_every_word(simd_level, two_threads):
    """The exclusive or of all whole words, which are random: one that is left out or read twice shows."""
    for length in LENGTHS:
        x = random_bytes(length)
        words = x[: length // 8 * 8].numpy().view(np.int64)
        for name, read in _ways.ways_to_read(x).items():
            assert read() == int(np.bitwise_xor.reduce(words, initial=0)), (name, length)


@pytest.mark.native
def test_every_way_copies_every_byte(simd_level, two_threads):
    for length in LENGTHS:
        x = random_bytes(length)
        room = torch.zeros(length + 128, dtype=torch.uint8)
        begin = -room.data_ptr() % 64
        out = room[begin : begin + length]
        for name, copy in _ways.ways_to_copy(out, x).items():
            room.fill_(0)
            copy()
            assert torch.equal(out, x), (name, length)
            assert not room[:begin].any() and not room[begin + length :].any(), (name, length)


@pytest.mark.native
def test_ways_differ_in_every_respect(two_threads):
    """Among the ways are one stream and several, no prefetch and several distances, all kinds of stores,
    both divisions among threads.
    """
    x = torch.zeros(8)
    read, copy = _ways.ways_to_read(x), _ways.ways_to_copy(torch.zeros(8), x)
    arguments = {call.args[1:] for call in read.values()}
    assert len(arguments) == len(read) > 50
    streams, _, ahead, hints, stretches = map(set, zip(*arguments, strict=True))
    assert streams == {1, 2, 4, 8} and {0, 256, 512, 1024, 2048, 4096} <= ahead
    assert hints == {0, 1, 2} and stretches == {True, False}
    assert len({call.args[2:] for call in copy.values()}) == len(copy) > 30
    assert {call.args[2] for call in copy.values()} == {0, 1, 2, 3}


@pytest.mark.native
def test_bad_ways_are_refused():
    x = torch.zeros(64)
    read, copy = torch.ops.minitron_kernels.read_floor, torch.ops.minitron_kernels.copy_floor_
    for wrong, message in (
        ((3, 4096, 0, 0, True), "streams must be 1, 2, 4 or 8, got 3"),
        ((1, 100, 0, 0, True), "apart must be a multiple of 64"),
        ((1, 4096, 8192, 1, True), "ahead must be a multiple of 64 from 0 to apart, got 8192"),
        ((1, 4096, 64, 3, True), "hint must be 0, 1 or 2, got 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            read(x, *wrong)
    with pytest.raises(RuntimeError, match=r"store must be in 0\.\.3, got 4"):
        copy(torch.zeros(64), x, 4, 1, 4096, 0, 0, True)
    with pytest.raises(RuntimeError, match="as many bytes as x"):
        copy(torch.zeros(63), x, 0, 1, 4096, 0, 0, True)
    with pytest.raises(RuntimeError, match="x must be contiguous"):
        read(torch.zeros(4, 4).t(), 1, 4096, 0, 0, True)
    room = torch.zeros(256, dtype=torch.uint8)
    begin = -room.data_ptr() % 64 + 16
    with pytest.raises(RuntimeError, match="multiple of 64 bytes for streaming"):
        copy(room[begin : begin + 64], torch.zeros(64, dtype=torch.uint8), 1, 1, 4096, 0, 0, True)


class Clock:
    """Stands in for timer(): a call returns its own busy seconds."""

    def __init__(self, call, device):
        self.call, self.calls = call, 0

    def sample(self):
        self.calls += 1
        return _harness.Sample(99.0, self.call())


def test_the_fastest_way_wins(monkeypatch):
    """By the median of several samples, once few are left: one lucky sample does not win."""
    monkeypatch.setattr(_ways, "timer", Clock)
    counts = dict.fromkeys(map(str, range(11)), 0)

    def way(name):
        def call():
            counts[name] += 1
            return 2.0 + int(name)

        return call

    assert _ways.fastest({name: way(name) for name in reversed(counts)}, "cpu") == "0"
    assert counts["9"] == 1 and counts["0"] == 1 + 5 * 3  # rounds of 11, 6, 3, 2
    lucky = itertools.chain([0.5], itertools.repeat(3.0))
    assert (
        _ways.fastest({"a": lambda: 9.0, "lucky": lambda: next(lucky), "steady": lambda: 2.0}, "cpu")
        == "steady"
    )


def test_a_single_way_is_not_called_and_none_is_an_error():
    assert _ways.fastest({"only": lambda: 1 / 0}, "cpu") == "only"
    with pytest.raises(ValueError, match="at least one way"):
        _ways.fastest({}, "cpu")


def burn(seconds):
    end = _harness.time.process_time() + seconds
    while _harness.time.process_time() < end:
        pass


def toy(monkeypatch, row_s, ways):
    """The result of a benchmark whose row burns row_s, and its ways to move the bytes what `ways` says."""
    bench = _bandwidth.Bench(
        name="toy",
        rows=(_bandwidth.Row("row", "a row", lambda _: lambda: burn(row_s), ours=True),),
        cases={"one": {"n": 1}},
        default=("one",),
        make_inputs=lambda case, device: dict(case),
        floor=lambda _: {name: lambda s=s: burn(s) for name, s in ways.items()},
        floor_label="burning",
        floor_bytes=lambda x: 5000,
        error=lambda x, result: 0.0,
        bound=0.0,
        poison=lambda x: None,
    )
    monkeypatch.setattr(_worker, "bench_of", lambda name: bench)
    monkeypatch.setattr(_bandwidth, "run_worker", lambda script, spec, threads: _worker.measure(spec))
    return bench, _bandwidth.main(bench, ["--quick"])


def test_the_floor_is_the_fastest_way_and_is_told(monkeypatch):
    bench, result = toy(monkeypatch, 4e-3, {"slow": 8e-3, "quick": 1e-3, "middling": 4e-3})
    (run,) = result["runs"]
    (row,) = run["rows"]
    assert row["floor_way"] == "quick" and run["floor_ways"] == 3 and row["ratio"]["median"] > 2
    assert "burning, fastest of 3 ways (quick)" in _bandwidth.head(run)
    assert _bandwidth.FAULT not in _bandwidth.as_markdown(bench, result)


def test_a_row_below_its_floor_is_the_floors_fault(monkeypatch, capsys):
    bench, result = toy(monkeypatch, 1e-3, {"slow": 4e-3})
    text = _bandwidth.as_markdown(bench, result)
    assert f"| a row{_bandwidth.FAULT} |" in text and _bandwidth.FAULTY in text
    told = capsys.readouterr()
    assert _bandwidth.FAULTY in told.out and _bandwidth.FAULTY in told.err
