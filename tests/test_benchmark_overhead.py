"""The benchmark of small calls: time is divided without a rest, and every row runs."""

import json

import pytest

from tools.benchmark_scripts import FOLDER

if not FOLDER.is_dir():  # an sdist may be tested without it
    pytest.skip("no benchmarks folder here", allow_module_level=True)

from common.scripts import script
from overhead_rows import stopwatch as _stopwatch

overhead = script("overhead")


class Library:
    """Functions that take 1, 10 and 100 ns, of which one calls another."""

    def __init__(self, clock):
        self.clock = clock

    def outer(self):
        self.clock.now += 1
        with self.lends() as given:
            self.clock.now += 1
        return self.inner() + given

    def inner(self):
        self.clock.now += 10
        return 5

    def lends(self):
        clock = self.clock

        class Block:
            def __enter__(self):
                clock.now += 100
                return 2

            def __exit__(self, *_):
                clock.now += 100

        return Block()


def test_each_moment_belongs_to_one_part(monkeypatch):
    class Clock:
        now = 0

    clock = Clock()
    monkeypatch.setattr(_stopwatch.time, "perf_counter_ns", lambda: clock.now)
    library = Library(clock)
    boundaries = [
        _stopwatch.Boundary(library, "outer", "a"),
        _stopwatch.Boundary(library, "inner", "b"),
        _stopwatch.Boundary(library, "lends", "c", lends=True),
    ]

    def call():
        clock.now += 1000
        assert library.outer() == 7
        clock.now += 1000

    with _stopwatch.Stopwatch(boundaries, "rest") as watch:
        for _ in range(2):
            assert {part: round(s * 1e9) for part, s in watch.measure(call).items()} == {
                "rest": 2000,
                "a": 2,
                "b": 10,
                "c": 200,
            }
    before = clock.now
    library.outer()
    assert clock.now - before == 212 and "outer" not in vars(library)


@pytest.mark.native
def test_every_row_runs_and_is_divided(tmp_path, capsys):
    path = tmp_path / "out.json"
    result = overhead.main(["--quick", "--json", str(path), "--markdown", str(tmp_path / "out.md")])
    told = capsys.readouterr().out, (tmp_path / "out.md").read_text()
    written = json.loads(path.read_text())
    assert written["complete"] and len(written["rows"]) == len(result["rows"]) == 10
    for row in result["rows"]:
        assert row["ours_s"]["n"] == row["plain_s"]["n"] == 5 and row["error"] < 1e-4
        assert "native" in row["parts_s"] and len(row["parts_s"]) > 2, row["op"]
        assert all(row["op"] in text and row["mode"] in text for text in told)


@pytest.mark.native
def test_a_wrong_result_is_not_timed(monkeypatch):
    row = overhead.rows(overhead.SIZES)[0]
    wrong = row.results()[0], [x + 1 for x in row.results()[1]]
    with pytest.raises(SystemExit, match=r"kl_loss, forward \+ backward: wrong by"):
        overhead.check(overhead.Row("kl_loss", "forward + backward", "", row.ours, row.plain, lambda: wrong))
