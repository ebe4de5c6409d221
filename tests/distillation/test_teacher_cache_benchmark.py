"""benchmarks/teacher_cache.py at a tiny size: its rows, its table from a file, and its gate."""

from __future__ import annotations

import json

import pytest
import torch

from tools.benchmark_scripts import FOLDER

if not FOLDER.is_dir():  # an sdist may be tested without it
    pytest.skip("no benchmarks folder here", allow_module_level=True)

pytest.importorskip("safetensors", reason="logits are stored beside the cache as safetensors")

from common.scripts import script
from minitron_kernels.distillation.cache import TeacherCache

TINY = ["--vocab", "300", "--k", "8", "--samples", "5", "--hidden", "16", "--seq-len", "24"]
TINY += ["--mb", "0.02", "--reps", "2", "--tokens", "8", "--batch", "2"]


def test_rows_and_table(tmp_path, capsys):
    teacher_cache = script("teacher_cache")
    teacher_cache.main([*TINY, "--json", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["complete"] and [row["tier"] for row in result["rows"]] == [
        "sampled",
        "topk",
        "topk",
        "hidden",
        None,
    ]
    for row in result["rows"]:
        assert row["bytes"] > 0 and all(
            len(row[kind]) == 2 and min(row[kind]) > 0
            for kind in ("write_s", "write_floor_s", "read_s", "read_floor_s")
        )
    # as DistillKit's README has it: about 300 and 114 bytes for its usual vocabularies
    assert "DistillKit, recommended" in printed
    wide = teacher_cache.table(result | {"vocab": 131072}, teacher_cache.tables.aligned)
    sizes = {
        line.split("  ")[0]: line.split()[2] for line in wide.splitlines() if line.startswith("DistillKit")
    }
    assert sizes == {"DistillKit, recommended": "328", "DistillKit, budget": "121"}
    teacher_cache.main(["--from", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md")])
    assert "| sampled, 5 draws |" in (tmp_path / "out.md").read_text()
    assert 0 < teacher_cache.share_of_step(result | {"step_ms": 5.0}, result["rows"][0]) < 1


@pytest.mark.parametrize("name", ["ids", "counts", "logprobs", "hidden"])
def test_the_gate_refuses_what_differs(name, tmp_path, monkeypatch):
    teacher_cache = script("teacher_cache")
    right = TeacherCache.lookup

    def spoilt(self, *args, **kwargs):
        found = right(self, *args, **kwargs)
        if name in found:
            found[name] = torch.where(found[name] >= 0, found[name] + 1, found[name] - 1)
        return found

    monkeypatch.setattr(TeacherCache, "lookup", spoilt)
    with pytest.raises(SystemExit, match=f"correctness gate: .*: {name} differ"):
        teacher_cache.main([*TINY, "--folder", str(tmp_path)])
