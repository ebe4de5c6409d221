"""Scores that are saved, resumed from and plotted."""

import errno
import os
from pathlib import Path

import pytest
import torch

from minitron_kernels.pruning import ImportanceScores, collect_importance, plot_importance
from pruning.collected import assert_same_bits, ids, padded, states
from pruning.tiny_models import tiny_model


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_resume_is_bitwise(name, tmp_path):
    model, batches = tiny_model(name), [padded(3, 17), ids(2, 5, 1), ids(1, 9, 2), ids(2, 4, 3)]
    options = dict(seq=("mean", "var"), progress=False)
    whole = collect_importance(model, batches, **options)
    half = collect_importance(model, batches[:2], **options)
    half.save(tmp_path / "half")
    loaded = ImportanceScores.load(tmp_path / "half")
    assert_same_bits(loaded, half)
    assert (loaded.config, loaded.options) == (half.config, half.options)
    assert_same_bits(collect_importance(model, batches[2:], resume_from=loaded, **options), whole)
    assert_same_bits(loaded, half)
    rest = collect_importance(model, batches[2:], **options)
    for key, value in states(half.merge_(rest)).items():
        torch.testing.assert_close(value, states(whole)[key], rtol=1e-14, atol=0)


def test_resume_from_other_scores_is_refused():
    model = tiny_model("llama")
    scores = collect_importance(model, [ids(1, 4)], progress=False)
    with pytest.raises(TypeError, match="resume_from must be ImportanceScores, got dict"):
        collect_importance(model, [ids(1, 4)], resume_from={})
    with pytest.raises(ValueError, match=r"resume_from must have the axes mlp; got hidden"):
        collect_importance(model, [ids(1, 4)], axes="mlp", resume_from=scores)
    with pytest.raises(ValueError, match=r"resume_from must be collected with Options.*'L2'"):
        collect_importance(model, [ids(1, 4)], seq="L2", resume_from=scores)
    with pytest.raises(
        ValueError, match=r"resume_from must be of the same model: mlp\.sums must be \(1, 120\)"
    ):
        collect_importance(tiny_model("llama", intermediate_size=40), [ids(1, 4)], resume_from=scores)
    with pytest.raises(ValueError, match="its hidden has other layers"):
        collect_importance(tiny_model("llama", num_hidden_layers=2), [ids(1, 4)], resume_from=scores)
    with pytest.raises(ValueError, match="seq must be one that was collected"):
        scores.tables(seq="L2")


def test_files_are_checked(tmp_path):
    scores = collect_importance(tiny_model("llama"), [ids(1, 4)], progress=False)
    with pytest.raises(FileNotFoundError, match=r"importance\.json"):
        ImportanceScores.load(tmp_path)
    scores.save(tmp_path)
    about, (tensors,) = tmp_path / "importance.json", tmp_path.glob("*.safetensors")
    good_about, good_tensors = about.read_text(), tensors.read_bytes()
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "must be minitron_kernels.importance version 1, got"),
        (good_about.replace('"version": 1', '"version": 2'), "version 1, got"),
        (good_about.replace(tensors.name, "../x"), "tensors must name a file beside it"),
        (good_about.replace('"ImportanceState"', '"State"'), "unknown kind 'State'"),
        (good_about.replace('"options"', '"opinions"'), "lacks 'options'"),
        (good_about.replace('"norm"', '"max"'), "head_score must be"),
    ):
        about.write_text(text)
        with pytest.raises(ValueError, match=rf"importance\.json.*{message}"):
            ImportanceScores.load(tmp_path)
    about.write_text(good_about)
    tensors.write_bytes(good_tensors[:-8])
    with pytest.raises(ValueError, match=rf"{tensors.name}: is not a whole safetensors file"):
        ImportanceScores.load(tmp_path)
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match=tensors.name):
        ImportanceScores.load(tmp_path)


@pytest.mark.parametrize("step", [0, 1])
def test_a_full_disk_leaves_no_folder_behind(tmp_path, monkeypatch, step):
    """Else the same command would be told that its output is there already."""
    scores = collect_importance(tiny_model("llama"), [ids(1, 4)], progress=False)
    synced = []

    def full(handle):
        synced.append(handle)
        if len(synced) > step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        scores.save(tmp_path / "new" / "scores")
    assert caught.value.filename.startswith(str(tmp_path / "new" / "scores" / "importance"))
    assert list(tmp_path.iterdir()) == []
    synced.clear()
    (tmp_path / "mine").mkdir()
    with pytest.raises(OSError, match="No space left"):
        scores.save(tmp_path / "mine")
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


@pytest.mark.parametrize("step", [0, 1])
def test_a_save_that_fails_leaves_the_old_scores(tmp_path, monkeypatch, step):
    model = tiny_model("llama")
    old = collect_importance(model, [ids(1, 4)], progress=False)
    new = collect_importance(model, [ids(1, 5)], progress=False)
    old.save(tmp_path)
    replace, calls = Path.replace, []

    def failing(self, target):
        calls.append(target)
        if len(calls) == step + 1:
            raise OSError("disk full")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        new.save(tmp_path)
    monkeypatch.undo()
    assert_same_bits(ImportanceScores.load(tmp_path), old)
    new.save(tmp_path)
    assert_same_bits(ImportanceScores.load(tmp_path), new)
    assert len(list(tmp_path.iterdir())) == 2  # nothing old, nothing half-written


def test_plots(tmp_path):
    scores = collect_importance(tiny_model("qwen3_moe"), [ids(2, 9)], progress=False)
    written = plot_importance(scores, tmp_path)
    assert [path.name for path in written] == [
        f"{axis}.png" for axis in ("hidden", "mlp", "heads", "layers", "experts", "expert_mlp")
    ]
    assert all(path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000 for path in written)
    one = collect_importance(tiny_model("llama"), [ids(2, 9)], axes="mlp", progress=False)
    assert plot_importance(one, tmp_path / "of.png") == [tmp_path / "of_mlp.png"]
    with pytest.raises(TypeError, match="scores must be ImportanceScores, got dict"):
        plot_importance({}, tmp_path)
