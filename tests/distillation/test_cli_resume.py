"""What a run of train goes on from: checkpoints that are whole, the same text, the same teacher."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from safetensors.torch import load_file
from transformers import PreTrainedModel

from distillation.cli_runs import cache_of, one_line, run, save_models, train_of
from distillation.test_cli import after_step, same_weights, snapshot
from minitron_kernels.distillation.cli import train
from minitron_kernels.distillation.cli.config import load
from minitron_kernels.distillation.cli.data import read_windows
from minitron_kernels.distillation.cli.job import job_of
from minitron_kernels.distillation.cli.models import make_loss
from minitron_kernels.distillation.cli.record import checkpoints, read_record
from minitron_kernels.distillation.recipe.scores import even_tables
from minitron_kernels.pruning import make_plan
from minitron_kernels.pruning.checkpoint.model_card import PLAN_FILE
from pruning.tiny_models import tiny_model

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and text, and a run of four steps."""
    folder = tmp_path_factory.mktemp("resume")
    save_models(folder)
    assert run(*train_of(folder, folder / "whole", "--steps", STEPS)) == 0
    return folder


def names(out):
    return [[path.name for path in paths] for paths in checkpoints(out)]


def test_a_kill_while_an_old_checkpoint_goes(folder, tmp_path, monkeypatch):
    """The new one is complete by then, and what is left of the old one is not."""
    out = tmp_path / "a"

    def killed(path, *_, **__):
        (Path(path) / "optimizer.pt").unlink()
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            run(*train_of(folder, out, "--steps", STEPS, "--save-every", 1, "--keep", 1))
    assert names(out) == [["checkpoint-2"], ["checkpoint-1"]]
    assert run("train", "--resume", "-o", out) == 0
    assert same_weights(out, folder / "whole") and names(out) == [["checkpoint-4"], []]


@pytest.mark.parametrize("name", ["distillation.toml", "distillation.json"])
def test_a_run_that_cannot_begin_leaves_nothing(folder, tmp_path, monkeypatch, capsys, name):
    """Else the same command would be told that its output is there already."""

    def full(path, text):
        if Path(path).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        Path(path).write_text(text)

    monkeypatch.setattr("minitron_kernels.distillation.cli.record.write_text", full)
    said = one_line(capsys, *train_of(folder, tmp_path / "a", "--steps", 1))
    assert (
        said == f"{tmp_path / 'a' / name}: No space left on device: free some space, or take another disk\n"
    )
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_no_half_of_a_model_is_left(folder, tmp_path, monkeypatch, capsys, error):
    """Where the disk is full, or Ctrl-C comes, while it is written; the run goes on from its checkpoint."""
    out, saved = tmp_path / "a", PreTrainedModel.save_pretrained

    def fails(self, where, **options):
        if "checkpoint-" in str(where):
            return saved(self, where, **options)
        Path(where, "model.safetensors").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", fails)
        capsys.readouterr()
        code = run(*train_of(folder, out, "--steps", STEPS))
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"minitron-distill train --resume -o {out} goes on from checkpoint-{STEPS}" in line
    if isinstance(error, OSError):
        assert code == 1 and f"error: {out}: No space left on device: free some space; " in line
    else:
        assert code == 130 and "stopped: at once; " in line
    assert not list(out.glob("*.safetensors")) and not list(out.glob(".*"))
    assert read_record(out)["status"] == ("failed" if code == 1 else "stopped")
    (out / ".model-killed").mkdir()  # by SIGKILL, while it wrote
    (out / ".model-killed/model.safetensors").write_bytes(b"half")
    assert run("train", "--resume", "-o", out) == 0 and same_weights(out, folder / "whole")
    assert not list(out.glob(".*"))


def test_a_finished_run_is_left_as_it_is(folder, tmp_path, capsys):
    """But for a model that is gone, which is written again; the run began when it began."""
    out = tmp_path / "a"
    shutil.copytree(folder / "whole", out)
    record = json.loads((out / "distillation.json").read_text()) | {"started": "2020-01-02T03:04:05Z"}
    (out / "distillation.json").write_text(json.dumps(record))
    of_two = {**record, "job": {**record["job"], "processes": 2, "per_step": 2 * record["job"]["per_step"]}}
    (out / "distillation.json").write_text(json.dumps(of_two))
    assert run("train", "--resume", "-o", out) == 0  # by how many processes does not matter any more
    (out / "distillation.json").write_text(json.dumps(record))
    before = snapshot(out)
    capsys.readouterr()
    assert run("train", "--resume", "-o", out, "--keep", 1) == 0
    said, err = capsys.readouterr()
    assert f"{out}: {STEPS} steps, " in said and snapshot(out) == before
    assert err == ""  # the run is quiet
    (out / "model.safetensors").unlink()
    assert run("train", "--resume", "-o", out) == 0 and same_weights(out, folder / "whole")
    assert read_record(out)["started"] == record["started"]
    toml = (out / "distillation.toml").read_text()
    (out / "distillation.toml").write_text(toml.replace("quiet = true", "quiet = false"))
    capsys.readouterr()
    assert run("train", "--resume", "-o", out) == 0
    assert "finished: 4 steps are done; the run is left as it is" in capsys.readouterr().err


def test_a_checkpoint_that_lost_a_byte_is_not_complete(folder, tmp_path, capsys):
    """Trainer goes on without an optimizer's state that is not there, and says nothing."""
    out = tmp_path / "a"
    assert run(*train_of(folder, out, "--steps", STEPS, "--save-every", 1, "--keep", 3)) == 0
    assert names(out) == [["checkpoint-2", "checkpoint-3", "checkpoint-4"], []]
    with (out / "checkpoint-4/optimizer.pt").open("r+b") as stream:
        stream.truncate((out / "checkpoint-4/optimizer.pt").stat().st_size - 1)
    (out / "checkpoint-3/scheduler.pt").unlink()
    (out / "model.safetensors").unlink()
    capsys.readouterr()
    assert run("train", "--resume", "-o", out) == 0
    assert "checkpoint-3, checkpoint-4: not complete, and not used" in capsys.readouterr().err
    assert same_weights(out, folder / "whole")


def test_no_checkpoint_of_a_loss_that_is_not_a_number(folder, tmp_path, capsys):
    out = tmp_path / "a"
    how = ["--steps", 6, "--save-every", 1, "--log-every", 9, "--keep", 1, "--lr", 1e30, "--lr-min", 0]
    assert "the loss is " in one_line(capsys, *train_of(folder, out, *how))
    (whole,), _ = checkpoints(out)
    assert all(bool(x.isfinite().all()) for x in load_file(whole / "model.safetensors").values())


def test_a_configuration_that_is_cut_off_is_seen(folder, tmp_path, capsys):
    """The first lines of a TOML file are TOML too, and the rest would be defaults."""
    shutil.copytree(folder / "whole", tmp_path / "a")
    path = tmp_path / "a" / "distillation.toml"
    text = path.read_text()
    path.write_text(text[: text.index("lr =")])
    said = one_line(capsys, "train", "--resume", "-o", tmp_path / "a")
    assert said.startswith(f"{path}: is not as the run wrote it, --lr, --lr-min, --warmup")


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("job", {}, "lacks job.steps"),
        ("config", {"student": "a"}, "lacks config.teacher"),
        ("log", [5], "is damaged"),
        ("log", [{"loss": 1.0}], "lacks 'step'"),
        ("step", None, "step must be a whole number"),
        ("status", 5, "status must be a string"),
    ],
)
def test_a_record_that_is_damaged_is_named(folder, tmp_path, capsys, entry, value, said):
    shutil.copytree(folder / "whole", tmp_path / "a")
    path = tmp_path / "a" / "distillation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), entry: value}))
    error = one_line(capsys, "info", tmp_path / "a")
    assert error.startswith(f"{path}: is damaged: ") and said in error


def test_other_text_anywhere_is_seen(folder, tmp_path):
    ids, found = np.arange(200 * 16) % 90, set()
    for place in (0, 16 + 1, 198 * 16 + 3, None):
        changed = ids.copy()
        if place is not None:
            changed[place] += 1
        np.save(tmp_path / "ids.npy", changed)
        files, whole = [str(tmp_path / "ids.npy")], {"seq_len": 16, "samples": None, "seed": 0}
        data = read_windows(files, str(folder / "teacher"), **whole)
        found.add(train._digest(data)["sha256"])
    assert len(found) == 4


def test_another_teacher_in_the_same_folder(folder, tmp_path, capsys, monkeypatch):
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    shutil.copytree(folder / "student", tmp_path / "student")
    shutil.copy(folder / "text.txt", tmp_path / "text.txt")
    out = tmp_path / "a"
    with monkeypatch.context() as patch:
        after_step(patch, 2, signal.SIGINT)
        assert run(*train_of(tmp_path, out, "--steps", STEPS)) == 130
    tiny_model("llama", seed=2).save_pretrained(tmp_path / "teacher")
    said = one_line(capsys, "train", "--resume", "-o", out)
    assert said.endswith("the run to resume has another --teacher: its files have changed since\n")
    shutil.copy(folder / "teacher/model.safetensors", tmp_path / "teacher/model.safetensors")
    shutil.copy(folder / "teacher/config.json", tmp_path / "teacher/config.json")
    assert run("train", "--resume", "-o", out, "--quiet") == 0
    assert same_weights(out, folder / "whole")


def test_another_cache_in_the_same_folder(folder, tmp_path, capsys, monkeypatch):
    save_models(tmp_path)
    assert run(*cache_of(tmp_path, tmp_path / "cache", "--k", 8)) == 0
    with monkeypatch.context() as patch:
        after_step(patch, 2, signal.SIGINT)
        assert run(*train_of(tmp_path, tmp_path / "a", "--steps", STEPS, teacher="--cache")) == 130
    shutil.rmtree(tmp_path / "cache")
    assert run(*cache_of(tmp_path, tmp_path / "cache", "--k", 9)) == 0
    assert "has another --cache: its files" in one_line(capsys, "train", "--resume", "-o", tmp_path / "a")


def test_the_map_of_hidden_states_begins_by_the_seed():
    """Whatever was drawn before, as by other stages of a recipe."""
    models = tiny_model("llama", seed=0, hidden_size=32), tiny_model("llama", seed=1)
    maps = []
    for seed, before in ((0, 5), (0, 6), (1, 5)):
        torch.manual_seed(before)
        given = {"student": "nowhere", "hidden_layers": ["1:2"], "seed": seed}
        maps.append(make_loss(load("train", None, given), *models).hidden_states.map.weight)
        state = torch.get_rng_state()
        torch.manual_seed(before)
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(maps[0], maps[1]) and not torch.equal(maps[0], maps[2])


def test_the_map_begins_at_the_channels_of_this_teacher_alone(tmp_path):
    """After two rounds the plan beside the student names channels of the model between."""
    models = tiny_model("llama", seed=0, hidden_size=32), tiny_model("llama", seed=1)
    for source, known in ((48, True), (40, False)):
        config = tiny_model("llama", hidden_size=source).config.to_dict()
        plan = make_plan(even_tables(config), config, hidden_size=32, divisor=8, rescale_norms=False)
        plan.save(tmp_path / PLAN_FILE)
        given = {"student": str(tmp_path), "hidden_layers": ["1:2"]}
        start = make_loss(load("train", None, given), *models).hidden_states.map.weight.detach()
        onto = torch.zeros(48, 32)
        onto[list(plan.hidden), list(range(32))] = 1
        assert torch.equal(start, onto) == known


def test_a_linear_schedule_needs_a_step_behind_its_warm_up(folder, tmp_path, capsys):
    """It would divide by 0 after the last step, before the model is written."""
    linear = ["--lr-schedule", "linear", "--steps", 2]
    said = one_line(capsys, *train_of(folder, tmp_path / "a", *linear, "--warmup", 2))
    assert said == "--warmup must be less than the 2 steps of the run, got 2\n"
    assert run(*train_of(folder, tmp_path / "a", *linear, "--warmup", 1)) == 0
    assert read_record(tmp_path / "a")["status"] == "done"
    assert job_of(load("train", None, {"steps": 2, "warmup": 2}), 9).steps == 2  # a cosine ends there


def test_the_precision_is_the_runs_and_not_that_of_the_environment(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert run(*train_of(folder, tmp_path / "a", "--steps", STEPS)) == 0
    assert same_weights(tmp_path / "a", folder / "whole")
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_evaluations_change_no_dropout(folder, tmp_path):
    """They may be asked for otherwise when a run is resumed."""
    save_models(tmp_path)
    config = json.loads((tmp_path / "student/config.json").read_text())
    (tmp_path / "student/config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    how = ["--steps", 3, "--warmup", 0]
    held_out = ["--eval-data", tmp_path / "held.jsonl", "--eval-every", 1]
    assert run(*train_of(tmp_path, tmp_path / "a", *how)) == 0
    assert run(*train_of(tmp_path, tmp_path / "b", *how, *held_out)) == 0
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert run(*train_of(folder, tmp_path / "c", *how)) == 0
    assert not same_weights(tmp_path / "a", tmp_path / "c")  # there is dropout


def test_nothing_of_a_model_stays_that_is_replaced(folder, tmp_path):
    out = tmp_path / "a"
    shutil.copytree(folder / "whole", out)
    for name in ("chat_template.jinja", "spiece.model", "notes.md"):
        (out / name).write_text("of the last one")
    assert run(*train_of(folder, out, "--steps", STEPS, "--overwrite")) == 0
    assert same_weights(out, folder / "whole")
    assert not (out / "chat_template.jinja").exists() and not (out / "spiece.model").exists()
    assert (out / "notes.md").read_text() == "of the last one"


def test_a_run_is_alone_in_its_folder(folder, tmp_path, capsys):
    shutil.copytree(folder / "whole", tmp_path / "a")
    for how in (["train", "--resume", "-o", tmp_path / "a"], train_of(folder, tmp_path / "a", "--overwrite")):
        with train._alone(tmp_path / "a"):
            assert "a: another run is at work in it" in one_line(capsys, *how)
        assert same_weights(tmp_path / "a", folder / "whole")


def test_the_first_process_alone_looks_whether_the_folder_is_free(folder, monkeypatch):
    """Another one may come to it when the first has begun the run."""
    config = load("train", None, {"out": str(folder / "whole"), "student": str(folder / "student")})
    with pytest.raises(FileExistsError, match="has a run already"):
        train._check_out(config, resume=False, overwrite=False)
    monkeypatch.setenv("RANK", "1")
    train._check_out(config, resume=False, overwrite=False)
