"""A recipe from end to end on tiny models: what stages make, is done again, and what interrupts leave."""

import fcntl
import json
import shutil
import signal
import sys
import types

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distillation.recipe.tomls import error_of, models, run, snapshot, tables, write
from distillation.test_cli import HELD_OUT, TEXT, after_step, same_weights, windows
from minitron_kernels import evaluation
from minitron_kernels.distillation.cli.data import Shuffled
from minitron_kernels.distillation.cli.record import read_record
from minitron_kernels.distillation.cli.training import Watch
from minitron_kernels.distillation.recipe import picture, report, stages
from minitron_kernels.distillation.recipe.train import command_of
from minitron_kernels.pruning import ImportanceScores, PruningPlan, collect_importance, make_plan, prune_model

COMPARE = {
    "ce": {"distill": {"kl_weight": 0, "ce_weight": 1}},
    "random": {"plan": {"by": "random"}, "distill": {"enabled": False}},
}
TRAINED_TOKENS = 4 * 4 * 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and text; a recipe that ran with two comparisons, in out/."""
    folder = models(tmp_path_factory.mktemp("recipe"))
    drawn = {"picture": True}
    write(folder / "recipe.toml", tables(folder, folder / "out", compare=COMPARE, recipe=drawn))
    assert run("run", folder / "recipe.toml", "--quiet") == 0
    return folder


@pytest.fixture
def again(folder, tmp_path):
    """Writes a changed recipe beside a copy of the finished one's results; its file."""
    shutil.copytree(folder / "out", tmp_path / "out")

    def made(**changes):
        found = tables(folder, tmp_path / "out", **{"compare": COMPARE, **changes})
        return write(tmp_path / "recipe.toml", found)

    return made


def state_of(out):
    return json.loads((out / "recipe.json").read_text())["stages"]


def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def mean_ce(logits, ids):
    return F.cross_entropy(logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten())


def calibration():
    """The 8 of 25 windows that the stage draws."""
    drawn = torch.randperm(25, generator=torch.Generator().manual_seed(0))[:8].sort().values
    return windows(TEXT)[drawn]


def test_scores_plan_and_cut_are_those_of_the_library(folder):
    teacher = model(folder / "teacher")
    scores = collect_importance(teacher, list(calibration().split(4)))
    plan = make_plan(scores, hidden_size=32, intermediate_size=48, divisor=16)
    found = PruningPlan.load(folder / "out/plan/plan.json")
    assert (found.hidden, found.layers, found.target_config) == (plan.hidden, plan.layers, plan.target_config)
    assert found.made_with["scores"] == "activations"
    smaller, cut = prune_model(teacher, plan).state_dict(), load_file(folder / "out/prune/model.safetensors")
    assert all(torch.equal(cut[name], smaller[name]) for name in cut) and len(cut) > 10


def test_the_loss_is_the_teachers_or_the_texts(folder):
    first = torch.stack([Shuffled(windows(TEXT), 16, 0)[i] for i in range(4)])
    with torch.no_grad():
        student = model(folder / "out/prune")(first).logits
        teacher = model(folder / "teacher")(first).logits
    logs = [part[:, :-1].double().log_softmax(-1) for part in (student, teacher)]
    kl = F.kl_div(*logs, log_target=True, reduction="none").sum(-1).mean()
    for path, want in (("distill", kl), ("compare/ce/distill", mean_ce(student, first))):
        record = json.loads((folder / "out" / path / "distillation.json").read_text())
        assert record["log"][0]["loss"] == pytest.approx(float(want), rel=1e-4)
        assert record["step"] == 4
    config = json.loads((folder / "out/compare/ce/distill/distillation.json").read_text())["config"]
    assert config["teacher"] is None  # it does not run for nothing


def test_perplexities_are_those_of_the_models(folder):
    ids = windows(HELD_OUT)
    places = {"teacher": "../teacher", "pruned": "prune", "distilled": "distill"}
    for name, place in places.items():
        found = json.loads((folder / f"out/evaluate/{name}/evaluation.json").read_text())
        (entry,) = found["perplexity"].values()
        with torch.no_grad():
            want = float(mean_ce(model(folder / "out" / place)(ids).logits, ids))
        assert entry["loss"] == pytest.approx(want, rel=1e-5) and entry["tokens"] == 60
        assert entry["perplexity"] == pytest.approx(torch.tensor(want).exp().item(), rel=1e-4)


def test_variants_share_what_is_the_same(folder):
    found = set(state_of(folder / "out"))
    of_base = {"score", "plan", "prune", "distill"} | {
        f"evaluate/{m}" for m in ("teacher", "pruned", "distilled")
    }
    of_ce = {"compare/ce/distill", "compare/ce/evaluate/distilled"}
    of_random = {f"compare/random/{stage}" for stage in ("plan", "prune", "evaluate/pruned")}
    assert found == of_base | of_ce | of_random
    assert not list((folder / "out").rglob("checkpoint-*")) and not list((folder / "out").rglob(".*.partial"))


def test_the_report(folder):
    text = (folder / "out/report.md").read_text()
    found = json.loads((folder / "out/report.json").read_text())
    names = [(row["variant"], row["model"]) for row in found["rows"]]
    assert names[:3] == [("", "teacher"), ("", "pruned"), ("", "distilled")]
    assert names[3:] == [("ce", "distilled"), ("random", "pruned")]
    assert found["rows"][2]["training"]["tokens"] == TRAINED_TOKENS
    assert len(found["rows"][2]["training"]["losses"]) == 4
    perplexity = next(iter(found["rows"][4]["perplexity"].values()))["perplexity"]
    assert f"{perplexity:.4g} |" in text and "pruned: random" in text and "plan.by = random" in text
    assert "kept" in text and "compare/random/prune" in text
    pytest.importorskip("matplotlib")
    assert (folder / "out/report.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_otherwise_is_said_and_drawn_apart():
    def row(name, **measured):
        tasks = {"toy": {"value": 1.0, "shots": measured.pop("shots", 5), "documents": 9}}
        text = {file: {"perplexity": 9.0, "tokens": tokens} for file, tokens in measured.items()}
        return {"variant": name, "model": "pruned", "perplexity": text, "tasks": tasks}

    rows = [row("", a=60, b=8), row("same", a=60), row("longer", a=62), row("other", c=5, shots=0)]
    longer, other = report.unequal(rows)
    assert longer == "pruned: longer: a is on 62 tokens; pruned: on 60 tokens. They do not compare."
    assert other.startswith("pruned: other: toy is on 0 shots, 9 documents; pruned: on 5 shots, 9 documents.")
    file, drawn = picture.bars_of(rows)
    assert file == "a" and [row["variant"] for row in drawn] == ["", "same", "longer"]


def test_the_report_names_the_versions_that_made_each_stage(again, tmp_path):
    state = json.loads((tmp_path / "out/recipe.json").read_text())
    state["stages"]["score"]["versions"]["torch"] = "1.0"
    (tmp_path / "out/recipe.json").write_text(json.dumps(state))
    assert run("run", again(), "--quiet") == 0
    assert f"torch 1.0 and {torch.__version__.partition('+')[0]}" in (tmp_path / "out/report.md").read_text()
    assert json.loads((tmp_path / "out/report.json").read_text())["versions"]["torch"][0] == "1.0"


def test_what_is_done_is_not_done_again(folder, capsys):
    before = snapshot(folder / "out")
    assert run("run", folder / "recipe.toml", "--quiet") == 0
    assert snapshot(folder / "out") == before
    assert " of " not in capsys.readouterr().err


def test_a_change_does_again_what_depends_on_it(again, tmp_path, capsys):
    file = again(evaluate={"samples": 2}, distill={"save_every": 3})
    assert run("run", file, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "evaluate/pruned  (again: samples not set → 2)" in said and "distill  (done)" in said
    before = state_of(tmp_path / "out")
    assert run("run", file, "--quiet") == 0
    after = state_of(tmp_path / "out")
    changed = {path for path in after if after[path] != before[path]}
    assert changed == {path for path in after if "evaluate/" in path}


def test_a_trained_model_is_not_thrown_away_unasked(again, tmp_path, capsys):
    file = again(plan={"intermediate_size": 64})
    before = snapshot(tmp_path / "out")
    said = error_of(capsys, "run", file, "--quiet")
    assert "distill (other student)" in said and "compare/ce/distill" in said and "--redo" in said
    assert snapshot(tmp_path / "out") == before
    file = again(
        plan={"intermediate_size": 64}, compare={}, distill={"steps": 1}, evaluate={"enabled": False}
    )
    assert run("run", file, "--quiet", "--redo") == 0
    assert json.loads((tmp_path / "out/distill/config.json").read_text())["intermediate_size"] == 64


def test_other_text_is_seen_and_damage_too(again, folder, tmp_path, capsys):
    (tmp_path / "held.txt").write_text((folder / "text.txt").read_text())
    (tmp_path / "out/plan/plan.json").write_text("{}")
    file = again(recipe={"held_out": [str(tmp_path / "held.txt")]})
    assert run("run", file, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "plan  (again: plan.json has changed)" in said and "prune  (done)" in said
    assert "evaluate/teacher  (again: other data)" in said
    assert run("run", file, "--quiet") == 0
    assert PruningPlan.load(tmp_path / "out/plan/plan.json") == PruningPlan.load(
        folder / "out/plan/plan.json"
    )


def test_a_signal_and_the_same_command(again, folder, tmp_path, monkeypatch, capsys):
    file = again()
    shutil.rmtree(tmp_path / "out/distill")  # it is not there, so that nothing is lost
    with monkeypatch.context() as patch:
        after_step(patch, 2, signal.SIGINT)
        assert run("run", file, "--quiet") == 130
    assert state_of(tmp_path / "out")["distill"]["status"] == "begun"
    assert "the same command goes on" in capsys.readouterr().err
    assert run("run", file, "--quiet") == 0
    assert same_weights(tmp_path / "out/distill", folder / "out/distill")


@pytest.mark.parametrize("stage", ["correct", "distill"])
def test_a_stopped_training_goes_on_and_does_not_begin_anew(tmp_path, monkeypatch, stage):
    """Steps before and after the stop are those of the whole, with dropout, and so are the bits."""
    models(tmp_path)
    config = json.loads((tmp_path / "teacher/config.json").read_text())
    (tmp_path / "teacher/config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    changes = {"evaluate": {"enabled": False}, "distill": {"steps": 5, "warmup": 2}}
    if stage == "correct":
        length = {"steps": 5, "batch_size": 2, "accumulation": 2, "lr": 2e-3, "warmup": 2, "log_every": 1}
        changes |= {"correct": length, "distill": {"enabled": False}}
    step, steps = Watch.on_step_end, []

    def counted(self, args, state, control, **more):
        steps.append(state.global_step)
        step(self, args, state, control, **more)

    monkeypatch.setattr(Watch, "on_step_end", counted)
    for out in ("whole", "stopped"):
        write(tmp_path / f"{out}.toml", tables(tmp_path, tmp_path / out, **changes))
    assert run("run", tmp_path / "whole.toml", "--quiet") == 0
    assert steps == [1, 2, 3, 4, 5]
    steps.clear()
    with monkeypatch.context() as patch:
        after_step(patch, 3, signal.SIGTERM)
        assert run("run", tmp_path / "stopped.toml", "--quiet") == 143
    assert steps == [1, 2, 3]
    (tmp_path / "elsewhere").mkdir()  # text may be moved
    (tmp_path / "text.txt").rename(tmp_path / "elsewhere/text.txt")
    changes["recipe"] = {"data": [str(tmp_path / "elsewhere/text.txt")]}
    write(tmp_path / "stopped.toml", tables(tmp_path, tmp_path / "stopped", **changes))
    assert run("run", tmp_path / "stopped.toml", "--quiet") == 0
    assert steps == [1, 2, 3, 4, 5]
    assert same_weights(tmp_path / "stopped" / stage, tmp_path / "whole" / stage)
    rates, losses = (
        [
            [entry[name] for entry in record["log"] if name in entry]
            for record in (read_record(tmp_path / out / stage) for out in ("whole", "stopped"))
        ]
        for name in ("learning_rate", "loss")
    )
    assert rates[0] == rates[1] and losses[0] == losses[1] and len(rates[0]) == 5


def test_an_error_leaves_nothing_half_written(folder, tmp_path, monkeypatch, capsys):
    file = write(tmp_path / "recipe.toml", tables(folder, tmp_path / "out", distill={"enabled": False}))
    save = ImportanceScores.save

    def fails(scores, into):
        save(scores, into)
        raise OSError(28, "no space left on device", "scores")

    with monkeypatch.context() as patch:
        patch.setattr(ImportanceScores, "save", fails)
        assert "no space left" in error_of(capsys, "run", file, "--quiet")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".recipe.lock", "recipe.json"]
    assert run("run", file, "--quiet") == 0
    # killed between the rename and its note
    state = json.loads((tmp_path / "out/recipe.json").read_text())
    state["stages"]["plan"]["status"] = "begun"
    (tmp_path / "out/recipe.json").write_text(json.dumps(state))
    before = (tmp_path / "out/plan/plan.json").stat().st_mtime_ns
    assert run("run", file, "--quiet") == 0
    assert (tmp_path / "out/plan/plan.json").stat().st_mtime_ns == before
    assert state_of(tmp_path / "out")["plan"]["status"] == "done"


def test_what_is_somebody_elses_stays(folder, tmp_path, capsys):
    file = write(tmp_path / "recipe.toml", tables(folder, tmp_path / "out"))
    (tmp_path / "out/plan").mkdir(parents=True)
    assert "out/plan: is there already, and is not of this recipe" in error_of(capsys, "run", file)
    (tmp_path / "out/plan").rmdir()
    with (tmp_path / "out/.recipe.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert "another run is at work in it" in error_of(capsys, "run", file)
    inside = write(tmp_path / "recipe.toml", tables(folder, folder))
    assert "out must be another folder than the teacher's" in error_of(capsys, "run", inside)
    lost = write(tmp_path / "recipe.toml", tables(folder, tmp_path / "out", score={"data": ["lost.txt"]}))
    assert error_of(capsys, "run", lost) == "lost.txt: there is no such file ([score] data)"
    wide = write(tmp_path / "recipe.toml", tables(folder, tmp_path / "out", plan={"hidden_size": 999}))
    assert error_of(capsys, "run", wide) == "[plan]: hidden_size must be from 1 to 48, got 999"
    other = write(
        tmp_path / "recipe.toml", tables(folder, tmp_path / "out", teacher_config={"hidden_size": 5})
    )
    assert "has hidden_size 48, not 5, as [teacher_config] says" in error_of(capsys, "run", other)


def test_correction_rounds_and_magnitude(folder, tmp_path):
    changes = {
        "correct": {"steps": 3, "batch_size": 4, "lr": 2e-3, "log_every": 1},
        "plan": {"rounds": 2, "by": "magnitude"},
        "distill": {"steps": 1},
    }
    file = write(tmp_path / "recipe.toml", tables(folder, tmp_path / "out", **changes))
    assert run("run", file, "--quiet") == 0
    record = json.loads((tmp_path / "out/correct/distillation.json").read_text())
    first = torch.stack([Shuffled(windows(TEXT), 12, 0)[i] for i in range(4)])
    with torch.no_grad():
        want = float(mean_ce(model(folder / "teacher")(first).logits, first))
    losses = [entry["loss"] for entry in record["log"] if "loss" in entry]
    assert losses[0] == pytest.approx(want, rel=1e-4) and losses[-1] < losses[0]
    plans = [PruningPlan.load(tmp_path / f"out/plan-{i}/plan.json") for i in (1, 2)]
    sizes = [(p.target_config["hidden_size"], p.target_config["intermediate_size"]) for p in plans]
    assert sizes[1] == (32, 48) and 32 <= sizes[0][0] <= 48 and sizes[0][1] > 48
    assert plans[1].source_config["hidden_size"] == sizes[0][0]
    assert plans[0].made_with["scores"] == "magnitude"
    rows = json.loads((tmp_path / "out/report.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["teacher", "corrected", "pruned", "distilled"]
    distilled = json.loads((tmp_path / "out/distill/distillation.json").read_text())
    assert distilled["config"]["teacher"] == str(tmp_path / "out/correct")


def test_tasks_go_to_the_harness(folder, tmp_path, monkeypatch):
    calls = []
    fake = types.ModuleType("minitron_kernels.evaluation")

    def evaluate(model, tasks, **options):
        calls.append((str(model), list(tasks), options))
        return types.SimpleNamespace(tasks={"toy": {"value": 62.5, "shots": 3}})

    fake.evaluate, fake.check_installed = evaluate, lambda: calls.append("looked")
    fake.__path__ = evaluation.__path__  # its other modules are as they were
    monkeypatch.setitem(sys.modules, "minitron_kernels.evaluation", fake)
    changes = {
        "recipe": {"held_out": None},
        "evaluate": {"tasks": ["toy"], "models": ["pruned"], "limit": 5},
        "distill": {"enabled": False},
    }
    file = write(tmp_path / "recipe.toml", tables(folder, tmp_path / "out", **changes))
    assert run("run", file, "--quiet") == 0
    looked, (place, tasks, options) = calls
    assert looked == "looked"  # before any work
    assert place == str(tmp_path / "out/prune") and tasks == ["toy"]
    assert options["limit"] == 5 and options["device"] == "cpu" and options["batch_size"] == 2
    assert "toy (3 shots)" in (tmp_path / "out/report.md").read_text()
    assert "62.5" in (tmp_path / "out/report.md").read_text()


def test_several_processes_are_torchruns(tmp_path):
    begin = command_of(8, tmp_path / "x.toml", resume=False, out=tmp_path)
    assert begin[1:5] == ["-m", "torch.distributed.run", "--nproc-per-node", "8"]
    assert begin[-2:] == ["--config", str(tmp_path / "x.toml")]
    assert command_of(8, tmp_path, resume=True, out=tmp_path / "d")[-3:] == [
        "--resume",
        "-o",
        str(tmp_path / "d"),
    ]
    assert set(stages.WRITERS) == {"score", "plan", "prune", "evaluate"}
