"""Keys of a config.json that have two names, of which transformers reads both."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_kernels.pruning import count_usage, find_sizes, make_plan, prune_checkpoint, prune_model
from pruning.family_configs import CASES
from pruning.score_tables import random_tables
from pruning.threads import one_thread  # noqa: F401  (autouse: of every test here)
from pruning.tiny_models import random_model

NARROW = {"n_embd": 24, "n_head": 2}


@pytest.mark.parametrize(
    ("model_type", "names", "target"),
    [
        ("gpt2", {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}, NARROW),
        ("gpt2", {"n_embd": "hidden_size", "n_positions": "max_position_embeddings"}, NARROW),
        ("gpt_neo", {"num_layers": "num_hidden_layers"}, {"hidden_size": 24, "num_heads": 2}),
        ("bloom", {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}, {}),
        # as in the checkpoints of Qwen3-30B-A3B
        ("qwen3_moe", {"num_local_experts": "num_experts"}, {"num_experts": 3}),
        ("glm4_moe", {"n_routed_experts": "num_local_experts"}, {"n_routed_experts": 3}),
    ],
)
def test_either_name_says_the_new_size(model_type, names, target, tmp_path):
    model = random_model(CASES[model_type].make_config())
    model.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    config = {names.get(key, key): value for key, value in config.items()}
    path.write_text(json.dumps(config))
    plan = make_plan(random_tables(model.config), config, divisor=8, drop_layers=[1], **target)
    prune_checkpoint(tmp_path / "source", tmp_path / "smaller", plan, progress=False)
    smaller, ids = prune_model(model, plan), torch.arange(12).view(1, 12)
    found = json.loads((tmp_path / "smaller" / "config.json").read_text())
    again = AutoConfig.from_pretrained(tmp_path / "smaller")
    for own, other in names.items():
        wanted = getattr(smaller.config, own)
        assert found[other] == wanted == getattr(again, own)
        assert found.get(own, wanted) == wanted
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller", dtype="auto")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, smaller(ids).logits)


@pytest.mark.parametrize(
    ("model_type", "own", "other", "wrong"),
    [
        ("gpt2", "n_head", "num_attention_heads", 8),  # of which no tensor's shape depends
        ("gpt2", "n_embd", "hidden_size", 96),
        ("gptj", "n_head", "num_attention_heads", 8),
        ("qwen3_moe", "num_local_experts", "num_experts", 2),
        ("nemotron_h", "layers_block_type", "layer_types", ["mlp"] * 5),
    ],
)
def test_two_names_with_two_values_are_refused(model_type, own, other, wrong, tmp_path):
    config = CASES[model_type].make_config()
    right = config.to_dict()
    said = f"the config has {own} .*, and {other} .*, which is another name of the same"
    both = {**right, other: wrong}
    plan = make_plan({}, right, drop_layers=[1])
    for refused in (lambda: make_plan({}, both, drop_layers=[1]), lambda: find_sizes(both, 1e4)):
        with pytest.raises(ValueError, match=said):
            refused()
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(both))
    (tmp_path / "source" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=f"source/config.json: {said}"):
        prune_checkpoint(tmp_path / "source", tmp_path / "smaller", plan, progress=False)
    if isinstance(wrong, int):
        with pytest.raises(ValueError, match=said):
            count_usage(both)
        for name in ("source_config", "target_config"):  # as read from a file, for a model in memory
            with pytest.raises(ValueError, match=f"{name}: {said}"):
                dataclasses.replace(plan, **{name: {**getattr(plan, name), other: wrong}})
    same = {**right, other: right[own]}
    assert make_plan({}, same, drop_layers=[1]).target_config == plan.target_config


def test_old_and_new_names_of_kinds_are_the_same():
    config = CASES["nemotron_h"].make_config().to_dict()
    old = {"linear_attention": "mamba", "full_attention": "attention"}
    config["layer_types"] = [old.get(kind, kind) for kind in config["layers_block_type"]]
    assert len(make_plan({}, config, drop_layers=[1]).layers) == len(config["layer_types"]) - 1


def test_names_inside_a_model_for_images_are_compared():
    config = {"model_type": "llava", "text_config": {"model_type": "mixtral", "num_local_experts": 4}}
    config["text_config"] |= {"num_experts": 2}
    with pytest.raises(ValueError, match="num_local_experts 4, and num_experts 2, which is another name"):
        make_plan({}, config, drop_layers=[1])


def test_keys_and_values_of_starcoder_follow_its_heads():
    """transformers writes how many there are, and takes what is written over what follows."""
    config = CASES["gpt_bigcode"].make_config(multi_query=False)
    plan = make_plan(random_tables(config), config, divisor=8, **NARROW)
    assert plan.target_config["num_key_value_heads"] == plan.target_config["n_head"] == 2
    assert type(config).from_dict(plan.target_config).num_key_value_heads == 2
