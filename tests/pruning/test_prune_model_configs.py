"""The config of the smaller model: nulls, defaults, and what transformers makes of it."""

import dataclasses
import re

import pytest
import torch

from minitron_kernels.pruning import (
    count_usage,
    family_of,
    make_plan,
    prune_checkpoint,
    prune_model,
    register_family,
)
from minitron_kernels.pruning.cut.skeleton import expected_shapes
from minitron_kernels.pruning.families import registry
from minitron_kernels.pruning.families.configs import completed
from minitron_kernels.pruning.families.family import Param
from pruning.family_configs import CASES
from pruning.pruned_models import assert_unchanged, logits, plan_for, state_of
from pruning.tiny_models import random_model, tiny_config, tiny_model


@pytest.mark.parametrize("name", ["gemma2", "qwen3_moe"])
def test_the_smaller_model_shares_no_memory(name):
    """Nor its config: what is done to one does not reach the other."""
    model = tiny_model(name, tie_word_embeddings=True)

    def memory(of):
        return {tensor.data_ptr() for tensor in (*of.parameters(), *of.buffers()) if tensor.numel()}

    for plan in (plan_for(model.config), plan_for(model.config, drop_layers=[1])):
        smaller = prune_model(model, plan)
        assert not memory(model) & memory(smaller)
        smaller.generation_config.max_length = 7
        assert model.generation_config.max_length != 7
        if name == "gemma2":
            smaller.config.layer_types[0] = "changed"
            assert "changed" not in (*model.config.layer_types, *plan.target_config["layer_types"])


@pytest.mark.parametrize("name", ["llama", "mistral", "nemotron", "mixtral", "qwen2", "phi3"])
def test_null_is_not_a_value(name):
    """Of a config with null for head_dim the smaller one says what the shapes are."""
    written = tiny_config(name).to_dict() | {"head_dim": None}
    plan = plan_for(written, hidden_size=32)
    assert plan.target_config["head_dim"] == 48 // 4
    query = "qkv_proj" if name == "phi3" else "q_proj"
    rows = 48 * (2 if name == "phi3" else 1)
    shapes = expected_shapes(plan.target_config)
    assert shapes[f"model.layers.0.self_attn.{query}.weight"] == (rows, 32)
    if name in ("qwen2", "phi3"):  # of which transformers does not load such a config
        with pytest.raises(ValueError, match=r"transformers cannot make a .*ForCausalLM of its config"):
            expected_shapes(written)
        return
    model = tiny_model(name, head_dim=None)
    smaller = prune_model(model, plan)
    assert smaller.config.head_dim == 12
    assert logits(smaller).isfinite().all()
    assert torch.equal(logits(prune_model(model, make_plan({}, written))), logits(model))


def test_null_and_absent_are_what_transformers_makes_of_them():
    """Each key in its own way: by the class's default, or from other keys."""

    def sizes(name, **changes):
        config = tiny_config(name).to_dict()
        for key, value in changes.items():
            config[key] = value
        config = {key: value for key, value in config.items() if value != "absent"}
        return family_of(config).sizes(config)

    assert sizes("qwen2", num_key_value_heads="absent", num_attention_heads=32)["kv_heads"] == 32
    assert sizes("qwen2", num_key_value_heads=None)["kv_heads"] == 4
    assert sizes("mistral", num_key_value_heads="absent")["kv_heads"] == 8
    assert sizes("nemotron", num_key_value_heads=None)["kv_heads"] == 4
    assert sizes("qwen3", head_dim="absent")["head_dim"] == 128
    assert sizes("qwen3", head_dim=None)["head_dim"] == 128  # transformers refuses such a null
    assert sizes("gemma3_text", head_dim="absent", num_key_value_heads="absent")["head_dim"] == 256
    assert sizes("gemma3_text", num_attention_heads="absent")["heads"] == 8
    assert sizes("qwen3_moe", num_experts="absent", num_local_experts="absent")["experts"] == 128
    gemma, llama = ({"model_type": name} for name in ("gemma3_text", "llama"))
    assert family_of(gemma).tied(gemma) and not family_of(llama).tied(llama)
    # what is written counts before the default of another key; what is false is a value
    swapped = dataclasses.replace(
        family_of(llama), size_keys={"mlp": ("max_position_embeddings", "intermediate_size")}
    )
    assert swapped.sizes({**tiny_config("llama").to_dict(), "max_position_embeddings": None})["mlp"] == 80
    refused = {**tiny_config("gemma2").to_dict(), "head_dim": None, "tie_word_embeddings": False}
    assert completed(refused)["tie_word_embeddings"] is False and completed(refused)["head_dim"] == 256
    # under its other name
    config = {k: v for k, v in tiny_config("qwen3_moe").to_dict().items() if k != "num_experts"}
    assert family_of(config).sizes(config | {"num_local_experts": 4})["experts"] == 4


def test_a_family_that_transformers_makes_otherwise_is_refused(monkeypatch):
    """Cuts that the pruned config does not ask for are refused before anything is cut."""
    llama = family_of({"model_type": "llama"})
    model = tiny_model("llama")
    plan, before = plan_for(model.config), state_of(model)
    wrong = [
        dataclasses.replace(one, axes="hidden, vocab") if one.name == "model.embed_tokens.weight" else one
        for one in llama.outer
    ]
    for changed, message in (
        (dict(size_keys={"head_dim": ("head_width",), "head_width": ("head_width",)}), None),
        (dict(outer=llama.outer[1:]), "'model.embed_tokens.weight', which the plan's family does not know"),
        (dict(outer=tuple(wrong)), "model.embed_tokens.weight must have the shape (48, 96), got (96, 48)"),
    ):
        if message is None:
            continue
        monkeypatch.setitem(registry._FAMILIES, "llama", dataclasses.replace(llama, **changed))
        with pytest.raises(ValueError, match=re.escape(message)):
            prune_model(model, plan, in_place=True)
    assert_unchanged(model, before)


def test_shapes_that_are_expected_are_checked_against_transformers(monkeypatch):
    config = tiny_config("llama").to_dict()
    shapes = expected_shapes(config)
    assert shapes["lm_head.weight"] == (96, 48)
    assert "lm_head.weight" not in expected_shapes(config, headless=True)
    assert "lm_head.weight" not in expected_shapes({**config, "tie_word_embeddings": True})
    stored = expected_shapes(tiny_config("mixtral").to_dict(), stored=True)
    assert stored["model.layers.0.block_sparse_moe.experts.3.w1.weight"] == (80, 48)
    llama = family_of(config)
    for layer, message in (
        (
            llama.layer[1:],
            "model.layers.0.self_attn.q_proj.weight, which transformers makes from this llama config",
        ),
        ((*llama.layer, Param("extra", "one")), "model.layers.0.extra is not in the model"),
        (
            (Param("self_attn.q_proj.weight", "mlp, hidden"), *llama.layer[1:]),
            "q_proj.weight would be [80, 48], but transformers makes it [64, 48] from this llama config",
        ),
    ):
        monkeypatch.setitem(registry._FAMILIES, "llama", dataclasses.replace(llama, layer=layer))
        with pytest.raises(ValueError, match=re.escape(message)):
            expected_shapes(config)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"transformers refuses the config of this llama: .*hidden size"):
        expected_shapes({**config, "hidden_size": 50})
    # a model type that transformers does not know goes by its table alone
    register_family(dataclasses.replace(llama, model_types=("llama_elsewhere",)))
    assert expected_shapes({**config, "model_type": "llama_elsewhere"}) == shapes


def test_a_config_object_that_says_otherwise_than_its_model():
    model = tiny_model("llama")
    plan = plan_for(model.config)
    model.config.mlp_bias = False  # the parameters are there
    with pytest.raises(ValueError, match=r"gate_proj.bias is not in .* the pruned config"):
        prune_model(model, plan)


@pytest.mark.parametrize(
    ("name", "right", "wrong", "key"),
    [
        (
            "cohere2",
            {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
            {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
            "layer_types",
        ),
        ("smollm3", {"no_rope_layers": [1, 1, 0]}, {"no_rope_layers": [0, 1, 1]}, "no_rope_layers"),
        (
            "gpt_neo",
            {"attention_types": [[["global"], 2], [["local"], 1]]},
            {"attention_types": [[["local"], 1], [["global"], 2]]},
            "attention_layers",
        ),
    ],
)
def test_a_plan_for_a_model_with_other_layers_is_refused(name, right, wrong, key, tmp_path):
    """All sizes and shapes are the same: the plan's layers would be written to the config of the other."""
    model = random_model(CASES[name].make_config(**right))
    plan = make_plan({}, CASES[name].make_config(**wrong), drop_layers=[1])
    with pytest.raises(ValueError, match=f"plan is for a model with other layers: its {key} is "):
        prune_model(model, plan)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=f"config.json: this is not the model that the plan.*: {key} is "):
        prune_checkpoint(tmp_path / "source", tmp_path / "smaller", plan, progress=False)
    own = make_plan({}, model.config, drop_layers=[1])
    prune_checkpoint(tmp_path / "source", tmp_path / "smaller", own, progress=False)
    assert getattr(prune_model(model, own).config, key)[-1] == getattr(model.config, key)[-1]


def test_layers_with_sizes_of_their_own_are_refused(tmp_path):
    """transformers reads per_layer_config of any type. Its entries would move, and shapes differ."""
    config = CASES["mistral"].make_config()
    plan = make_plan({}, config, drop_layers=[1])
    for entries in ({"sliding_window": 8}, {"intermediate_size": 40}):
        own = CASES["mistral"].make_config(per_layer_config={1: entries})
        said = f"has per_layer_config, by which layers differ in {next(iter(entries))}: no table describes"
        for given in (own, own.to_dict()):
            for refused in (count_usage, lambda given: make_plan({}, given, drop_layers=[1])):
                with pytest.raises(ValueError, match=said):
                    refused(given)
        folder = tmp_path / next(iter(entries))
        own.save_pretrained(folder)
        with pytest.raises(ValueError, match=f"config.json: the config {said}"):
            prune_checkpoint(folder, tmp_path / "smaller", plan, progress=False)
