"""minitron-prune: each option changes what it says; what cannot work is said before, in its words."""

import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import minitron_kernels
from minitron_kernels.pruning import ImportanceScores, PruningPlan
from minitron_kernels.pruning.cli import scoring
from minitron_kernels.pruning.cli.main import main
from minitron_kernels.pruning.score.score_files import ABOUT
from pruning.checkpoints import save_tiny


def run(*arguments):
    return main([str(argument) for argument in arguments])


def fails(capsys, *arguments):
    """The one line on stderr of a command that fails, without what begins it."""
    capsys.readouterr()
    assert run(*arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("minitron-prune: error: ") and err.count("\n") == 1
    return err.removeprefix("minitron-prune: error: ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint, token ids, scores and a plan; and a model of experts with its scores."""
    folder = tmp_path_factory.mktemp("options")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(3, 96, 512))
    for name, scores in (("llama", "scores"), ("qwen3_moe", "moe-scores")):
        save_tiny(folder / name, name)
        seq = ["--seq", "mean", "L2"]
        command = ["score", folder / name, folder / "tokens.npy", "-o", folder / scores, "--seq-len", 32]
        assert run(*command, "--samples", 4, "--quiet", *seq) == 0
    sizes = ["--hidden-size", 32, "--intermediate-size", 48, "--divisor", 16]
    assert run("plan", folder / "scores", "-o", folder / "plan.json", *sizes) == 0
    return folder


def scored(folder, out, *options, name="llama"):
    command = ["score", folder / name, folder / "tokens.npy", "-o", out, "--seq-len", 32, "--quiet"]
    assert run(*command, *options) == 0
    return ImportanceScores.load(out)


def planned(folder, out, *options, scores="scores"):
    assert run("plan", folder / scores, "-o", out, "--divisor", 8, *options) == 0
    return PruningPlan.load(out)


@pytest.mark.parametrize(
    ("option", "changed", "name"),
    [
        (["--mlp-tap", "up_proj_output"], "mlp_tap", "llama"),
        (["--head-score", "channels"], "head_score", "llama"),
        (["--expert-score", "reap"], "expert_score", "qwen3_moe"),
        (["--seq", "mean", "var"], "seq", "llama"),
    ],
)
def test_what_is_scored(folder, tmp_path, option, changed, name):
    table = {"mlp_tap": "mlp", "head_score": "heads", "expert_score": "experts", "seq": "mlp"}[changed]
    plain = scored(folder, tmp_path / "plain", "--samples", 4, name=name)
    other = scored(folder, tmp_path / "other", "--samples", 4, *option, name=name)
    assert getattr(plain.options, changed) != getattr(other.options, changed)
    mine = {"batch": "L2", "seq": "var"} if changed == "seq" else {}
    tables = plain.tables()[table], other.tables(**mine)[table]
    tables = [torch.cat(list(t.values())) if isinstance(t, dict) else t for t in tables]
    assert not torch.equal(*tables)


def test_how_much_is_scored(folder, tmp_path):
    full = scored(folder, tmp_path / "full", "--samples", 99)
    assert full.tokens == 512 and full.options.seq == ("mean",)
    some = scored(folder, tmp_path / "some", "--samples", 3, "--axes", "mlp", "heads")
    assert some.tokens == 96 and tuple(some.axes) == ("mlp", "heads")
    seeded = scored(folder, tmp_path / "seeded", "--samples", 3, "--axes", "mlp", "--seed", 1)
    assert not torch.equal(seeded.tables()["mlp"][0], some.tables()["mlp"][0])
    half = scored(folder, tmp_path / "half", "--samples", 3, "--axes", "mlp", "--dtype", "bfloat16")
    assert not torch.equal(half.tables()["mlp"][0], some.tables()["mlp"][0])


def test_batches_and_device_reach_the_model(folder, tmp_path, monkeypatch):
    from minitron_kernels.pruning.score import collect

    shapes, collected, load, moved = [], collect.collect_importance, scoring.load_model, []

    def note_moves(*args):
        model = load(*args)
        to = model.to
        model.to = lambda device: (moved.append(device), to(device))[1]
        return model

    monkeypatch.setattr(scoring, "load_model", note_moves)

    def note(model, batches, *args, **kwargs):
        shapes.append((model.device.type, [tuple(batch.shape) for batch in batches], kwargs["progress"]))
        return collected(model, batches, *args, **kwargs)

    monkeypatch.setattr(collect, "collect_importance", note)
    scored(folder, tmp_path / "a", "--samples", 5, "--batch-size", 2, "--device", "cpu")
    assert shapes == [("cpu", [(2, 32), (2, 32), (1, 32)], False)] and moved == [torch.device("cpu")]


def test_scores_are_replaced_only_if_told(folder, tmp_path, capsys):
    command = [
        "score",
        folder / "llama",
        folder / "tokens.npy",
        "-o",
        tmp_path / "s",
        "--seq-len",
        32,
        "--quiet",
    ]
    assert run(*command, "--samples", 2) == 0
    assert "--overwrite" in fails(capsys, *command, "--samples", 3)
    assert ImportanceScores.load(tmp_path / "s").tokens == 64
    assert run(*command, "--samples", 3, "--overwrite") == 0
    assert ImportanceScores.load(tmp_path / "s").tokens == 96


def test_sizes_of_a_plan(folder, tmp_path):
    plan = planned(folder, tmp_path / "a", "--num-hidden-layers", 2, "--num-attention-heads", 2)
    config = plan.target_config
    assert (config["num_hidden_layers"], config["num_attention_heads"], config["hidden_size"]) == (2, 2, 48)
    plan = planned(folder, tmp_path / "b", "--num-key-value-heads", 1, "--kv-heads", "merge")
    assert plan.target_config["num_key_value_heads"] == 1
    assert len(plan.layers[0].heads.kv[0]) == 2
    plan = planned(folder, tmp_path / "c", "--num-key-value-heads", 1, "--num-attention-heads", 2)
    assert len(plan.layers[0].heads.kv[0]) == 1
    options = ["--num-experts", 3, "--moe-intermediate-size", 16, "--num-experts-per-tok", 1]
    config = planned(folder, tmp_path / "d", *options, scores="moe-scores").target_config
    (experts,) = {config[name] for name in ("num_experts", "num_local_experts") if name in config}
    assert (experts, config["moe_intermediate_size"], config["num_experts_per_tok"]) == (3, 16, 1)


def test_ways_of_a_plan(folder, tmp_path):
    size = ["--hidden-size", 32]
    plain = planned(folder, tmp_path / "a", *size)
    assert plain.norm_factors and plain.order == "original"
    assert not planned(folder, tmp_path / "b", *size, "--no-rescale-norms").norm_factors
    merged = planned(folder, tmp_path / "c", "--num-attention-heads", 2, "--merge-heads")
    assert merged.layers[0].heads.merged
    other = planned(folder, tmp_path / "d", *size, "--batch", "mean", "--seq", "L2")
    assert (other.made_with["batch"], other.made_with["seq"]) == ("mean", "L2")
    assert planned(folder, tmp_path / "e", *size, "--order", "importance").order == "importance"
    assert planned(folder, tmp_path / "f", "--params", "0.05M").parameters_after <= 50_000


def test_options_of_prune(folder, tmp_path, capsys):
    command = ["prune", folder / "llama", tmp_path / "dst", folder / "plan.json"]
    assert run(*command, "--threads", 1) == 0
    gained = load_file(tmp_path / "dst" / "model.safetensors")["model.norm.weight"]
    assert "--overwrite" in fails(capsys, *command)
    assert run(*command, "--overwrite", "--no-rescale-norms", "--quiet") == 0
    plain = load_file(tmp_path / "dst" / "model.safetensors")["model.norm.weight"]
    assert not gained.equal(plain)
    assert run(*command, "--overwrite", "--max-shard-size", "30KB") == 0
    assert len(list((tmp_path / "dst").glob("model-*.safetensors"))) > 1


def test_what_each_option_of_prune_is_for(folder, tmp_path, monkeypatch):
    seen = []

    def note(*args, **kwargs):
        seen.append(kwargs)
        raise ValueError("seen")

    monkeypatch.setattr("minitron_kernels.pruning.checkpoint.prune.prune_checkpoint", note)
    command = ["prune", folder / "llama", tmp_path / "dst", folder / "plan.json"]
    options = ["--threads", 3, "--max-shard-size", "2KB", "--leave-out", "a", "b", "--overwrite", "--quiet"]
    assert run(*command) == run(*command, *options, "--no-rescale-norms") == 1
    plain = {"max_shard_bytes": 5 * 10**9, "threads": None, "rescale_norms": True, "leave_out": []}
    assert seen[0] == {**plain, "overwrite": False, "progress": None}
    other = {"max_shard_bytes": 2000, "threads": 3, "rescale_norms": False, "leave_out": ["a", "b"]}
    assert seen[1] == {**other, "overwrite": True, "progress": False}


def test_tensors_left_out_are_said(folder, tmp_path, capsys):
    save_tiny(tmp_path / "src")
    path = tmp_path / "src" / "model.safetensors"
    save_file({**load_file(path), "x.k_scale": torch.ones(1)}, path, {"format": "pt"})
    command = ["prune", tmp_path / "src", tmp_path / "dst", folder / "plan.json"]
    assert "'x.k_scale'" in (error := fails(capsys, *command)) and "--leave-out" in error
    assert run(*command, "--leave-out", "*.k_scale") == 0
    files, tensors = capsys.readouterr().err.splitlines()
    assert "left out: consolidated.safetensors" in files and "left out: x.k_scale: tensors" in tensors


def test_weights_under_prefixes_are_scored_alike(folder, tmp_path):
    want = scored(folder, tmp_path / "want", "--samples", 2).tables()["mlp"][0]
    for prefix in ("_orig_mod.", "module.", "language_model."):
        src = tmp_path / prefix / "llama"
        save_tiny(src)
        path = src / "model.safetensors"
        save_file({prefix + n: t for n, t in load_file(path).items()}, path, {"format": "pt"})
        (tmp_path / prefix / "tokens.npy").symlink_to(folder / "tokens.npy")
        got = scored(tmp_path / prefix, tmp_path / prefix / "scores", "--samples", 2)
        assert got.tables()["mlp"][0].equal(want)


def test_weights_that_are_not_there_are_not_made_up(folder, tmp_path, capsys):
    save_tiny(tmp_path / "src")
    path = tmp_path / "src" / "model.safetensors"
    tensors = load_file(path)
    few = ["--samples", 2, "--quiet"]
    command = ["score", tmp_path / "src", folder / "tokens.npy", "-o", tmp_path / "out", "--seq-len", 32]
    save_file({f"student.{n}": t for n, t in tensors.items()}, path, {"format": "pt"})
    assert "does not hold" in fails(capsys, *command, *few)
    lacking = {n: t for n, t in tensors.items() if "layers.1.mlp.up_proj" not in n}
    save_file(lacking, path, {"format": "pt"})
    assert "does not hold model.layers.1.mlp.up_proj" in fails(capsys, *command, *few)
    (tmp_path / "src" / "adapter_config.json").write_text("{}")
    assert "merge it first" in fails(capsys, *command, *few)
    assert not (tmp_path / "out").exists()


def test_what_cannot_work_is_said_before_the_work(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scoring, "load_model", lambda *args: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "dir").mkdir()
    command = ["score", folder / "llama", folder / "tokens.npy", "--seq-len", 32, "--samples", 2, "-o"]
    assert "file: cannot be written to" in fails(capsys, *command, tmp_path / "file" / "scores")
    assert "is not a folder" in fails(capsys, *command, tmp_path / "file", "--overwrite")
    monkeypatch.setattr(os, "access", lambda path, how: False)
    assert f"{tmp_path}: cannot be written to" in fails(capsys, *command, tmp_path / "scores")
    plan = ["plan", folder / "scores", "--ratio", 0.5, "-o"]
    assert f"{tmp_path}: cannot be written to" in fails(capsys, *plan, tmp_path / "plan.json")
    monkeypatch.undo()
    assert "is not a file" in fails(capsys, *plan, tmp_path / "dir", "--overwrite")
    nowhere = fails(capsys, *plan, tmp_path / "nowhere" / "plan.json")
    assert nowhere == f"{tmp_path / 'nowhere'}: there is no such folder to write --output to\n"
    assert "--device mars: cannot be used here" in fails(capsys, *command, tmp_path / "s", "--device", "mars")
    assert "--device meta: cannot be used" in fails(capsys, *command, tmp_path / "s", "--device", "meta")
    if not torch.cuda.is_available():
        assert "--device cuda: cannot" in fails(capsys, *command, tmp_path / "s", "--device", "cuda")


def test_what_a_model_is_missing(folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("some words")
    out = ["-o", tmp_path / "out"]
    hub = fails(capsys, "score", "HuggingFaceTB/SmolLM2-135M", text, *out)
    assert "hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M" in hub
    assert "no tokenizer" in (error := fails(capsys, "score", folder / "llama", text, *out, "--seq-len", 9))
    assert ".npy" in error


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model_type", "foo", "model_type 'foo' is not known: docs/families.md lists those that are"),
        (
            "model_type",
            "bert",
            "prune a decoder of one stack of layers instead; docs/families.md lists those",
        ),
        ("hidden_size", "big", "its sizes must be whole numbers from 1 on: "),
        ("hidden_size", [1], "list"),
        ("num_attention_heads", 0, "its sizes must be whole numbers from 1 on: integer division"),
    ],
)
def test_a_config_that_is_wrong_is_named(folder, tmp_path, capsys, key, value, said):
    shutil.copytree(folder / "llama", tmp_path / "model")
    shutil.copytree(folder / "scores", tmp_path / "scores")
    for path, keys in ((tmp_path / "model" / "config.json", ()), (tmp_path / "scores" / ABOUT, ("config",))):
        whole = inside = json.loads(path.read_text())
        for name in keys:
            inside = inside[name]
        inside[key] = value
        path.write_text(json.dumps(whole))
    text = [folder / "tokens.npy", "-o", tmp_path / "out", "--seq-len", 32]
    for command, name in (
        (["info", tmp_path / "model"], "model/config.json"),
        (["score", tmp_path / "model", *text], "model/config.json"),
        (["info", tmp_path / "scores"], ABOUT),
        (["plan", tmp_path / "scores", *text[1:3], "--ratio", 0.5], ABOUT),
    ):
        error = fails(capsys, *command)
        assert f"{tmp_path}" in error and name in error and len(error) < 500, error
        assert said in error or command[0] == "score", error  # where transformers has its own words
    assert not (tmp_path / "out").exists()


def test_weights_that_config_json_does_not_describe_are_said(folder, tmp_path, capsys):
    """As the layers of a model whose config says fewer: they would go without a word."""
    shutil.copytree(folder / "llama", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["num_hidden_layers"] -= 1
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "layer_types"}))
    capsys.readouterr()
    few = ["--seq-len", 32, "--samples", 2, "--quiet"]
    assert run("score", tmp_path / "model", folder / "tokens.npy", "-o", tmp_path / "out", *few) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": warning: " in line]
    assert f"{tmp_path / 'model'}: config.json describes no model.layers.2." in line and "more" in line


def test_a_file_of_weights_that_is_cut_off_is_named(folder, tmp_path, capsys):
    shutil.copytree(folder / "llama", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    few = ["-o", tmp_path / "out", "--seq-len", 32, "--samples", 2]
    error = fails(capsys, "score", tmp_path / "model", folder / "tokens.npy", *few)
    assert error.startswith(f"{path}: cannot be loaded: ")


def test_errors_name_options(folder, tmp_path, capsys):
    command = ["plan", folder / "scores", "-o", tmp_path / "p"]
    assert "another --divisor" in fails(capsys, *command, "--hidden-size", 30)
    assert "or --allow-unloadable" in fails(capsys, *command, "--hidden-size", 30, "--divisor", 2)
    assert "--intermediate-size must be" in fails(capsys, *command, "--intermediate-size", 800)
    assert "--params must be at least" in fails(capsys, *command, "--params", 5)
    assert "--drop-layers" in fails(capsys, *command, "--drop-layers", "1-99")
    assert "minitron-prune score writes" in fails(capsys, "plan", tmp_path, *command[2:], "--ratio", 0.5)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("kind", [RuntimeError, KeyError, AssertionError, MemoryError, ZeroDivisionError])
def test_any_error_is_one_line(tmp_path, capsys, monkeypatch, kind):
    def fail(*args, **kwargs):
        raise kind("first\nsecond")

    monkeypatch.setattr("minitron_kernels.pruning.cli.info.describe", fail)
    assert "first" in fails(capsys, "info", tmp_path)
    with pytest.raises(kind):
        run("info", tmp_path, "--debug")


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"minitron-prune {minitron_kernels.__version__}\n"


@pytest.mark.parametrize(
    ("encoding", "arrow"), [("ascii", b"->"), ("latin-1", b"->"), ("utf-8", "→".encode())]
)
def test_an_output_that_has_no_arrow(folder, tmp_path, monkeypatch, encoding, arrow):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    assert run("prune", folder / "llama", tmp_path / "dst-é-\udcff", folder / "plan.json", "--quiet") == 0
    out.flush()
    assert arrow in out.buffer.getvalue()


def test_interrupted_says_what_the_same_command_does(folder, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("minitron_kernels.pruning.checkpoint.prune.prune_checkpoint", interrupt)
    monkeypatch.setattr("minitron_kernels.pruning.cli.info.describe", interrupt)
    capsys.readouterr()
    assert run("prune", folder / "llama", tmp_path / "dst", folder / "plan.json") == 130
    assert "goes on from here" in capsys.readouterr().err
    assert run("info", folder) == 130
    assert "begins anew" in capsys.readouterr().err


def test_info_of_what_is_no_plan(folder, capsys):
    assert "is not a plan" in fails(capsys, "info", folder / "llama" / "model.safetensors")
    assert "is not a plan" in fails(capsys, "info", folder / "tokens.npy")


def test_info_tells_what_config_and_files_say_otherwise(folder, tmp_path, capsys):
    save_tiny(tmp_path / "src")
    capsys.readouterr()
    assert run("info", tmp_path / "src") == 0
    assert "in the files" not in capsys.readouterr().out
    path = tmp_path / "src" / "model.safetensors"
    save_file({**load_file(path), "more": torch.ones(7)}, path, {"format": "pt"})
    assert run("info", tmp_path / "src") == 0
    assert "in the files" in capsys.readouterr().out


def test_token_ids_below_zero(folder, tmp_path, capsys):
    np.save(tmp_path / "negative.npy", np.arange(-3, 61))
    command = ["score", folder / "llama", tmp_path / "negative.npy", "-o", tmp_path / "s", "--seq-len", 32]
    error = fails(capsys, *command, "--samples", 2)
    assert "negative.npy: " in error and "-3" in error
