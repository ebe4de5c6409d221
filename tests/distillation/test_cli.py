"""minitron-distill: train, cache, info, on tiny models; signals, and resuming to the same bits."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillation.cli_runs import (
    HELD_OUT,
    TEXT,
    WORDS,
    cache_of,
    one_line,
    run,
    save_models,
    save_tokenizer,
    train_of,
)
from minitron_kernels._command.progress import Progress
from minitron_kernels.distillation.cli.data import Shuffled
from minitron_kernels.distillation.cli.job import Job, job_of
from minitron_kernels.distillation.cli.record import checkpoints, read_record

STEPS = 6
PARAMETERS = 28384  # of the student


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and text, a cache of all tokens, and a run of six steps."""
    folder = tmp_path_factory.mktemp("cli")
    save_models(folder)
    assert run(*cache_of(folder, folder / "cache", "--k", 96, "--quantiser", "fp32")) == 0
    held_out = ["--eval-data", folder / "held.jsonl", "--eval-every", 4]
    assert run(*train_of(folder, folder / "live", "--steps", STEPS, *held_out)) == 0
    return folder


def windows(text):
    """[windows, 16]: the tokens of a text and the one that ends it."""
    ids = [WORDS.index(word) + 4 for word in text.split()] + [2]
    return torch.tensor(ids[: len(ids) // 16 * 16]).view(-1, 16)


def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def kl_of(folder, student, ids):
    """Mean KL over the positions that have a next token, from whole logits in float64."""
    with torch.no_grad():
        ours = model(student)(ids).logits[:, :-1].double().log_softmax(-1)
        theirs = model(folder / "teacher")(ids).logits[:, :-1].double().log_softmax(-1)
    return float(F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).mean())


def same_weights(one, other):
    one, other = (load_file(path / "model.safetensors") for path in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def after_step(monkeypatch, step, *signals):
    """Sends signals to this process after a step (or batch) is counted."""
    advance = Progress.advance

    def counted(self, steps=1, *figures, **more):
        advance(self, steps, *figures, **more)
        if self._done == step:
            for number in signals:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(Progress, "advance", counted)


def test_a_live_teacher(folder):
    record = read_record(folder / "live")
    assert (record["status"], record["step"], record["parameters"]) == ("done", STEPS, PARAMETERS)
    assert record["versions"].keys() >= {"minitron_kernels", "torch", "transformers", "python"}
    assert record["job"] == {"windows": 25, "seq_len": 16, "processes": 1, "per_step": 4, "steps": STEPS}
    losses = [entry for entry in record["log"] if "loss" in entry]
    # the first step's windows are those of Shuffled; its learning rate is 0
    first = torch.stack([Shuffled(windows(TEXT), 24, 0)[i] for i in range(4)])
    want = kl_of(folder, folder / "student", first)
    assert losses[0]["kl"] == pytest.approx(want, rel=1e-4)
    assert losses[0]["loss"] == pytest.approx(want, rel=1e-4)
    assert [entry["step"] for entry in losses] == [1, 2, 3, 4, 5, 6]
    rates = [2e-4 + 9e-4 * (1 + np.cos(np.pi * done / 5)) for done in range(5)]
    assert [entry["learning_rate"] for entry in losses] == pytest.approx([0, *rates])
    held_out = [entry for entry in record["log"] if "eval_kl" in entry]
    assert [entry["step"] for entry in held_out] == [0, 4, 6]
    for entry, student in ((held_out[0], "student"), (held_out[-1], "live")):
        want = kl_of(folder, folder / student, windows(HELD_OUT))
        assert entry["eval_kl"] == pytest.approx(want, rel=1e-4)
    assert held_out[-1]["eval_kl"] < held_out[0]["eval_kl"]


def test_the_order_of_windows():
    order = [int(Shuffled(list(range(7)), 21, seed)[i]) for seed in (0, 0, 1) for i in range(21)]
    first, again, other = order[:21], order[21:42], order[42:]
    assert first == again != other and first[:7] != first[7:14] != first[14:]
    assert all(sorted(order[i : i + 7]) == list(range(7)) for i in range(0, 63, 7))


def test_options_reach_the_trainer(tmp_path):
    from minitron_kernels.distillation.cli.config import load
    from minitron_kernels.distillation.cli.training import arguments_of

    given = {
        "batch_size": 3,
        "accumulation": 5,
        "lr": 0.5,
        "lr_min": 0.25,
        "warmup": 2,
        "weight_decay": 0.125,
        "beta1": 0.75,
        "beta2": 0.625,
        "max_grad_norm": 7.0,
        "seed": 11,
        "autocast": "bfloat16",
        "save_every": 13,
        "keep": 17,
        "log_every": 19,
        "eval_data": ["x"],
        "eval_every": 23,
        "gradient_checkpointing": True,
        "out": str(tmp_path / "a"),
    }
    job = Job(windows=90, seq_len=4, processes=1, per_step=15, steps=29)
    made = arguments_of(load("train", None, given), job, "cpu", resumes=True, has_experts=False)
    assert (made.per_device_train_batch_size, made.gradient_accumulation_steps) == (3, 5)
    assert (made.learning_rate, made.lr_scheduler_kwargs, made.warmup_steps) == (0.5, {"min_lr": 0.25}, 2)
    assert (made.weight_decay, made.adam_beta1, made.adam_beta2) == (0.125, 0.75, 0.625)
    assert (made.max_grad_norm, made.seed, made.bf16, made.max_steps) == (7.0, 11, True, 29)
    assert (made.save_steps, made.logging_steps, made.eval_steps) == (13, 19, 23)
    assert made.save_total_limit is None  # old checkpoints go when the new one is marked, and not before
    assert not made.eval_on_start and "gradient_checkpointing=True" in repr(made).replace(
        "activation", "gradient"
    )
    plain = arguments_of(load("train", None, {"out": "x"}), job, "cpu", resumes=False, has_experts=False)
    assert not plain.bf16 and plain.eval_strategy == "no"


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, 4),
        ({"steps": 9}, 9),
        ({"tokens": 97}, 3),
        ({"tokens": 96}, 2),
        ({"epochs": 2.0}, 7),
        ({"epochs": 0.1}, 1),
    ],
)
def test_how_many_steps(given, steps):
    from minitron_kernels.distillation.cli.config import load

    config = load("train", None, {"batch_size": 3, "accumulation": 2, "seq_len": 8, **given})
    job = job_of(config, 20)
    assert (job.steps, job.per_step, job.tokens) == (steps, 6, steps * 48)


def test_what_a_run_leaves(folder):
    live = folder / "live"
    tokenizer = AutoTokenizer.from_pretrained(live)
    assert tokenizer("w3 w5")["input_ids"] == [7, 9]
    assert {path.name for path in live.glob("distillation.*")} >= {"distillation.json", "distillation.toml"}
    pytest.importorskip("matplotlib", reason="draws the curves")
    assert (live / "distillation.png").read_bytes().startswith(b"\x89PNG")


def test_a_cache_of_all_tokens_teaches_the_same(folder, tmp_path):
    options = ["--steps", STEPS, "--eval-every", 4, "--no-picture"]
    assert run(*train_of(folder, tmp_path / "a", *options, teacher="--cache")) == 0
    live, cached = (load_file(path / "model.safetensors") for path in (folder / "live", tmp_path / "a"))
    before = load_file(folder / "student" / "model.safetensors")
    for name in live:
        moved = (live[name] - before[name]).norm()
        assert (live[name] - cached[name]).norm() <= 1e-2 * moved, name
    assert not (tmp_path / "a" / "distillation.png").exists()


def test_hidden_states_of_a_cache_and_windows_that_it_lacks(folder, tmp_path, capsys):
    kept = ["--tier", "hidden", "--samples", 6]
    assert run(*cache_of(folder, tmp_path / "cache", *kept)) == 0
    arguments = train_of(folder, tmp_path / "a", "--cache", tmp_path / "cache", "--epochs", 1, "--no-quiet")
    capsys.readouterr()
    assert run(*arguments) == 0
    out, err = capsys.readouterr()
    assert "19 of 25 windows of --data are not in the cache, and left out" in err
    assert "2 steps of 4 windows = 128 tokens, 1.33 passes over 6 windows of 16" in err
    assert "2 steps, 128 tokens; at the end loss" in out
    arguments.remove("--teacher"), arguments.remove(folder / "teacher")
    arguments[arguments.index("-o") + 1] = tmp_path / "b"
    assert "--cache holds hidden states: give the --teacher too" in one_line(capsys, *arguments)
    np.save(tmp_path / "other.npy", np.arange(64) % 90)
    other = train_of(folder, tmp_path / "b", "--cache", tmp_path / "cache", "--data", tmp_path / "other.npy")
    assert "has none of the 4 windows of --data" in one_line(capsys, *other)


def test_dtypes(folder, tmp_path):
    kinds = ["--dtype", "bfloat16", "--save-dtype", "float16", "--teacher-dtype", "bfloat16"]
    assert run(*train_of(folder, tmp_path / "a", "--steps", 1, *kinds)) == 0
    saved = load_file(tmp_path / "a" / "model.safetensors")
    kept = load_file(tmp_path / "a" / "checkpoint-1" / "model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.float16}
    assert {x.dtype for x in kept.values()} == {torch.bfloat16}


def test_terms_of_the_loss(folder, tmp_path):
    terms = ["--ce-weight", 0.5, "--kl-weight", 0.25, "--divergence", "jsd", "--hidden-layers", "0:0", "1:2"]
    how = ["--hidden-weight", 0.1, "--steps", 2, "--gradient-checkpointing", "--lr-schedule", "linear"]
    assert run(*train_of(folder, tmp_path / "a", *terms, *how)) == 0
    log = [entry for entry in read_record(tmp_path / "a")["log"] if "loss" in entry]
    for entry in log:
        want = 0.25 * entry["kl"] + 0.5 * entry["ce"] + 0.1 * entry["hidden"]
        assert entry["loss"] == pytest.approx(want, rel=1e-3)
    assert set(load_file(tmp_path / "a" / "model.safetensors")) == set(
        load_file(folder / "student" / "model.safetensors")
    )


def test_info(folder, tmp_path, capsys):
    capsys.readouterr()
    assert run("info", folder / "live", folder / "cache", "--verify") == 0
    about_run, about_cache = capsys.readouterr().out.split("\n\n")
    assert "distillation run, done, step 6 of 6" in about_run and "kl, held out" in about_run
    assert f"{PARAMETERS:,} parameters; 384 tokens of 384, 4 windows of 16 in a step" in about_run
    assert "checkpoints: checkpoint-6" in about_run
    assert "topk (up to 96 ids" in about_cache and "25 sequences, 400 tokens" in about_cache
    assert "verified: every checksum" in about_cache
    assert "it is not a run, nor a teacher's cache; for a checkpoint: minitron-prune info" in one_line(
        capsys, "info", folder / "student"
    )
    shutil.copytree(folder / "cache", tmp_path / "cache")
    shard = max(tmp_path.glob("cache/*"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    assert shard.name in one_line(capsys, "info", tmp_path / "cache", "--verify")


def test_info_of_what_has_nothing_to_verify(folder, tmp_path, capsys):
    shutil.copytree(folder / "cache", tmp_path / "cache")
    for path in tmp_path.glob("cache/rows-*"):  # shards and their lists
        path.unlink()
    assert "holds no sequence" in one_line(capsys, "info", tmp_path / "cache", "--verify")
    assert run("info", folder / "live", tmp_path / "nothing") == 1
    assert capsys.readouterr().out.startswith(f"{folder / 'live'}: distillation run, done")
    shutil.copytree(folder / "live", tmp_path / "run")
    (checkpoint,) = tmp_path.glob("run/checkpoint-*")
    (checkpoint / "model.safetensors").unlink()
    said = one_line(capsys, "info", tmp_path / "run", "--verify")
    assert f"{checkpoint}: is not complete: delete it; the run is done, and does not need it" in said


@pytest.mark.parametrize("damage", ["cut off", "gone", "config"])
def test_info_looks_at_the_model_of_a_run(folder, tmp_path, capsys, damage):
    shutil.copytree(folder / "live", tmp_path / "run")
    assert run("info", tmp_path / "run", "--verify") == 0
    out = capsys.readouterr().out
    assert "GB in 1 file\n" in out and "verified: complete: the model's files, checkpoint-6" in out
    name = "config.json" if damage == "config" else "model.safetensors"
    file = tmp_path / "run" / name
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        file.unlink()
    assert name in one_line(capsys, "info", tmp_path / "run", "--verify")
    assert run("info", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "model: not complete: " in out and name in out and "--resume -o" in out


def test_a_dry_run_writes_nothing(folder, tmp_path, capsys):
    before = snapshot(folder)
    (tmp_path / "a.toml").write_text('[train]\ntokens = "1K"\neval_data = "%s"\n' % (folder / "held.jsonl"))
    capsys.readouterr()
    arguments = train_of(folder, tmp_path / "a", "--config", tmp_path / "a.toml", "--dry-run")
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    assert "16 steps of 4 windows = 1,024 tokens, 2.56 passes over 25 windows of 16" in out
    assert f"student   {PARAMETERS:,} parameters in float32, 2 layers of 32, vocabulary 96" in out
    kept = {"student's weights": 4, "its gradients": 4, "AdamW's moments": 8}
    for name, each in kept.items():
        assert f"{PARAMETERS * each / 1024:.4g} KiB  {name}" in out, out
    assert "activations of the student" in out and "scratch memory of the loss" in out
    assert "held out  4 windows" in out and "0 → 0.002 in 1 steps, cosine to 0.0002 at 16" in out
    assert run(*train_of(folder, tmp_path / "a", "--steps", 1, "--dry-run", teacher="--cache")) == 0
    assert "topk (up to 96 ids" in capsys.readouterr().out
    for tier in (["--k", 96], ["--tier", "hidden"], ["--tier", "sampled", "--draws", 4]):
        assert run(*cache_of(folder, tmp_path / "a", *tier, "--dry-run")) == 0
        out = capsys.readouterr().out
        assert "25 windows of 16 = 400 tokens, in 7 batches" in out and "bytes a token" in out
    assert snapshot(folder) == before and not (tmp_path / "a").exists()


def test_the_bytes_that_a_dry_run_expects(folder, tmp_path, capsys):
    for tier in (["--k", 96], ["--k", 5, "--temperatures", 1, 2], ["--tier", "hidden"]):
        capsys.readouterr()
        assert run(*cache_of(folder, tmp_path / "a", *tier, "--dry-run")) == 0
        said = float(capsys.readouterr().out.split(" bytes a token")[0].split()[-1])
        out = tmp_path / str(tier[1])
        assert run(*cache_of(folder, out, *tier)) == 0
        shards = list(out.rglob("*.safetensors"))
        held = sum(x.numel() * x.element_size() for path in shards for x in load_file(path).values()) / 400
        # about 90 bytes a window, its digest and the lengths of its fields, are not in what is said
        assert said == pytest.approx(held - 90 / 16, rel=0.15)


@pytest.mark.parametrize(
    ("signals", "code", "status", "left"),
    [
        ([signal.SIGINT], 130, "interrupted", 3),
        ([signal.SIGTERM], 143, "interrupted", 3),
        ([signal.SIGINT, signal.SIGINT], 130, "stopped", 2),
    ],
)
def test_an_interrupted_run_ends_with_the_same_bits(
    folder, tmp_path, capfd, monkeypatch, signals, code, status, left
):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    out = tmp_path / "a"
    with monkeypatch.context() as patch:
        after_step(patch, 3, *signals)
        held_out = ["--eval-data", folder / "held.jsonl", "--eval-every", 4]
        arguments = train_of(folder, out, "--steps", STEPS, "--save-every", 2, "--keep", 9, *held_out)
        capfd.readouterr()
        assert run(*arguments) == code
    err = capfd.readouterr().err
    assert f"minitron-distill train --resume -o {out} goes on from checkpoint-{left}\n" in err
    assert "stopping after this step; once more to stop at once" in err
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert read_record(out)["status"] == status and not (out / "model.safetensors").exists()
    if signals == [signal.SIGTERM]:
        return  # it leaves what SIGINT leaves
    if status == "stopped":  # a checkpoint that is not complete is not taken
        shutil.copytree(out / "checkpoint-2", out / "checkpoint-3")
        (out / "checkpoint-3" / "complete").unlink()
    assert run("train", "--resume", "-o", out) == 0
    err = capfd.readouterr().err
    assert ("checkpoint-3: not complete, and not used" in err) == (status == "stopped")
    assert same_weights(out, folder / "live")
    ours, theirs = (
        [(entry["step"], entry["kl"]) for entry in read_record(path)["log"] if "kl" in entry]
        for path in (out, folder / "live")
    )
    assert ours == theirs


def test_what_a_resumed_run_must_keep(folder, tmp_path, capsys):
    out = tmp_path / "live"
    shutil.copytree(folder / "live", out)
    assert "another --seq-len, --lr;" in one_line(
        capsys, "train", "--resume", "-o", out, "--lr", 1e-3, "--seq-len", 8
    )
    assert "has a run already; --resume, --overwrite" in one_line(
        capsys, *train_of(folder, out, "--steps", 1)
    )
    assert run("train", "--resume", "-o", out, "--save-every", 3, "--quiet") == 0
    assert same_weights(out, folder / "live")
    (tmp_path / "text.txt").write_text(TEXT + " w1" * 16)
    toml = (out / "distillation.toml").read_text().replace(str(folder / "text"), str(tmp_path / "text"))
    (out / "distillation.toml").write_text(toml)
    assert "has other --data: its files have changed" in one_line(capsys, "train", "--resume", "-o", out)
    assert run(*train_of(folder, out, "--steps", 1, "--overwrite")) == 0
    assert [path.name for path in checkpoints(out)[0]] == ["checkpoint-1"]


def test_an_interrupted_cache_goes_on(folder, tmp_path, capfd, monkeypatch):
    out = tmp_path / "cache"
    with monkeypatch.context() as patch:
        after_step(patch, 2, signal.SIGINT)
        capfd.readouterr()
        assert run(*cache_of(folder, out, "--k", 96)) == 130
    err = capfd.readouterr().err
    assert "interrupted: 8 windows cached, 128 tokens" in err and "the same command goes on from here" in err
    assert run(*cache_of(folder, out, "--k", 96)) == 0
    assert "17 windows cached, 8 were there" in capfd.readouterr().out
    assert run("info", out, "--verify") == 0


def test_errors_are_one_line_that_names_the_flag(folder, tmp_path, capsys):
    def train(*options, **more):
        return one_line(capsys, *train_of(folder, tmp_path / "out", "--steps", 1, *options, **more))

    def cache(*options):
        return one_line(capsys, *cache_of(folder, tmp_path / "out", *options))

    (tmp_path / "short.txt").write_text("w1 w2")
    student, teacher, text = folder / "student", folder / "teacher", folder / "text.txt"
    assert "no config.json" in train("--student", tmp_path)
    assert "there is no such folder; a model of the hub is downloaded first" in train("--teacher", "a/b")
    assert "has no cache.json" in train("--cache", tmp_path)
    assert "a cache of tier topk needs no teacher, leave one" in train("--cache", folder / "cache")
    assert "there is no such file (--data)" in train("--data", tmp_path / "nothing.txt")
    (tmp_path / "empty").mkdir()
    assert "is a folder without .txt" in train("--eval-data", tmp_path / "empty")
    assert "--seq-len must be at most" in train("--seq-len", 65)
    assert "fewer than one window of 64" in train("--seq-len", 64, "--eval-data", tmp_path / "short.txt")
    assert "give one of --steps, --tokens and --epochs, got --steps and --tokens" in train("--tokens", 5)
    assert "--warmup must be at most the 1 steps" in train("--warmup", 2)
    assert "--lr-min must be below --lr 0.002, got 0.002" in train("--lr-min", 2e-3)
    assert "give --ce-weight too" in train("--label-smoothing", 0.1)
    assert "give --hidden-layers" in train("--hidden-weight", 1)
    assert "the student's layers are 0 to 1" in train("--hidden-layers", "2:2")
    assert "the student's layer 1 is given twice" in train("--hidden-layers", "1:2", "1:1")
    assert "--hidden-layers needs a --teacher that runs" in train("--hidden-layers", "1:2", teacher="--cache")
    assert "--out must be another folder than --student" in train("-o", student)
    assert "is not the folder of a run" in train("-o", teacher.parent, "--overwrite")
    assert "is there already" in train("-o", text)
    said = "--temperature must be one at which the cache has the tail, 1, got 2"
    assert said in train("--temperature", 2, teacher="--cache")
    if not torch.cuda.is_available():
        assert "--device cuda: cannot be used here" in train("--device", "cuda")
    np.save(tmp_path / "large.npy", np.full(64, 96))
    assert "token ids must be in [0, 96)" in train("--data", tmp_path / "large.npy")
    shutil.copytree(teacher, tmp_path / "other")
    save_tokenizer(tmp_path / "other", WORDS[::-1])
    assert "has other tokens than the student's (90 ids differ)" in train("--teacher", tmp_path / "other")
    assert "--k is for --tier topk, got --tier hidden" in cache("--tier", "hidden", "--k", 3)
    assert "--draws is for --tier sampled" in cache("--draws", 3)
    assert "has other files than a cache's" in cache("-o", student)
    assert "k 96" in cache("-o", folder / "cache", "--k", 3)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_a_number_stops_the_run(folder, tmp_path, capsys):
    said = one_line(capsys, *train_of(folder, tmp_path / "a", "--steps", 9, "--lr", 1e30, "--lr-min", 0))
    assert said.startswith("the loss is ") and "take a lower --lr" in said
    assert read_record(tmp_path / "a")["status"] == "failed"
    assert json.loads((tmp_path / "a" / "distillation.json").read_text())["step"] < 9
