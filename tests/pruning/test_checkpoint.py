"""prune_checkpoint(): the bits of prune_model(), in a folder that is complete or absent."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minitron_kernels.pruning.checkpoint import shards
from minitron_kernels.pruning.checkpoint.prune import prune_checkpoint
from minitron_kernels.pruning.checkpoint.safetensors_files import open_folder
from minitron_kernels.pruning.cut.model import prune_model
from minitron_kernels.pruning.plan.make_plan import make_plan
from pruning.checkpoints import edit_config, plan_for, save_tiny, snapshot
from pruning.score_tables import random_tables, smaller_sizes
from pruning.tiny_models import FAMILIES


def weights_of(folder):
    tensors = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape, name
        assert one[name].view(torch.uint8).equal(other[name].view(torch.uint8)), name


CHANGES = {
    "all": {},
    "width": {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    "importance": {"order": "importance"},
    "merged": {"num_attention_heads": 2, "kv_heads": "merge", "merge_heads": True},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_bits_of_prune_model(tmp_path, monkeypatch, name, dtype, change):
    monkeypatch.setattr(shards, "BLOCK_BYTES", 700)  # several blocks to a tensor, the last one not full
    model = save_tiny(tmp_path / "src", name, dtype=dtype)
    plan = plan_for(model.config, **CHANGES[change])
    prune_model(model, plan).save_pretrained(tmp_path / "want")
    done = prune_checkpoint(tmp_path / "src", tmp_path / "dst", plan, threads=3, progress=False)
    want, got = weights_of(tmp_path / "want"), weights_of(tmp_path / "dst")
    same_bits(got, want)
    assert done.parameters_after == sum(tensor.numel() for tensor in want.values()) == plan.parameters_after
    assert done.parameters_before == plan.parameters_before
    assert done.nbytes == sum(tensor.nbytes for tensor in want.values())
    config, wanted = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("dst", "want"))
    config.pop("transformers_version"), wanted.pop("transformers_version")
    assert config == wanted


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_the_bits_wherever_new_tensors_are_made(tmp_path, monkeypatch, name):
    """What is kept is on the CPU, as weights on a disk are; on "meta" any tensor of another device shows."""
    monkeypatch.setattr(shards, "BLOCK_BYTES", 700)
    config = save_tiny(tmp_path / "src", name).config
    tables, sizes = random_tables(config), {**smaller_sizes(name), "num_key_value_heads": 1, "divisor": 8}
    plan = make_plan(tables, config, **sizes)
    prune_checkpoint(tmp_path / "src", tmp_path / "want", plan, progress=False)
    with torch.device("meta"):
        again = make_plan(tables, config, **sizes)
        prune_checkpoint(tmp_path / "src", tmp_path / "dst", again, progress=False)
    assert again.to_dict() == plan.to_dict()
    same_bits(weights_of(tmp_path / "dst"), weights_of(tmp_path / "want"))


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_transformers_loads_it(tmp_path, name):
    model = save_tiny(tmp_path / "src", name)
    plan = plan_for(model.config)
    prune_checkpoint(tmp_path / "src", tmp_path / "dst", plan, progress=False)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "dst", output_loading_info=True)
    assert not any(report.values())
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, prune_model(model, plan)(tokens).logits)


def test_against_plain_indexing(tmp_path):
    """Without rescaling a cut is numpy's indexing; the kept sets come from the scores, not from the plan."""
    model = save_tiny(tmp_path / "src", "mistral", dtype=torch.bfloat16)
    tables = random_tables(model.config)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "divisor": 8}
    plan = make_plan(tables, model.config, rescale_norms=False, **sizes)
    prune_checkpoint(tmp_path / "src", tmp_path / "dst", plan, progress=False)
    before, after = weights_of(tmp_path / "src"), weights_of(tmp_path / "dst")
    hidden = tables["hidden"].argsort(descending=True)[:32].sort().values
    assert after["model.embed_tokens.weight"].equal(before["model.embed_tokens.weight"][:, hidden])
    assert after["model.norm.weight"].equal(before["model.norm.weight"][hidden])
    for layer in range(3):
        mlp = tables["mlp"][layer].argsort(descending=True)[:48].sort().values
        up, down, out = (
            f"model.layers.{layer}.{name}.weight"
            for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.o_proj")
        )
        assert after[up].equal(before[up][mlp][:, hidden])
        assert after[down].equal(before[down][hidden][:, mlp])
        assert after[out].equal(before[out][hidden])


def test_everything_kept_is_the_identity(tmp_path):
    model = save_tiny(tmp_path / "src")
    plan = make_plan({}, model.config)
    prune_checkpoint(tmp_path / "src", tmp_path / "dst", plan, progress=False)
    same_bits(weights_of(tmp_path / "dst"), weights_of(tmp_path / "src"))


def test_gains_as_they_are(tmp_path):
    model = save_tiny(tmp_path / "src")
    plan = plan_for(model.config)
    prune_model(model, plan, rescale_norms=False).save_pretrained(tmp_path / "want")
    prune_checkpoint(tmp_path / "src", tmp_path / "dst", plan, rescale_norms=False, progress=False)
    same_bits(weights_of(tmp_path / "dst"), weights_of(tmp_path / "want"))


@pytest.mark.parametrize("threads", [1, 4])
def test_shards_from_shards(tmp_path, threads):
    model = save_tiny(tmp_path / "src", shard_bytes="30KB")
    assert len(list((tmp_path / "src").glob("model-*.safetensors"))) > 3
    plan = plan_for(model.config)
    done = prune_checkpoint(
        tmp_path / "src", tmp_path / "dst", plan, max_shard_bytes=20_000, threads=threads, progress=False
    )
    got = weights_of(tmp_path / "dst")
    prune_model(model, plan).save_pretrained(tmp_path / "want")
    same_bits(got, weights_of(tmp_path / "want"))
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.nbytes == sum(tensor.nbytes for tensor in got.values())
    assert index["metadata"]["total_parameters"] == done.parameters_after
    assert index["weight_map"].keys() == got.keys()
    assert tuple(sorted(set(index["weight_map"].values()))) == done.files and len(done.files) > 3
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "dst" / file)
    for file in done.files:
        tensors = load_file(tmp_path / "dst" / file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    same_bits({k: v for k, v in loaded.state_dict().items() if k in got}, got)


def test_dtypes_are_kept_one_by_one(tmp_path):
    """Norms in float32 beside bfloat16; every tensor begins at a multiple of its element's size."""
    model = save_tiny(tmp_path / "src", dtype=torch.bfloat16)
    path = tmp_path / "src" / "model.safetensors"
    mixed = {n: t.float() if "norm" in n else t for n, t in load_file(path).items()}
    mixed["lm_head.weight"] = mixed["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(mixed, path, {"format": "pt"})
    prune_checkpoint(tmp_path / "src", tmp_path / "dst", plan_for(model.config), progress=False)
    got = weights_of(tmp_path / "dst")
    assert {name: t.dtype for name, t in got.items()} == {name: mixed[name].dtype for name in got}
    with open_folder(tmp_path / "dst") as folder:
        assert all(tensor.begin % tensor.dtype.itemsize == 0 for tensor in folder.tensors.values())


def test_experts_stored_as_they_are_in_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_BYTES", 700)
    model = save_tiny(tmp_path / "src", "mixtral")
    plan = plan_for(model.config)
    stacked = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(stacked, tmp_path / "src" / "model.safetensors", {"format": "pt"})
    prune_checkpoint(tmp_path / "src", tmp_path / "dst", plan, progress=False)
    same_bits(weights_of(tmp_path / "dst"), dict(prune_model(model, plan).state_dict()))


def test_buffers_of_old_checkpoints_are_left_out(tmp_path):
    model = save_tiny(tmp_path / "src")
    path = tmp_path / "src" / "model.safetensors"
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file({**load_file(path), **buffer}, path, {"format": "pt"})
    prune_checkpoint(tmp_path / "src", tmp_path / "dst", plan_for(model.config), progress=False)
    assert not buffer.keys() & weights_of(tmp_path / "dst").keys()


def test_what_lies_beside_the_weights(tmp_path):
    model = save_tiny(tmp_path / "src")
    plan = plan_for(model.config)
    before = snapshot(tmp_path / "src")
    prune_checkpoint(tmp_path / "src", tmp_path / "dst", plan, progress=False)
    assert snapshot(tmp_path / "src") == before
    after = {name: content for name, (content, _) in snapshot(tmp_path / "dst").items()}
    copied = {"tokenizer.json", "LICENSE", "generation_config.json", "additional_chat_templates/tool.jinja"}
    made = {"config.json", "model.safetensors", "README.md", "minitron_plan.json"}
    assert after.keys() == copied | made
    assert all(after[name] == before[name][0] for name in copied)
    assert type(plan).load(tmp_path / "dst" / "minitron_plan.json") == plan
    card = after["README.md"].decode()
    assert card.startswith("---\nlicense: mit\n---\n\n# src, pruned\n") and "# The original\n\nWords." in card
    assert f"| parameters | {plan.parameters_before:,} | {plan.parameters_after:,} |" in card
    assert "| hidden | 48 | 32 |" in card and "| vocab |" not in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


def test_config_that_leaves_out_what_follows(tmp_path):
    """head_dim = hidden / heads is often left out, and no longer follows when these have changed."""
    model = save_tiny(tmp_path / "src", "mistral", hidden_size=64)
    edit_config(tmp_path / "src", head_dim=None, my_note="kept")
    prune_checkpoint(tmp_path / "src", tmp_path / "dst", plan_for(model.config), progress=False)
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["head_dim"] == 16 and config["hidden_size"] == 32 and config["my_note"] == "kept"
    assert config["dtype"] == "float32" and config["architectures"] == ["MistralForCausalLM"]


def test_progress_goes_to_stderr(tmp_path, capsys):
    model = save_tiny(tmp_path / "src")
    plan = plan_for(model.config)
    capsys.readouterr()
    prune_checkpoint(tmp_path / "src", tmp_path / "quiet", plan)  # stderr is no terminal here
    assert capsys.readouterr() == ("", "")
    prune_checkpoint(tmp_path / "src", tmp_path / "loud", plan, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "100%" in err and "loud" in err


def test_threads_of_torch_are_given_back(tmp_path):
    model = save_tiny(tmp_path / "src")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        prune_checkpoint(tmp_path / "src", tmp_path / "dst", plan_for(model.config), progress=False)
        with ThreadPoolExecutor(1) as pool:  # a thread that starts later takes the number last set by any
            assert torch.get_num_threads() == pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)
