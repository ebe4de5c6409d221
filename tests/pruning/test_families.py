"""The table of families against the models that transformers makes; the papers' parameter counts."""

import dataclasses
import json

import pytest
from torch import nn

from minitron_kernels.pruning.families.family import Param
from minitron_kernels.pruning.families.registry import family_of, known_families, register_family
from pruning.family_configs import CASES
from pruning.paper_models import COUNTS
from pruning.tiny_models import FAMILIES, random_model, tiny_config, tiny_model


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_the_papers(name):
    config, total, without = COUNTS[name]
    family = family_of(config)
    assert family.count_parameters(config) == total
    assert family.count_parameters(config, embeddings=False) == without


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_those_of_the_model(name, tied):
    model = tiny_model(name, tie_word_embeddings=tied)
    family = family_of(model.config)
    sizes = family.sizes(model.config)
    expected = {param.name: param.shape(sizes) for param in family.parameters(model.config)}
    assert expected == {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert family.count_parameters(model.config) == sum(p.numel() for p in model.parameters())
    for key in expected:
        assert family.locate(key, model.config).name == key


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_shapes_are_those_of_the_checkpoint(name, tmp_path):
    from safetensors import safe_open

    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    for config in (model.config, json.loads((tmp_path / "config.json").read_text())):
        family = family_of(config)
        sizes = family.sizes(config)
        located = {param.name: param for param in family.parameters(config, stored=True)}
        assert {key: param.shape(sizes) for key, param in located.items()} == stored
        assert all(family.locate(key, config) == param for key, param in located.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_taps_are_modules_of_the_model(name):
    model = tiny_model(name)
    family = family_of(model.config)
    modules = dict(model.named_modules())
    assert {family.layers, family.final_norm, family.embedding, family.head} <= set(modules)
    for layer in range(3):
        sparse = family.is_sparse(model.config, layer)
        taps = family.taps
        names = [taps.attention_out, *taps.norms, *taps.scored_norms]
        names += [taps.experts] if sparse else [taps.mlp_down, taps.mlp_up]
        assert {f"{family.layers}.{layer}.{tap}" for tap in names} <= set(modules)


def test_unknown_family_says_what_to_do():
    with pytest.raises(ValueError, match=r"llama.*got 'gpt5'.*register_family"):
        family_of({"model_type": "gpt5"})
    with pytest.raises(ValueError, match=r"'ctrl' is not supported: it has positions.*Known are.*llama"):
        family_of({"model_type": "ctrl"})
    with pytest.raises(ValueError, match="got None"):
        family_of({})


def test_a_family_can_be_registered():
    llama = family_of({"model_type": "llama"})
    own = dataclasses.replace(
        llama, model_types=("llama_of_a_test",), layer=(*llama.layer, Param("extra.weight", "hidden"))
    )
    register_family(own)
    config = tiny_config("llama").to_dict() | {"model_type": "llama_of_a_test"}
    assert "llama_of_a_test" in known_families()
    assert family_of(config) is own
    assert own.count_parameters(config) == llama.count_parameters(config) + 3 * 48
    with pytest.raises(TypeError, match="family must be a Family, got dict"):
        register_family({})


def test_config_without_a_size():
    with pytest.raises(ValueError, match="no hidden_size, which llama needs"):
        family_of({"model_type": "llama"}).sizes({"vocab_size": 1})


def test_unknown_names_are_not_located():
    config = tiny_config("llama")
    family = family_of(config)
    assert family.locate("model.layers.0.self_attn.q_proj.weight_scale", config) is None
    assert family.locate("vision.weight", config) is None


@pytest.mark.parametrize("name", ["gemma4_text", "gpt2", "llama"])
def test_without_embeddings_is_without_all_embeddings(name):
    model = random_model(CASES[name].make_config(tie_word_embeddings=False))
    tables = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding))
    whole = sum(parameter.numel() for parameter in model.parameters())
    family = family_of(model.config)
    assert (
        family.count_parameters(model.config, embeddings=False)
        == whole - tables - model.lm_head.weight.numel()
    )
