"""benchmarks/distillation.py at a tiny size: all its rows, its files, its options, and its gate."""

from __future__ import annotations

import json

import pytest
import torch

from tools.benchmark_scripts import FOLDER

if not FOLDER.is_dir():  # an sdist may be tested without it
    pytest.skip("no benchmarks folder here", allow_module_level=True)

pytest.importorskip("transformers", reason="the benchmark trains models of transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs it")
pytest.importorskip("safetensors", reason="transformers saves models as safetensors")

from common.scripts import script
from distillation_rows import worker

benchmark = script("distillation")
TINY = ["--quick", "--steps", "2", "--length", "16", "--k", "8", "--calibration", "2", "--evaluation", "1"]


def test_all_rows(tmp_path, monkeypatch):
    """In this process, where fresh ones would each import everything again."""

    def run(path, spec, *, threads):
        assert path.samefile(worker.__file__) and threads == torch.get_num_threads()
        return json.loads(json.dumps(worker.measure(json.loads(json.dumps(spec)))))

    monkeypatch.setattr(benchmark, "run_worker", run)
    files = {name: tmp_path / f"out.{name}" for name in ("json", "markdown")}
    options = [*TINY, "--teacher", "live", *worker.TIERS, "--threads", str(torch.get_num_threads())]
    benchmark.main([*options, "--json", str(files["json"]), "--markdown", str(files["markdown"])])
    result = json.loads(files["json"].read_text())
    assert result["complete"] and result["largest_difference"] < 1e-4
    assert list(result["rows"]) == list(worker.LABELS)
    assert [line.split("|")[1].strip() for line in files["markdown"].read_text().splitlines()[2:]] == list(
        worker.LABELS.values()
    )
    assert 0 < result["parameters"]["student"] < result["parameters"]["teacher"]
    for name, row in result["rows"].items():
        assert len(row["losses"]) == 2 and min(row["losses"]) > 0
        assert row["tokens_per_second"] > 0 and row["peak_bytes"] > 0 and row["perplexity"] > 1
        assert ("teacher_share" in row) == (name not in ("stock", "loop"))
    assert set(result["caches"]) == set(worker.TIERS)


@pytest.mark.parametrize("loss", [2.05, float("nan")])
@pytest.mark.parametrize("row", ["loop", "live"])
def test_the_gate_refuses_what_differs(loss, row):
    rows = {name: {"losses": [3.0, 2.0]} for name in ("stock", "loop", "live")}
    assert benchmark.gate(rows) == 0
    rows[row]["losses"][1] = loss
    rows["hidden"] = {"losses": [9.0, 9.0]}  # of another teacher
    with pytest.raises(SystemExit, match="losses of rows that do the same differ"):
        benchmark.gate(rows)


def test_options(capsys):
    args = benchmark.parse_args(["--quick", "--steps", "3"])
    assert (args.steps, args.length) == (3, benchmark.QUICK["length"])
    assert benchmark.parse_args([]).length == benchmark.FULL["length"]
    with pytest.raises(SystemExit):
        benchmark.parse_args(["--length", "1"])
    assert "--length must be at least 2" in capsys.readouterr().err
