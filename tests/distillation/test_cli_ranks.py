"""minitron-distill train --fsdp on two processes, joined by gloo: weights, losses, resuming, checkpoints."""

import json

import pytest
import torch

pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distillation.accelerators import forget_accelerator
from distillation.cli_rank_cases import CASES, HELD_OUT, STEPS
from distillation.cli_runs import STUDENT, one_line, run, save_models, save_tokenizer, train_of
from distillation.trainer_ranks import start
from minitron_kernels.distillation.cli.record import read_record
from pruning.family_configs import CASES as CASES_OF
from pruning.tiny_models import random_model, tiny_model
from tools.ranks import errors_of

ONE = {"one": [], "split": ["--batch-size", 1, "--accumulation", 4]}  # runs of one process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and text, runs of one process, and those of two."""
    folder = tmp_path_factory.mktemp("ranks")
    save_models(folder)
    tiny_model("llama", seed=0, **STUDENT, tie_word_embeddings=True).save_pretrained(folder / "tied")
    save_tokenizer(folder / "tied")
    random_model(CASES_OF["qwen2_moe"].make_config()).save_pretrained(folder / "experts")
    save_tokenizer(folder / "experts")
    held_out = ["--eval-data", folder / HELD_OUT[0], *HELD_OUT[1:]]
    with forget_accelerator():
        for name, how in ONE.items():
            options = [*held_out, "--steps", STEPS, "--no-picture", *how]
            assert run(*train_of(folder, folder / name, *options)) == 0
    reports = start(folder, module="cli_rank_cases")
    errors = "\n".join(errors_of(reports, name) for name in CASES)
    assert not errors.strip(), errors
    return folder


def weights(run):
    return load_file(run / "model.safetensors")


def apart(one, other):
    """{name: the norm of the difference}."""
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    return {name: float((one[name].double() - other[name].double()).norm()) for name in one}


def test_weights_and_losses_are_those_of_one_process(folder):
    """To rounding: no further apart than twice what another split into micro-batches makes, and some ulps."""
    one, split, sharded = (weights(folder / name) for name in ("one", "split", "trained/out"))
    rounding, found = apart(split, one), apart(sharded, one)
    moved = apart(weights(folder / "student"), one)
    for name, error in found.items():
        ulps = 4 * torch.finfo(torch.float32).eps * float(one[name].norm())
        assert error <= 2 * rounding[name] + ulps, (name, error, rounding[name])
        assert error < 1e-3 * moved[name], name
    ours, theirs = (read_record(folder / name)["log"] for name in ("trained/out", "one"))
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs]
    for entry, other in zip(ours, theirs, strict=True):
        names = {"loss", "kl", "grad_norm", "learning_rate", "eval_kl", "eval_perplexity", "eval_tokens"}
        assert names & entry.keys() == names & other.keys()
        for name in names & other.keys():
            assert entry[name] == pytest.approx(other[name], rel=1e-5), (name, entry, other)


def test_a_resumed_run_ends_with_the_same_bits(folder):
    whole, resumed = (weights(folder / name / "out") for name in ("trained", "stopped"))
    assert all(torch.equal(x, resumed[name]) for name, x in whole.items())
    logs = [
        [(entry["step"], entry["kl"]) for entry in read_record(folder / name / "out")["log"] if "kl" in entry]
        for name in ("trained", "stopped")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == STEPS


@pytest.mark.parametrize("name", ["tied", "one_row"])
def test_models_read_by_shards_train_to_the_same_bits(folder, name):
    """As those that every process loads whole; "stopped" began with such ones."""
    runs = [folder / name / way for way in ("out", "whole")]
    logs = [[entry["loss"] for entry in read_record(run)["log"] if "loss" in entry] for run in runs]
    assert logs[0] == logs[1] and len(logs[0]) == 2
    for place in ("", "checkpoint-2"):
        shards, whole = (weights(run / place) for run in runs)
        assert max(apart(shards, whole).values()) == 0
        for file in ("config.json", "generation_config.json"):
            assert (runs[0] / place / file).read_text() == (runs[1] / place / file).read_text()


@pytest.mark.parametrize(("name", "dtype"), [("trained", torch.float32), ("tied", torch.bfloat16)])
def test_what_is_written_is_a_stock_checkpoint(folder, name, dtype):
    out, before = folder / name / "out", folder / {"trained": "student", "tied": "tied"}[name]
    kept = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for place, kind in ((out, dtype), (kept, torch.float32)):
        saved = weights(place)
        assert {key: x.shape for key, x in saved.items()} == {k: x.shape for k, x in weights(before).items()}
        assert {x.dtype for x in saved.values()} == {kind}
        config, old = (json.loads((path / "config.json").read_text()) for path in (place, before))
        assert config["architectures"] == old["architectures"] == ["LlamaForCausalLM"]
        assert config["dtype"] == str(kind).removeprefix("torch.")
        model, report = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(model).__name__ == "LlamaForCausalLM"
    assert max(apart(weights(out), {key: x.to(dtype) for key, x in weights(kept).items()}).values()) == 0


def test_one_process_has_nothing_to_shard_over(folder, tmp_path, capsys):
    arguments = train_of(folder, tmp_path / "a", "--fsdp")
    for more in ([], ["--dry-run"]):
        said = one_line(capsys, *arguments, *more)
        assert "--fsdp shards models over the processes that torchrun starts, and there is one alone" in said
        assert "torchrun --nproc-per-node N -m minitron_kernels.distillation train" in said
    assert not (tmp_path / "a").exists()
