"""minitron-prune: score, plan, search, prune, info; exit codes, and errors of one line."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minitron_kernels.pruning import (
    ImportanceScores,
    LMLoss,
    PruningPlan,
    collect_importance,
    count_usage,
    make_plan,
    prune_model,
    search_layers,
    search_plan,
)
from minitron_kernels.pruning.cli import estimate
from minitron_kernels.pruning.cli.main import main
from minitron_kernels.pruning.score.calibration import calibration_windows
from pruning.checkpoints import save_tiny

WORDS = [f"w{number}" for number in range(90)]
TEXT = " ".join(WORDS[number * number % 90] for number in range(400))


def save_tokenizer(folder, bos=False):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint with tokenizer, text, scores and a plan."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "src", "llama")
    save_tokenizer(folder / "src")
    (folder / "text.txt").write_text(TEXT)
    score = [
        "score",
        folder / "src",
        folder / "text.txt",
        "-o",
        folder / "scores",
        "--samples",
        5,
        "--seq-len",
        32,
    ]
    assert run(*score, "--batch-size", 2, "--quiet") == 0
    sizes = ["--hidden-size", 32, "--intermediate-size", 48, "--divisor", 16, "--num-hidden-layers", 2]
    assert run("plan", folder / "scores", "-o", folder / "plan.json", *sizes) == 0
    return folder


def run(*arguments):
    return main([str(argument) for argument in arguments])


def fails(capsys, *arguments, code=1):
    """The one line on stderr of a command that fails."""
    capsys.readouterr()
    assert run(*arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("minitron-prune: error: ") and err.count("\n") == 1
    return err


def test_scores_are_those_of_the_library(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "src")
    tokens = [WORDS.index(word) + 4 for word in TEXT.split()] + [2]
    windows = torch.tensor(tokens[:384]).view(12, 32)
    chosen = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:5].sort().values
    want = collect_importance(model, list(windows[chosen].split(2))).tables()
    got = ImportanceScores.load(folder / "scores")
    assert got.tokens == 160
    for name, table in got.tables().items():
        pairs = (
            [(table, want[name])] if torch.is_tensor(table) else [(table[k], want[name][k]) for k in table]
        )
        assert pairs and all(torch.equal(one, other) for one, other in pairs), name


def test_the_plan_is_that_of_the_library(folder):
    scores = ImportanceScores.load(folder / "scores")
    want = make_plan(scores, hidden_size=32, intermediate_size=48, num_hidden_layers=2, divisor=16)
    assert PruningPlan.load(folder / "plan.json") == want


def test_a_head_with_the_bytes_of_the_embedding_is_mentioned(folder, tmp_path, capsys):
    """The result has one tensor for both."""
    shutil.copytree(folder / "src", tmp_path / "src")
    path = tmp_path / "src/model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, {"format": "pt"})
    capsys.readouterr()
    assert run("prune", tmp_path / "src", tmp_path / "dst", folder / "plan.json") == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "head: " in line]
    assert line.startswith("minitron-prune: head: its bytes are the embedding's: it is tied to it")


def test_prune_and_info(folder, tmp_path, capsys):
    capsys.readouterr()
    assert (
        run("prune", folder / "src", tmp_path / "dst", folder / "plan.json", "--max-shard-size", "20KB") == 0
    )
    out, err = capsys.readouterr()
    plan = PruningPlan.load(folder / "plan.json")
    assert f"{plan.parameters_before:,} → {plan.parameters_after:,} parameters" in out
    assert err.startswith(
        "minitron-prune: left out: consolidated.safetensors, model.gguf, pytorch_model.bin: "
    )
    assert err.count("\n") == 1
    model = AutoModelForCausalLM.from_pretrained(folder / "src")
    want = prune_model(model, plan).state_dict()
    got = {}
    for file in (tmp_path / "dst").glob("*.safetensors"):
        got.update(load_file(file))
    assert got.keys() == want.keys() and all(got[name].equal(want[name]) for name in want)

    assert run("info", tmp_path / "dst", folder / "plan.json", folder / "scores") == 0
    checkpoint, shown_plan, scores = capsys.readouterr().out.split("\n\n")
    assert re.search(rf"parameters +{plan.parameters_after:,}\n", checkpoint)
    assert re.search(r"hidden_size +32\n", checkpoint) and "checkpoint of a llama model" in checkpoint
    assert checkpoint.count(" tensors") == len(list((tmp_path / "dst").glob("*.safetensors"))) > 1
    assert f"pruned from {plan.parameters_before:,} parameters" in checkpoint
    assert shown_plan.endswith(plan.summary())
    assert "160 tokens" in scores and "scored: hidden, energy, mlp, heads, layers" in scores


def test_targets_of_a_plan(folder, tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert run("plan", folder / "scores", "-o", path, "--ratio", 0.5, "--divisor", 8) == 0
    assert "hidden_size" in capsys.readouterr().out
    assert PruningPlan.load(path).target_config["hidden_size"] == 24
    by_name = [
        "--ratio",
        "intermediate_size=0.5",
        "--divisor",
        8,
        "--drop-layers",
        "0-1",
        "--order",
        "importance",
    ]
    assert run("plan", folder / "scores", "-o", path, "--overwrite", *by_name) == 0
    plan = PruningPlan.load(path)
    assert plan.target_config["intermediate_size"] == 40 and [entry.layer for entry in plan.layers] == [2]
    assert plan.order == "importance"
    assert run("plan", folder / "scores", "-o", path, "--overwrite", "--params", "0.05M", "--divisor", 8) == 0
    assert PruningPlan.load(path).parameters_after <= 50_000


def test_sizes_that_transformers_refuses(folder, tmp_path, capsys):
    """Llama's hidden size must be a multiple of its heads there, though 4 heads of 16 fit any."""
    odd = ["--hidden-size", 30, "--divisor", 2, "-o", tmp_path / "plan.json"]
    assert "would not load" in fails(capsys, "plan", folder / "scores", *odd)
    assert run("plan", folder / "scores", *odd, "--allow-unloadable") == 0
    assert PruningPlan.load(tmp_path / "plan.json").target_config["hidden_size"] == 30


def test_scores_of_token_ids(folder, tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(96, dtype=np.uint16).reshape(2, 48))
    arguments = ["score", folder / "src", tmp_path / "tokens.npy", "-o", tmp_path / "scores", "--seq-len", 24]
    assert run(*arguments, "--samples", 4, "--axes", "mlp", "--quiet") == 0
    scores = ImportanceScores.load(tmp_path / "scores")
    assert scores.tokens == 96 and tuple(scores.axes) == ("mlp",)


def test_windows_begin_as_the_tokenizer_begins_a_text(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "w0 w1 w2"}\n\n{"text": "w3 w4"}\n')
    files = [tmp_path / "text.jsonl"]
    plain = calibration_windows(files, save_tokenizer(tmp_path), length=3, samples=9)
    assert plain.tolist() == [[4, 5, 6], [2, 7, 8]]  # 2 ends a text
    begun = calibration_windows(files, save_tokenizer(tmp_path, bos=True), length=3, samples=9)
    assert begun.tolist() == [[1, 4, 5], [1, 6, 2], [1, 7, 8]]


def test_windows_are_drawn_by_the_seed(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(100))
    draws = [calibration_windows([tmp_path / "a.npy"], None, length=10, samples=4, seed=s) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].shape == (4, 10) and (draws[0][:, :1] + torch.arange(10) == draws[0]).all()


def test_errors_are_one_line(folder, tmp_path, capsys):
    src, plan, scores, text = (folder / name for name in ("src", "plan.json", "scores", "text.txt"))
    dst, out = tmp_path / "dst", ["-o", tmp_path / "out"]
    assert "nothing: src must be the folder" in fails(capsys, "prune", tmp_path / "nothing", dst, plan)
    assert "text.txt: " in fails(capsys, "prune", src, dst, text)
    assert "nothing.json: there is no such file; minitron-prune plan SCORES -o FILE writes it" in fails(
        capsys, "prune", src, dst, tmp_path / "nothing.json"
    )
    assert "scores: is there already" in fails(capsys, "prune", src, scores, plan)
    assert "is there already" in fails(capsys, "score", src, text, "-o", scores)
    assert "is there already" in fails(capsys, "plan", scores, "-o", plan, "--ratio", "0.5")
    assert "give a target" in fails(capsys, "plan", scores, *out)
    assert "--hidden-size must be" in fails(capsys, "plan", scores, *out, "--hidden-size", 5000)
    assert "--ratio must be" in fails(capsys, "plan", scores, *out, "--ratio", "a=b=c")
    assert "importance.json" in fails(capsys, "plan", tmp_path, *out, "--ratio", 0.5)
    assert "no config.json" in fails(capsys, "score", tmp_path, text, *out)
    assert "at most the model's 64 positions" in fails(capsys, "score", src, text, *out, "--seq-len", 65)
    short = ["--seq-len", 64, "--samples", 1]
    (tmp_path / "short.txt").write_text("w1 w2")
    assert "fewer than one window of 64" in fails(capsys, "score", src, tmp_path / "short.txt", *out, *short)
    assert ".safetensors: " in fails(capsys, "score", src, next(src.glob("*.safetensors")), *out, *short)
    (tmp_path / "bad.jsonl").write_text('{"text": "w1"}\n{"words": 1}\n')
    assert "line 2 is not a JSON object" in fails(capsys, "score", src, tmp_path / "bad.jsonl", *out, *short)
    np.save(tmp_path / "floats.npy", np.ones(100))
    assert "must be integers" in fails(capsys, "score", src, tmp_path / "floats.npy", *out, *short)
    np.save(tmp_path / "large.npy", np.full(100, 96))
    assert f"must be in [0, 96) of {src}, got 96 to 96" in fails(
        capsys, "score", src, tmp_path / "large.npy", *out, *short
    )
    np.save(tmp_path / "pickle.npy", np.array([{}]), allow_pickle=True)
    assert "cannot be read as token ids" in fails(capsys, "score", src, tmp_path / "pickle.npy", *out, *short)
    assert "--axes must be of" in fails(capsys, "score", src, text, *out, *short, "--axes", "x")
    assert "neither config.json nor" in fails(capsys, "info", tmp_path)
    assert "No such file" in fails(capsys, "info", tmp_path / "nothing")
    assert not dst.exists() and not (tmp_path / "out").exists()


def test_warnings_are_one_line(folder, tmp_path, capsys):
    arguments = [
        "score",
        folder / "src",
        folder / "text.txt",
        "-o",
        tmp_path / "s",
        "--seq-len",
        64,
        "--quiet",
    ]
    capsys.readouterr()
    assert run(*arguments) == 0
    assert (
        "minitron-prune: warning: the text has 6 windows of 64 tokens, not 1024\n" in capsys.readouterr().err
    )


def test_debug_shows_where(folder, tmp_path):
    with pytest.raises(FileNotFoundError):
        run("prune", tmp_path / "nothing", tmp_path / "dst", folder / "plan.json", "--debug")


def test_interrupted(folder, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("minitron_kernels.pruning.checkpoint.prune.prune_checkpoint", interrupt)
    capsys.readouterr()
    assert run("prune", folder / "src", tmp_path / "dst", folder / "plan.json") == 130
    assert capsys.readouterr().err.startswith("minitron-prune: interrupted: the same command")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["cut"],
        ["prune", "a"],
        ["prune", "a", "b", "c", "--max-shard-size", "5 bananas"],
        ["plan", "scores", "-o", "x", "--params", "many"],
        ["plan", "scores", "-o", "x", "--params", "inf"],
        ["plan", "scores", "-o", "x", "--params", "-1"],
        ["plan", "scores", "-o", "x", "--drop-layers", "3-"],
        ["plan", "scores", "-o", "x", "--drop-layers", "0-99999999999"],
        ["plan", "scores", "-o", "x", "--drop-layers", ""],
        ["plan", "scores", "-o", "x", "--memory", "infGB"],
        ["plan", "scores", "-o", "x", "--hidden-size", "0"],
        ["plan", "scores", "-o", "x", "--divisor", "0"],
        ["plan", "scores", "-o", "x", "--num-experts-per-tok", "0"],
        ["prune", "a", "b", "c", "--max-shard-size", "0"],
        ["prune", "a", "b", "c", "--max-shard-size", "0.1KB0"],
        ["prune", "a", "b", "c", "--threads", "0"],
        ["score", "a", "b", "-o", "c", "--batch-size", "0"],
        ["score", "a", "b", "-o", "c", "--samples", "0"],
        ["score", "a", "b", "-o", "c", "--seq-len", "1"],
        ["score", "a", "b", "-o", "c", "--dtype", "foo"],
        ["score", "a", "b", "-o", "c", "--seed", "-1"],
        ["score", "a", "b", "-o", "c", "--batch-size", "9" * 30],
        ["score", "a", "b"],
    ],
)
def test_a_wrong_command_line(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: minitron-prune" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["score"], ["plan"], ["prune"], ["info"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and (
        command == ["info"] or f"minitron-prune {(command or ['score'])[0]} " in out
    )
    assert command == ["info"] or "example" in out.lower() or "minitron-prune plan scores -o" in out


def test_as_a_module(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "minitron_kernels.pruning", "info", str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1 and done.stderr.startswith("minitron-prune: error: ")
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_the_script_that_pip_installs():
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    module, function = re.search(r'^minitron-prune = "(.+):(.+)"$', text, re.M).groups()
    assert getattr(importlib.import_module(module), function) is main


def test_sizes_in_bytes():
    from minitron_kernels._command.values import byte_count, count

    sizes = {"5GB": 5_000_000_000, "1.5GiB": 1610612736, "20KB": 20_000, "7": 7}
    assert {text: byte_count(text) for text in sizes} == sizes
    assert (count("8.4B"), count("500M"), count("8.4e9")) == (8.4e9, 5e8, 8.4e9)
    assert json.dumps(count("2K")) == "2000.0"


def test_search_by_loss(folder, tmp_path, capsys):
    """The same as in Python: sizes for a budget, then layers."""
    arguments = ["search", folder / "src", folder / "scores", folder / "text.txt", "--quiet"]
    arguments += ["--samples", 3, "--seq-len", 32, "--batch-size", 2, "--divisor", 16]
    capsys.readouterr()
    new = [*arguments, "-o", tmp_path / "plan.json", "--table", tmp_path / "table.json"]
    search = [*new, "--params", "60K", "-k", 3, "--progress-file", tmp_path / "progress.json"]
    assert run(*search) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Search for llama: params at most 60,000") and "choice of make_plan()" in out, err
    model = AutoModelForCausalLM.from_pretrained(folder / "src")
    scores = ImportanceScores.load(folder / "scores")
    loss = LMLoss(windows_of_text(3).split(2))
    want = search_plan(model, scores, loss, params=60_000, k=3, divisor=16, progress=False)
    found = json.loads((tmp_path / "table.json").read_text())
    assert [row["score"] for row in found["rows"]] == [row.score for row in want.rows]
    assert PruningPlan.load(tmp_path / "plan.json").layers == want.plan.layers
    assert "--overwrite" in fails(capsys, *search)
    assert run(*search, "--overwrite") == 0 and "3 scores were read" in capsys.readouterr().out
    message = fails(capsys, *search, "--overwrite", "--samples", 2)
    assert "holds scores of another score_func" in message and "another --progress-file" in message
    assert run(*new, "--overwrite", "--num-hidden-layers", 2, "--hidden-size", 32) == 0
    assert "1 neighbouring layers to drop" in capsys.readouterr().out
    layers = search_layers(model, 2, loss, progress=False)
    plan = PruningPlan.load(tmp_path / "plan.json")
    assert plan.dropped_layers == layers.drop_layers and len(plan.hidden) == 32
    assert "give what to search" in fails(capsys, *new, "--overwrite", "--hidden-size", 32)


def test_what_a_search_will_take_is_said(folder, tmp_path, capsys, monkeypatch):
    """Before the model is loaded, which takes minutes: how many models, and what all of them take."""
    arguments = ["search", folder / "src", folder / "scores", folder / "text.txt", "--quiet"]
    arguments += ["--samples", 3, "--seq-len", 32, "--divisor", 16, "-o", tmp_path / "plan.json"]
    whole = AutoModelForCausalLM.from_pretrained(folder / "src").num_parameters()
    monkeypatch.setattr(estimate, "_MUCH", 1.0)
    monkeypatch.setattr(importlib.import_module(main.__module__), "load_model", not_yet)

    def said(*target):
        capsys.readouterr()
        assert run(*arguments, *target) == 1
        return capsys.readouterr().err

    budget, depth = ["--params", "60K", "-k", 4], ["--num-hidden-layers", 2]
    assert f"96 tokens through each of 4 models of fewer than {whole:,} parameters" in said(*budget)
    assert f"3 models of fewer than {whole:,}" in (err := said(*depth))
    assert f": at most {2.0 * whole * 96 * 3:.1e} operations" in err and "loaded" in err
    assert "each of 7 models" in said(*budget, *depth, "--layers-by-loss")
    monkeypatch.setattr(estimate, "free_bytes", lambda device: 1000)
    assert "--device auto" not in (err := said(*depth)) and "room for a smaller model beside it" in err
    assert "give what to search" in said("--hidden-size", 32)
    assert "must be at least" in (err := said("--params", 1)) and err.endswith(", got 1\n")
    assert ", got 1,000,000,000: nothing would be cut" in said("--params", "1B")


def not_yet(*arguments, **options):
    raise ValueError("loaded")


def windows_of_text(samples):
    tokens = [WORDS.index(word) + 4 for word in TEXT.split()] + [2]
    windows = torch.tensor(tokens[:384]).view(12, 32)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    return windows[order[:samples].sort().values]


def test_budgets_of_memory_and_active_parameters(folder, tmp_path, capsys):
    plan = ["plan", folder / "scores", "-o", tmp_path / "plan.json", "--divisor", 16]
    assert run(*plan, "--memory", "150KB", "--kv-tokens", 64, "--memory-dtype", "float32") == 0
    made = PruningPlan.load(tmp_path / "plan.json")
    assert count_usage(made.target_config, memory_dtype="float32", kv_tokens=64).memory_bytes <= 150_000
    assert made.made_with["kv_tokens"] == 64
    assert run(*plan, "--active-params", "50K", "--overwrite") == 0
    assert PruningPlan.load(tmp_path / "plan.json").parameters_after <= 50_000
    assert "error: --memory must be at least" in fails(capsys, *plan, "--memory", "1KB", "--overwrite")
    message = fails(capsys, *plan, "--memory", "1MB", "--memory-dtype", "fp16", "--overwrite")
    assert "--memory-dtype must be a torch dtype" in message
