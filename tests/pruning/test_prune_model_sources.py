"""prune_model of models that are not plain, tied by hand or offloaded: nothing is lost without an error."""

import copy
import dataclasses
import warnings

import pytest
import torch

from minitron_kernels.pruning import make_plan, prune_model
from minitron_kernels.pruning.families import registry
from minitron_kernels.pruning.families.registry import family_of
from pruning.pruned_models import (
    IDS,
    assert_unchanged,
    logits,
    plan_for,
    state_of,
)
from pruning.tiny_models import tiny_config, tiny_model

# ---- the head


def untied(name="gemma2"):
    """A model whose config says that the head is tied, though it has one of its own."""
    model = tiny_model(name, tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


@pytest.mark.parametrize("in_place", [False, True])
def test_a_head_of_its_own_is_kept_though_the_config_says_tied(in_place, tmp_path):
    from transformers import AutoModelForCausalLM

    model = untied()
    expected = logits(model)
    same = prune_model(copy.deepcopy(model), make_plan({}, model.config), in_place=in_place)
    assert torch.equal(logits(same), expected)
    plan = plan_for(model.config)
    smaller = prune_model(model, plan)
    head = model.lm_head.weight[:, list(plan.hidden)]
    assert torch.equal(smaller.lm_head.weight, head)
    assert smaller.config.tie_word_embeddings is False and model.config.tie_word_embeddings is True
    smaller.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight, head)


@pytest.mark.parametrize("shared", ["parameter", "memory"])
def test_a_head_that_is_the_embedding_stays_it_though_the_config_does_not_say_so(shared, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama")
    embedding = model.model.embed_tokens.weight
    model.lm_head.weight = embedding if shared == "parameter" else torch.nn.Parameter(embedding.data)
    smaller = prune_model(model, plan_for(model.config))
    assert smaller.lm_head.weight is smaller.model.embed_tokens.weight
    assert smaller.config.tie_word_embeddings is True
    smaller.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(smaller))


def test_a_head_that_only_looks_like_the_embedding_is_no_tied_one():
    model = tiny_model("llama")
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    smaller = prune_model(model, plan_for(model.config))
    assert smaller.lm_head.weight is not smaller.model.embed_tokens.weight
    assert smaller.config.tie_word_embeddings is False


def test_residual_scales_follow_the_head_that_is_there(monkeypatch):
    """Where no norm writes, a tied embedding is scaled with the final norm, a separate one alone."""
    llama = family_of({"model_type": "llama"})
    monkeypatch.setitem(registry._FAMILIES, "llama", dataclasses.replace(llama, scales_embedding=True))
    model = untied("llama")
    plan = plan_for(model.config, rescale_norms=False, hidden_size=32)
    smaller = prune_model(model, plan)
    assert torch.equal(smaller.model.norm.weight, model.model.norm.weight[list(plan.hidden)])
    assert torch.equal(smaller.lm_head.weight, model.lm_head.weight[:, list(plan.hidden)])


def test_a_plan_may_say_what_the_config_or_what_the_tensors_say():
    model = untied("llama")
    for tied in (True, False):
        plan = plan_for(tiny_config("llama", tie_word_embeddings=tied))
        smaller = prune_model(model, plan)
        assert smaller.config.tie_word_embeddings is False
        assert torch.equal(smaller.lm_head.weight, model.lm_head.weight[:, list(plan.hidden)])


# ---- decoders alone, wrappers


def test_a_decoder_alone():
    whole = tiny_model("gemma2")
    plan = plan_for(whole.config, hidden_size=32, drop_layers=[1])
    expected = prune_model(whole, plan)
    alone = prune_model(whole.model, plan)
    assert type(alone) is type(whole.model) and alone.config.tie_word_embeddings
    assert_unchanged(alone, state_of(expected.model))
    with torch.no_grad():
        assert torch.equal(alone(IDS).last_hidden_state, expected.model(IDS).last_hidden_state)


def test_wrapped_models_are_unwrapped():
    model = tiny_model("llama")
    plan = plan_for(model.config)
    expected = state_of(prune_model(model, plan))
    wrapped = torch.compile(model)
    smaller = prune_model(wrapped, plan)
    assert type(smaller) is type(model)
    assert_unchanged(smaller, expected)
    with pytest.raises(ValueError, match="in_place cannot change a model inside a OptimizedModule"):
        prune_model(wrapped, plan, in_place=True)
    assert_unchanged(prune_model(torch.nn.DataParallel(model), plan), expected)
    for layer in range(3):  # compiled layer by layer
        model.model.layers[layer] = torch.compile(model.model.layers[layer])
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    assert_unchanged(prune_model(model, plan), expected)


def test_adapters_are_to_be_merged_first():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    plan = plan_for(model.config)
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    with pytest.raises(ValueError, match=r"without adapters, but it is a PeftModel.*merge_and_unload"):
        prune_model(adapted, plan)
    injected = peft.inject_adapter_in_model(config, copy.deepcopy(model))
    with pytest.raises(ValueError, match="without adapters, but its module"):
        prune_model(injected, plan)
    by_hand = copy.deepcopy(model)
    by_hand.model.layers[1].mlp.up_proj.lora_a = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=r"lora_a.weight', which .* not know: merge the adapters first"):
        prune_model(by_hand, plan)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    merged = adapted.merge_and_unload()
    up = merged.model.layers[0].mlp.up_proj.weight
    assert torch.equal(prune_model(merged, plan).model.layers[0].mlp.up_proj.weight, up[:, list(plan.hidden)])


# ---- what is not in memory


def test_offloaded_parameters_are_refused(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama")
    plan = plan_for(model.config)
    before = state_of(model)
    accelerate.disk_offload(model, str(tmp_path))
    for in_place in (False, True):
        with pytest.raises(ValueError, match=r"embed_tokens.weight is offloaded.*prune_checkpoint"):
            prune_model(model, plan, in_place=in_place)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_unchanged(model, before)


def test_sharded_parameters_are_refused(tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_model("llama")
        plan = plan_for(model.config)
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh)
        with pytest.raises(ValueError, match=r"embed_tokens.weight is a DTensor.*prune_checkpoint"):
            prune_model(model, plan, in_place=True)
        assert model.model.embed_tokens.weight.full_tensor().shape == (96, 48)
    finally:
        torch.distributed.destroy_process_group()


def test_quantised_parameters_are_refused():
    model = tiny_model("llama")
    plan = plan_for(model.config)
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.char(), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.weight is quantised, to torch.int8"):
        prune_model(model, plan)


@pytest.mark.parametrize("at", [0, 5, 30])
def test_in_place_nothing_is_lost_where_a_cut_fails(at, monkeypatch):
    from minitron_kernels.pruning.cut.cuts import Cut

    model = tiny_model("llama")
    plan, before, config = plan_for(model.config), state_of(model), model.config.to_dict()
    apply, calls = Cut.apply, iter(range(1000))

    def failing(self, tensor, out=None):
        if next(calls) == at:
            raise torch.OutOfMemoryError("no memory")
        return apply(self, tensor, out)

    monkeypatch.setattr(Cut, "apply", failing)
    with pytest.raises(torch.OutOfMemoryError):
        prune_model(model, plan, in_place=True)
    assert_unchanged(model, before)
    assert model.config.to_dict() == config
    monkeypatch.undo()
    expected = prune_model(copy.deepcopy(model), plan)
    assert_unchanged(prune_model(model, plan, in_place=True), state_of(expected))


def test_a_frozen_model_says_so():
    model = tiny_model("llama")
    plan = plan_for(model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_model(model, plan)
    model.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"every parameter of the model is frozen.*requires_grad_\(True\)"):
        smaller = prune_model(model, plan)
    assert not any(parameter.requires_grad for parameter in smaller.parameters())
