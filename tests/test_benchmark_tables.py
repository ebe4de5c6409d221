"""What the benchmarks print and write: tables, reports, a picture; of a GPU too, by a fake clock."""

import json
import time

import pytest
import torch

from tools.benchmark_scripts import FOLDER

if not FOLDER.is_dir():  # an sdist may be tested without it
    pytest.skip("no benchmarks folder here", allow_module_level=True)

from common import bandwidth as _bandwidth
from common import gpu_clock as _gpu_clock
from common import harness as _harness
from common import machine as _machine
from common import tables as _table
from common.scripts import script
from kl_loss_rows import cases as _cases
from kl_loss_rows import worker as _worker
from kl_loss_rows.floor import gemm_flops
from kl_loss_rows.report import as_markdown, as_text
from kl_loss_rows.roofline import RATES

checkpoint, gather, kl_loss = map(script, ("checkpoint", "gather", "kl_loss"))

TINY = _cases.Case("tiny", 24, 16, 20, 301)


def test_tables():
    text = _table.aligned(["name", "n"], [["a", "1"], ["long name", "22"]]).split("\n")
    assert text == ["name        n", "---------  --", "a           1", "long name  22"]
    marked = _table.markdown(["name", "n"], [["a|b", "1"]]).split("\n")
    assert marked == ["| name | n |", "|---|---:|", "| a\\|b | 1 |"]
    assert [_table.error(value) for value in (None, 0.251, 1.2, 0.0023, 3e-7)] == [
        "–",
        "25 %",
        "120 %",
        "0.23 %",
        "3e-07",
    ]


def _run() -> dict:
    summary = {"median": 2.0, "p20": 1.5, "p80": 2.5, "n": 3}
    ok = {
        "key": "store",
        "label": "ours",
        "family": "minitron",
        "status": "ok",
        "busy_s": summary,
        "wall_s": summary,
        "ratio": summary,
        "extra_peak_bytes": 3 * 2**20,
        "gradient_bytes": 2**20,
        "errors": {"far": {"loss": 1e-7, "dX": 0.002, "dW": 0.25}},
    }
    absent = {
        "key": "x",
        "label": "theirs",
        "family": "TRL",
        "status": "absent",
        "reason": "pip",
        "errors": {},
    }
    run = {"shape": "S", "N": 1, "H": 2, "Ht": 3, "V": 4, "dtype": "bf16", "device": "cpu", "threads": 1}
    run |= {
        "about": None,
        "flops": 10**9,
        "floor": {"busy_s": summary, "wall_s": summary},
        "rows": [ok, absent],
    }
    return run | {"errors": {"far": {"kl": 4.0, "N": 1, "V": 4}}}


def test_report():
    text = as_text(_run())
    assert "2.00 (1.50–2.50)" in text and "theirs: absent, pip" in text and "25 %" in text
    row = next(line for line in text.split("\n") if line.startswith("ours")).split()
    assert row[6:8] == ["3", "2"]  # MiB in all; beyond the gradients
    assert len(as_text(_run(), width=60).split("forward + backward")) == 3  # two tables where one is too wide
    machine = {"cpu": "a cpu", "flags": [], "cores": 2, "packages": {"torch": "1"}, "date": "today"}
    assert "| ours |" in as_markdown({"runs": [_run()], "machine": machine})


class FakeGpu:
    """A device clock without a device: calls run on the CPU; the events say 2 ms, the allocator 3 MiB."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def query(self):
            return False  # the spin before it still runs

        def elapsed_time(self, end):
            return 2.0

    def __init__(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "Event", self.Event)
        for name, value in (
            ("synchronize", None),
            ("_sleep", None),
            ("memory_allocated", 1 << 20),
            ("reset_peak_memory_stats", None),
            ("max_memory_allocated", 4 << 20),
        ):
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setattr(_gpu_clock.GpuTimer.__init__, "__defaults__", (None, time.perf_counter, bool))
        make = _cases.make_inputs
        monkeypatch.setattr(
            _worker,
            "make_inputs",
            lambda case, dtype, kind="far", device="cpu", seed=0: make(case, dtype, kind),
        )
        monkeypatch.setattr(_worker, "rates", lambda dtype, device: dict(zip(RATES, (1e9, 1e9), strict=True)))


def _gpu_run(monkeypatch, keys):
    """The table of a GPU, from workers that run in this process by a fake clock."""
    FakeGpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def worker(script, spec, *, threads, timeout_s=None):
        try:
            return {"measure": _worker.measure, "errors": _worker.errors}[spec["work"]](spec)
        except Exception as error:  # such as a row that does need the GPU
            raise _harness.WorkerError(str(error)) from None

    monkeypatch.setattr(kl_loss, "run_worker", worker)
    args = kl_loss.parse_args(["--device", "cuda", "--impl", *keys, "--reps", "3"])
    return kl_loss.measure(TINY, None, "bf16", 1, args.impl, args)


def test_table_of_a_gpu_by_a_fake_clock(monkeypatch):
    """Rows, ratio, memory and share of the roofline of a GPU; a row that it cannot have says why."""
    run = _gpu_run(monkeypatch, ["naive", "naive-float", "store", "liger-jsd"])
    naive, second, cpu_only, liger = run["rows"]
    assert naive["busy_s"]["median"] == 2e-3 and naive["ratio"] == {"median": 1, "p20": 1, "p80": 1, "n": 3}
    assert naive["extra_peak_bytes"] == 3 << 20 and 0 < naive["errors"]["far"]["dW"] < 0.1
    assert (cpu_only["status"], cpu_only["reason"]) == ("absent", "not on cuda")
    flops, moved = gemm_flops(TINY), 2 * ((24 + 301) * 36 + (24 + 301) * 16)
    for best in (second["roofline"], run["roofline"]):
        assert (best["flops"], best["bytes"], best["seconds"]) == (flops, moved, flops / 1e9)
    text = as_text(run)
    share = f"{100 * flops / 1e9 / 2e-3:.0f} %"
    assert next(line for line in text.split("\n") if line.startswith("naive PyTorch ")).count(share) == 1
    assert (
        "TFLOP/s" in text
        and "of roofline" in text
        and "GPU s" in text
        and "Roofline, by rates of the same run" in text
    )
    assert "minitron, store: absent, not on cuda" in text
    assert "pip install" in liger["reason"] if liger["status"] == "absent" else liger["status"] == "failed"
    machine = {"gpu": "a GPU", "packages": {"torch": "1"}, "date": "today"}
    assert "of roofline" in as_markdown({"runs": [run], "machine": machine})


def test_marks_and_another_loss(monkeypatch):
    """A time with launches in it is marked; cross-entropy has its own floor and flops."""
    run = _gpu_run(monkeypatch, ["naive", "torch-ce"])
    naive, other = run["rows"]
    assert naive["launches_seen"] == 0 and "flops" not in naive
    if other["status"] == "ok":  # this torch has it
        assert other["flops"] == 2 * 24 * 301 * 3 * 16 and "roofline" not in other
        assert other["errors"]["far"]["dX"] < 0.1
        assert "Another loss, for reference" in as_text(run)
    naive["launches_seen"] = 2
    text = as_text(run)
    assert "naive PyTorch *" in text and _table.MARKED in text
    assert _table.MARKED in as_markdown({"runs": [run], "machine": {"gpu": "G", "packages": {}, "date": ""}})


def _stopped_at(call_number, answer):
    """A run_worker() during whose call of this number somebody presses Ctrl+C."""
    calls = []

    def worker(script, spec, *, threads, timeout_s=None):
        calls.append(spec)
        if len(calls) == call_number:
            raise KeyboardInterrupt
        return answer

    return worker


MEASURED = {"floor": [[1.0, 1.0]] * 3, "call": [[2.0, 2.0]] * 3, "launches_seen": 0, "extra_peak_bytes": 0}


def test_a_run_that_is_cut_off_leaves_its_rows(monkeypatch, tmp_path):
    """Of kl_loss.py; what is left can be read again."""
    file = tmp_path / "out.json"
    monkeypatch.setattr(kl_loss, "run_worker", _stopped_at(3, MEASURED | {"gradient_bytes": 0}))
    arguments = ["--shape", "8,8,8,32", "--no-errors", "--json", str(file), "--impl"]
    with pytest.raises(KeyboardInterrupt):
        kl_loss.main([*arguments, "naive", "naive-float", "compile"])
    result = json.loads(file.read_text())
    (run,) = result["runs"]
    assert result["complete"] is False and [row["key"] for row in run["rows"]] == ["naive", "naive-float"]
    assert run["floor"]["busy_s"]["n"] == 6
    kl_loss.main(["--from", str(file)])
    monkeypatch.setattr(kl_loss, "run_worker", _stopped_at(9, MEASURED | {"gradient_bytes": 0}))
    kl_loss.main([*arguments, "naive"])
    assert json.loads(file.read_text())["complete"] is True


def test_a_cut_off_benchmark_of_memory_leaves_its_rows(monkeypatch, tmp_path):
    file = tmp_path / "out.json"
    answer = MEASURED | {"bytes": 100, "error": 0.0, "floor_way": "plainly", "floor_ways": 2}
    monkeypatch.setattr(_bandwidth, "run_worker", _stopped_at(3, answer))
    with pytest.raises(KeyboardInterrupt):
        gather.main(gather.BENCH, ["--quick", "--json", str(file)])
    result = json.loads(file.read_text())
    assert result["complete"] is False and [len(run["rows"]) for run in result["runs"]] == [2]
    assert result["runs"][0]["floor_busy_s"]["n"] == 6


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from kl_loss_rows.plot import draw

    run = _run()
    draw({"runs": [run, run | {"rows": []}]}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_command_line(tmp_path, capsys):
    """One row, end to end; the file written can be read again."""
    file = tmp_path / "out.json"
    kl_loss.main(["--shape", "16,16,24,300", "--impl", "naive", "--reps", "2", "--json", str(file)])
    result = json.loads(file.read_text())
    (row,) = result["runs"][0]["rows"]
    assert row["status"] == "ok" and row["ratio"]["n"] == 2 and row["errors"]["far"]["dW"] < 0.1
    capsys.readouterr()
    kl_loss.main(["--from", str(file), "--markdown", str(tmp_path / "out.md")])
    assert "naive PyTorch" in capsys.readouterr().out and "naive PyTorch" in (tmp_path / "out.md").read_text()
    with pytest.raises(SystemExit):
        kl_loss.parse_args(["--impl", "nobody"])


def test_checkpoint_tables(tmp_path, capsys):
    """Ratios are taken round by round; MB/s are of what is written."""
    rows = {
        "cp": {"wall": [1.0, 2.0, 1.0], "ratio": [1.0, 1.0, 1.0]},
        "prune": {"wall": [2.0, 2.0, 1.5], "ratio": [2.0, 1.0, 1.5]},
    }
    samples = {
        row: [
            {"wall_s": wall, "busy_s": wall / 2, "peak_bytes": 300 << 20, "extra_bytes": 40 << 20}
            for wall in entry["wall"]
        ]
        for row, entry in rows.items()
    }
    run = {"cache": "warm", "threads": 2, "samples": samples, "rows": checkpoint.summaries(samples)}
    for row, entry in rows.items():
        assert run["rows"][row]["ratio"]["median"] == sorted(entry["ratio"])[1]
    result = {"source_bytes": 4e9, "kept_bytes": 2e9, "shape": checkpoint.FULL, "layers": 6}
    result |= {"hidden": 4096, "mlp": 11520, "runs": [run], "machine": _machine.facts("cpu")}
    (tmp_path / "r.json").write_text(json.dumps(result))
    checkpoint.main(["--from", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md")])
    assert "prune_checkpoint" in capsys.readouterr().out
    line = next(line for line in (tmp_path / "r.md").read_text().splitlines() if "| prune_checkpoint" in line)
    assert line == "| prune_checkpoint | 2 | 1.7–2 | 1.50 | 1.20–1.80 | 1 | 1000 | 300 | 40 |"
