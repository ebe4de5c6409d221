"""What prune_model returns: identity, files, modes, the model in place; plans for other models."""

import copy
import re

import pytest
import torch

from minitron_kernels.pruning import Cuts, make_plan, prune_model
from minitron_kernels.pruning.families.registry import family_of
from pruning.pruned_models import (
    FAMILY_AND_TIE,
    IDS,
    assert_same_logits,
    gone,
    layers_of,
    logits,
    pruned,
    zero,
)
from pruning.score_tables import random_tables, smaller_sizes
from pruning.threads import one_thread  # noqa: F401  (autouse: of every test here)
from pruning.tiny_models import FAMILIES, tiny_model


@pytest.mark.parametrize(("name", "tied"), FAMILY_AND_TIE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_size_is_the_identity(name, tied, dtype):
    model = tiny_model(name, tie_word_embeddings=tied, dtype=dtype)
    plan = make_plan({}, model.config, order="importance")
    same = prune_model(model, plan)
    assert {k: v.dtype for k, v in same.named_buffers()} == {k: v.dtype for k, v in model.named_buffers()}
    for (name_a, a), (name_b, b) in zip(same.named_parameters(), model.named_parameters(), strict=True):
        assert name_a == name_b and a.dtype == b.dtype and torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
    assert torch.equal(logits(same), logits(model))


@pytest.mark.parametrize(("name", "tied"), FAMILY_AND_TIE)
def test_saved_loaded_and_generated(name, tied, tmp_path):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    model = tiny_model(name, tie_word_embeddings=tied)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan, smaller = pruned(model, **smaller_sizes(name))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert type(smaller) is type(model)
    assert (smaller.lm_head.weight is smaller.get_input_embeddings().weight) == tied
    sizes = family_of(smaller.config).sizes(smaller.config)
    assert sizes == family_of(plan.target_config).sizes(plan.target_config)
    smaller.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(smaller))
    assert again.config.head_dim == 16
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    cached = smaller.generate(IDS, use_cache=True, **options)
    assert torch.equal(cached, smaller.generate(IDS, use_cache=False, **options))
    # the cut of each stored tensor of the source is the tensor that the smaller model stores, to the bit
    source = tmp_path / "source"
    model.save_pretrained(source)
    cuts, made = Cuts(plan), {}
    with safe_open(source / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(cuts.names(stored=True))
        for key in file.keys():  # noqa: SIM118
            cut = cuts.of(key, stored=True)
            if cut is not None:
                made[cut.name] = cut.apply(file.get_tensor(key))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sorted(made) == sorted(file.keys())
        assert all(torch.equal(made[key], file.get_tensor(key)) for key in made)


@pytest.mark.parametrize("name", ["llama", "phi3", "nemotron"])
def test_dead_neurons_that_go_change_rounding_only(name):
    model = tiny_model(name)
    plan = make_plan(random_tables(model.config), model.config, intermediate_size=48, divisor=16)
    for entry in plan.layers:
        zero(layers_of(model)[entry.layer].mlp.down_proj.weight, slice(None), gone(entry.mlp, 80))
    # the products that go are exact zeros, but the others are added up in other steps
    assert_same_logits(logits(prune_model(model, plan)), logits(model))


@pytest.mark.parametrize("in_place", [False, True])
def test_modes_dtypes_and_settings_are_kept(in_place):
    model = tiny_model("gemma2", tie_word_embeddings=True, dtype=torch.bfloat16).train()
    model.model.norm.float()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    model.generation_config.temperature = 0.125
    model.set_attn_implementation("eager")
    plan, smaller = pruned_with(model, in_place, **smaller_sizes("gemma2"))
    assert smaller.training and all(module.training for module in smaller.modules())
    assert smaller.model.norm.weight.dtype == torch.float32
    assert smaller.lm_head.weight.dtype == torch.bfloat16
    frozen = [name for name, p in smaller.named_parameters() if not p.requires_grad]
    assert plan.layers[0].layer == 0 and frozen == ["model.layers.0.self_attn.q_proj.weight"]
    assert smaller.generation_config.temperature == 0.125
    assert smaller.config._attn_implementation == "eager"
    assert smaller.model.embed_tokens.embed_scale == torch.tensor(32**0.5).bfloat16()
    assert not any(p.is_meta for p in [*smaller.parameters(), *smaller.buffers()])
    smaller(IDS, labels=IDS).loss.backward()
    assert smaller.model.embed_tokens.weight.grad is not None


def pruned_with(model, in_place, **target):
    plan = make_plan(random_tables(model.config), model.config, divisor=16, **target)
    return plan, prune_model(model, plan, in_place=in_place)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_place_is_the_same_and_frees_what_it_has_cut(name):
    model = tiny_model(name)
    parameters = list(model.parameters())
    _, expected = pruned_with(model, False, **smaller_sizes(name))
    _, smaller = pruned_with(model, True, **smaller_sizes(name))
    assert smaller is model
    assert torch.equal(logits(model), logits(expected))
    assert model.config.to_dict() == expected.config.to_dict()
    assert all(parameter.numel() == 0 for parameter in parameters)


def test_head_that_shares_memory_though_the_config_does_not_say_so():
    model = tiny_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    _, expected = pruned_with(model, False, hidden_size=32)
    _, smaller = pruned_with(model, True, hidden_size=32)
    assert torch.equal(smaller.lm_head.weight, smaller.model.embed_tokens.weight)
    assert torch.equal(logits(smaller), logits(expected))


def test_a_replaced_buffer_is_taken_over():
    model = tiny_model("llama")
    model.model.rotary_emb.inv_freq.mul_(0.5)
    _, smaller = pruned_with(model, False, hidden_size=32)
    assert torch.equal(smaller.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_sizes_that_transformers_would_not_load_run_in_memory():
    model = tiny_model("llama", num_attention_heads=6, num_key_value_heads=3)
    plan = make_plan(random_tables(model.config), model.config, hidden_size=32, divisor=16, loadable=False)
    smaller = prune_model(model, plan)
    assert logits(smaller).isfinite().all() and smaller.config.hidden_size == 32


def test_a_plan_for_another_model():
    model = tiny_model("llama")
    plan = make_plan(random_tables(model.config), model.config, hidden_size=32, divisor=16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for other, message in (
        (tiny_model("mistral"), "plan is for a model with model_type 'llama', got 'mistral'"),
        (tiny_model("llama", tie_word_embeddings=True), "with tie_word_embeddings False, got True"),
        (tiny_model("llama", intermediate_size=96), "plan is for a model of 80 mlp, got one of 96"),
        (tiny_model("llama", attention_bias=False), "no parameter 'model.layers.0.self_attn.q_proj.bias'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            prune_model(other, plan, in_place=True)
    adapted = copy.deepcopy(model)
    adapted.model.layers[1].mlp.lora = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=r"parameter 'model.layers.1.mlp.lora.weight', which .* not know"):
        prune_model(adapted, plan, in_place=True)
    resized = copy.deepcopy(model)
    resized.model.norm.weight = torch.nn.Parameter(torch.ones(47))
    with pytest.raises(ValueError, match=r"model.norm.weight must have the shape \(48,\), got \(47,\)"):
        prune_model(resized, plan, in_place=True)
    with pytest.raises(TypeError, match="plan must be a PruningPlan, got dict"):
        prune_model(model, {})
    with pytest.raises(TypeError, match="model must be a Hugging Face model with a config, got Linear"):
        prune_model(torch.nn.Linear(2, 2), plan)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
