"""minitron-prune score: it goes on where it was interrupted, and says what it will take."""

import json
import re

import numpy as np
import pytest

from minitron_kernels.pruning import ImportanceScores, collect_importance
from minitron_kernels.pruning.cli import estimate, scoring
from minitron_kernels.pruning.cli.main import main
from minitron_kernels.pruning.score import collect
from pruning.checkpoints import save_tiny
from pruning.test_cli import save_tokenizer


@pytest.fixture
def place(tmp_path):
    save_tiny(tmp_path / "model")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(3, 96, 512))
    return tmp_path


def score(place, out, *options, text="tokens.npy"):
    command = ["score", place / "model", place / text, "-o", place / out, "--seq-len", 32, *options]
    return main([str(argument) for argument in command])


def same(one, other):
    """Whether two scores have the same bits."""
    found = [
        {
            (name, key): value
            for name, axis in scores.axes.items()
            for key, value in axis.state.state_dict().items()
        }
        for scores in (one, other)
    ]
    assert found[0].keys() == found[1].keys()
    return all(value.equal(found[1][key]) for key, value in found[0].items())


@pytest.fixture
def interrupted_at(monkeypatch):
    """The calls of collect_importance() in which Ctrl-C comes, and the batches of those that ran."""
    monkeypatch.setattr(scoring, "SECONDS", 0.0)  # a part is one batch
    at, ran = [], []

    def collected(model, batches, *arguments, **options):
        if len(ran) + 1 in at:
            at.remove(len(ran) + 1)
            raise KeyboardInterrupt
        done = collect_importance(model, batches, *arguments, **options)
        ran.append(batches.count)
        return done

    monkeypatch.setattr(collect, "collect_importance", collected)
    return at, ran


def test_an_interrupted_score_goes_on(place, interrupted_at, capsys):
    at, ran = interrupted_at
    few = ["--samples", 8, "--batch-size", 2, "--quiet"]
    at += [1, 3]
    assert score(place, "scores", *few) == 130
    assert "begins anew" in capsys.readouterr().err  # nothing was done yet
    assert score(place, "scores", *few) == 130
    assert "goes on from here" in capsys.readouterr().err and not (place / "scores").exists()
    assert score(place, "scores", *few) == 0
    assert "resumed: batch 2 of 4 is done" in capsys.readouterr().err
    assert ran == [1] * 4  # none twice
    got = ImportanceScores.load(place / "scores")
    assert not [path for path in place.iterdir() if path.name.startswith(".")]
    assert score(place, "whole", *few) == 0
    assert got.tokens == 256 and same(got, ImportanceScores.load(place / "whole"))


@pytest.mark.parametrize("change", ["option", "text", "scores"])
def test_what_was_kept_of_another_command_is_not_used(place, interrupted_at, change):
    at, ran = interrupted_at
    few = ["--samples", 8, "--batch-size", 2, "--quiet"]
    at.append(3)
    assert score(place, "scores", *few) == 130 and ran == [1, 1]
    if change == "option":
        few += ["--seed", 1]
    elif change == "text":
        np.save(place / "tokens.npy", np.random.default_rng(1).integers(3, 96, 512))
    else:
        (kept,) = scoring.kept_folder(place / "scores").glob("*.safetensors")
        kept.write_bytes(kept.read_bytes()[:-8])
    ran.clear()
    assert score(place, "scores", *few) == 0 and ran == [1] * 4
    assert ImportanceScores.load(place / "scores").tokens == 256


@pytest.mark.parametrize("change", ["tokenizer", "weights"])
def test_what_the_text_and_the_model_are_made_of_counts(place, interrupted_at, change):
    at, ran = interrupted_at
    save_tokenizer(place / "model")
    (place / "a.txt").write_text(" ".join(f"w{number % 90}" for number in range(600)))
    (place / "model" / "pytorch_model.bin").write_bytes(b"not read where there are safetensors")
    few = ["--samples", 8, "--batch-size", 2, "--quiet"]
    at.append(3)
    assert score(place, "scores", *few, text="a.txt") == 130 and ran == [1, 1]
    if change == "tokenizer":
        file = place / "model" / "tokenizer.json"
        file.write_text(file.read_text().replace('"w1"', '"v1"'))  # now w1 is unknown
    else:
        (place / "model" / "pytorch_model.bin").write_bytes(b"others")
    ran.clear()
    assert score(place, "scores", *few, text="a.txt") == 0 and ran == [1] * 4
    assert score(place, "whole", *few, text="a.txt") == 0
    assert same(*(ImportanceScores.load(place / name) for name in ("scores", "whole")))


def test_a_folder_of_ids_needs_no_tokenizer(place):
    (place / "ids").mkdir()
    (place / "tokens.npy").rename(place / "ids" / "tokens.npy")
    assert score(place, "scores", "--samples", 2, "--quiet", "--axes", "mlp", text="ids") == 0


def test_experts_alone_begin_anew(tmp_path, interrupted_at, capsys):
    """They do not tell how many tokens they are of."""
    at, _ = interrupted_at
    save_tiny(tmp_path / "model", "qwen3_moe")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(3, 96, 512))
    at.append(3)
    few = ["--samples", 6, "--batch-size", 2, "--quiet", "--axes", "experts"]
    assert score(tmp_path, "scores", *few) == 130 and "begins anew" in capsys.readouterr().err
    assert score(tmp_path, "scores", *few) == 0


def test_a_model_over_several_devices(place):
    pytest.importorskip("accelerate", reason="needs pip install accelerate")
    few = ["--samples", 4, "--quiet"]
    assert score(place, "one", *few) == score(place, "several", *few, "--device", "auto") == 0
    assert same(*(ImportanceScores.load(place / name) for name in ("one", "several")))


def test_what_it_will_take_is_said(place, monkeypatch, capsys):
    few = ["--samples", 4, "--quiet"]
    assert score(place, "a", *few) == 0 and "estimate" not in capsys.readouterr().err  # it is nothing
    monkeypatch.setattr(estimate, "_MUCH", 1.0)
    monkeypatch.setattr(estimate, "free_bytes", lambda device: 1000)
    assert score(place, "b", *few, "--dtype", "bfloat16") == 0
    said, warned = capsys.readouterr().err.splitlines()
    count = json.loads((place / "model" / "config.json").read_text())
    parameters = int(re.search(r"128 tokens through ([\d,]+) parameters", said)[1].replace(",", ""))
    assert parameters == sum(p.numel() for p in save_tiny(place / "again").parameters()) and count
    assert f"{2.0 * parameters * 128:.1e} operations" in said and "in bfloat16" in said
    assert "warning: the weights are 0.0 GB in bfloat16, and 0.0 GB are free on cpu: --device auto" in warned


def test_free_memory():
    assert estimate.free_bytes("auto") is None
    free = estimate.free_bytes("cpu")
    assert free is None or 0 < free < 1 << 50


def test_text_of_other_forms(place, capsys):
    save_tokenizer(place / "model")
    words = " ".join(f"w{number % 90}" for number in range(100))
    (place / "a.jsonl").write_text(json.dumps({"body": words}) + "\n")
    few = ["--samples", 2, "--quiet", "--axes", "mlp"]
    assert score(place, "s", *few, text="a.jsonl") == 1
    assert "line 1 is not a JSON object" in (error := capsys.readouterr().err) and "--text-key" in error
    assert score(place, "s", *few, "--text-key", "body", text="a.jsonl") == 0
    (place / "folder").mkdir()
    (place / "a.jsonl").rename(place / "folder" / "a.jsonl")
    assert score(place, "t", *few, "--text-key", "body", text="folder") == 0
    assert same(*(ImportanceScores.load(place / name) for name in ("s", "t")))


def test_lines_in_a_log(place, monkeypatch, capsys):
    from minitron_kernels._command import progress

    few = ["--samples", 4]
    assert score(place, "a", *few) == 0 and capsys.readouterr().err == ""  # done within ten seconds
    clock = [0.0]

    def later():
        clock[0] += 20.0
        return clock[0]

    monkeypatch.setattr(progress.time, "monotonic", later)
    assert score(place, "b", *few) == 0
    assert re.search(r"^scoring: batch 1 of 4, .* left$", capsys.readouterr().err, re.M)
