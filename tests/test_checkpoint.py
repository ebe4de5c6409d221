"""prune_checkpoint(): the bits of prune_model(), in a folder that is complete or absent."""

import json
from pathlib import Path

import pytest
import torch
from _checkpoints import edit_config, plan_for, random_tables, save_tiny, snapshot
from _tiny_models import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minitron_kernels.pruning import shards
from minitron_kernels.pruning.checkpoint import prune_checkpoint
from minitron_kernels.pruning.model import prune_model
from minitron_kernels.pruning.plan import make_plan


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
