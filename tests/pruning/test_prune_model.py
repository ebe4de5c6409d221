"""prune_model against the whole model with what goes put out of action by hand."""

import copy
import dataclasses

import pytest
import torch

from minitron_kernels.pruning import make_plan, prune_model
from minitron_kernels.pruning.families import registry
from minitron_kernels.pruning.families.registry import family_of
from pruning.pruned_models import (
    FAMILY_AND_TIE,
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

DENSE = tuple(name for name in FAMILIES if name != "mixtral")
SPARSE = ("mixtral", "qwen3_moe")


def exact_model(name, **changes):
    """A tiny model in float64, for which the experts' fused kernels do not work."""
    model = tiny_model(name, dtype=torch.float64, **changes)
    if name in SPARSE:
        model.set_experts_implementation("eager")
    return model


# ---- the oracle: the whole model, in which what the plan drops has no effect


class Routed(torch.nn.Module):
    """A router that sends tokens to the experts in `keep` only, from the definition."""

    def __init__(self, router, keep, top_k, renormalized):
        super().__init__()
        self.weight, self.top_k, self.renormalized = router.weight, top_k, renormalized
        self.mask = torch.full((len(router.weight),), -torch.inf)
        self.mask[list(keep)] = 0

    def forward(self, hidden):
        scores = hidden.reshape(-1, hidden.shape[-1]) @ self.weight.T + self.mask
        probability = scores.float().softmax(-1)
        best, chosen = probability.topk(self.top_k)
        if self.renormalized:
            best = best / best.sum(-1, keepdim=True)
        return scores, best.to(hidden.dtype), chosen


def writers_of(model, layer):
    """The linear layers, and the experts' stacked weights, that write to the residual stream."""
    block = layers_of(model)[layer]
    if family_of(model.config).is_sparse(model.config, layer):
        return [block.self_attn.o_proj], block.mlp.experts.down_proj
    return [block.self_attn.o_proj, block.mlp.down_proj], None


def silence(model, plan):
    """Put what the plan drops, but for channels of the residual stream, out of action."""
    kept = {entry.layer: entry for entry in plan.layers}
    for layer, block in enumerate(layers_of(model)):
        linears, experts = writers_of(model, layer)
        if layer not in kept:
            for linear in linears:
                zero(linear.weight)
                zero(linear.bias)
            zero(experts)
            continue
        entry = kept[layer]
        columns = linears[0].weight.shape[1]
        for head in gone(entry.heads.query, columns // 16):
            zero(linears[0].weight, slice(None), list(range(16 * head, 16 * head + 16)))
        if experts is None:
            zero(linears[1].weight, slice(None), gone(entry.mlp, linears[1].weight.shape[1]))
            continue
        for expert, keep in zip(entry.experts, entry.expert_mlp, strict=True):
            zero(experts, expert, slice(None), gone(keep, experts.shape[2]))
        block.mlp.gate = Routed(block.mlp.gate, entry.experts, 2, model.config.model_type == "mixtral")


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("order", ["original", "importance"])
def test_neurons_that_go_are_as_if_silent(name, order):
    model = exact_model(name)
    plan, smaller = pruned(model, intermediate_size=48, order=order)
    silence(model, plan)
    assert_same_logits(logits(smaller), logits(model))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("order", ["original", "importance"])
def test_heads_that_go_are_as_if_silent(name, kv_heads, order):
    model = exact_model(name, num_attention_heads=6)
    target = dict(num_attention_heads=2 * kv_heads, num_key_value_heads=kv_heads)
    plan, smaller = pruned(model, **target, order=order)
    silence(model, plan)
    assert_same_logits(logits(smaller), logits(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_that_go_are_as_if_they_added_nothing(name):
    config = {"mlp_only_layers": [2]} if name == "qwen3_moe" else {}
    model = exact_model(name, num_hidden_layers=5, sliding_window=4, **config)
    plan, smaller = pruned(model, drop_layers=[0, 3])
    silence(model, plan)
    assert [block.self_attn.layer_idx for block in layers_of(smaller)] == [0, 1, 2]
    assert_same_logits(logits(smaller), logits(model))


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("order", ["original", "importance"])
def test_experts_and_their_neurons_that_go_are_as_if_absent(name, order):
    model = exact_model(name)
    sizes = smaller_sizes(name)
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        del sizes[key]
    plan, smaller = pruned(model, **sizes, order=order)
    silence(model, plan)
    assert_same_logits(logits(smaller), logits(model))


def key_value_rows(attention, head):
    """(parameter, rows) of keys and values of one of 2 KV heads beside 6 query heads, weights and biases."""
    if hasattr(attention, "qkv_proj"):
        places = ((attention.qkv_proj, 96), (attention.qkv_proj, 96 + 32))
    else:
        places = ((attention.k_proj, 0), (attention.v_proj, 0))
    for projection, start in places:
        rows = slice(start + 16 * head, start + 16 * head + 16)
        for parameter in (projection.weight, projection.bias):
            if parameter is not None:
                yield parameter, rows


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("heads", [6, 4])
def test_merged_kv_heads_are_the_mean_of_both(name, heads):
    model = exact_model(name, num_attention_heads=6)
    plan, smaller = pruned(model, num_attention_heads=heads, num_key_value_heads=1, kv_heads="merge")
    with torch.no_grad():
        for entry in plan.layers:
            attention = layers_of(model)[entry.layer].self_attn
            for (parameter, first), (_, second) in zip(
                key_value_rows(attention, 0), key_value_rows(attention, 1), strict=True
            ):
                mean = (parameter[first] + parameter[second]) / 2
                parameter[first], parameter[second] = mean, mean
            for head in gone(entry.heads.query, 6):
                zero(attention.o_proj.weight, slice(None), list(range(16 * head, 16 * head + 16)))
    assert_same_logits(logits(smaller), logits(model))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("order", ["original", "importance"])
def test_kept_heads_take_over_what_dropped_ones_lack(name, order):
    model = exact_model(name, num_attention_heads=6)
    tables = random_tables(model.config)
    _, smaller = pruned(model, tables, num_attention_heads=4, merge_heads=True, order=order)
    with torch.no_grad():
        for layer, block in enumerate(layers_of(model)):
            attention = block.self_attn
            query = attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.q_proj
            for group in range(2):
                # three heads, two stay: i in [2K-L+1, K] is the second by rank, its partner the third
                _, second, third = sorted(
                    range(3 * group, 3 * group + 3), key=lambda h: -tables["heads"][layer][h]
                )
                for parameter in (query.weight, query.bias):
                    if parameter is not None:
                        rows = parameter.view(-1, 16, *parameter.shape[1:])
                        rows[second] = 2 * rows[second] - rows[third]
                zero(attention.o_proj.weight, slice(None), list(range(16 * third, 16 * third + 16)))
    assert_same_logits(logits(smaller), logits(model))


def with_dead_channels(name, dead, **changes):
    """A model whose residual stream is zero in the channels `dead`, and of mean zero if that is taken off."""
    model = exact_model(name, **changes)
    for key in ("rms_norm_eps", "norm_eps"):
        if hasattr(model.config, key):
            setattr(model.config, key, 1e-20)
    for module in model.modules():
        for key in ("variance_epsilon", "eps"):
            if hasattr(module, key):
                setattr(module, key, 1e-20)
    embedding = model.get_input_embeddings().weight
    alive = gone(dead, 48)
    with torch.no_grad():
        writers = [embedding.T]
        for layer in range(model.config.num_hidden_layers):
            linears, experts = writers_of(model, layer)
            writers += [linear.weight for linear in linears]
            writers += [linear.bias for linear in linears if linear.bias is not None]
            writers += [] if experts is None else list(experts)
        if name == "nemotron":
            for writer in writers:
                writer[alive] -= writer[alive].mean(0)
            for module in model.modules():
                if "LayerNorm" in type(module).__name__:
                    module.bias[dead] = 0
        for writer in writers:
            writer[dead] = 0
    return model, alive


@torch.no_grad()
def measured(model):
    """Scores that tell the dead channels, and the energies that come into the norms."""
    tables = random_tables(model.config)
    family = family_of(model.config)
    energy, hooks = {}, []
    for name, module in model.named_modules():
        if name in tables["energy"]:
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, args, name=name: energy.__setitem__(name, args[0].double().square().sum((0, 1)))
                )
            )
    logits(model)
    for hook in hooks:
        hook.remove()
    assert set(energy) == set(tables["energy"]) and family.final_norm in energy
    return {**tables, "energy": energy, "hidden": energy[family.final_norm]}


DEAD = [0, 3, 4, 11, 12, 13, 20, 29, 30, 31, 32, 33, 40, 45, 46, 47]


@pytest.mark.parametrize(("name", "tied"), FAMILY_AND_TIE)
@pytest.mark.parametrize("order", ["original", "importance"])
def test_dead_channels_that_go_change_nothing(name, tied, order):
    model, alive = with_dead_channels(name, DEAD, tie_word_embeddings=tied)
    plan, smaller = pruned(model, measured(model), hidden_size=32, order=order)
    assert sorted(plan.hidden) == alive
    assert all(factor == pytest.approx((48 / 32) ** 0.5) for factor in plan.norm_factors.values())
    assert_same_logits(logits(smaller), logits(model))
    # and that is due to the gains: without them the norms divide by another root mean square
    kept = prune_model(model, plan, rescale_norms=False)
    assert (logits(kept) - logits(model)).abs().amax() > 0.01 * logits(model).abs().amax()


def test_embeddings_that_are_scaled_where_no_norm_writes(monkeypatch):
    """A family like the first Gemma: the embedding itself makes up for its smaller factor."""
    llama = family_of({"model_type": "llama"})
    monkeypatch.setitem(registry._FAMILIES, "llama", dataclasses.replace(llama, scales_embedding=True))
    for tied in (False, True):
        model, _ = with_dead_channels("llama", DEAD, tie_word_embeddings=tied)
        scaled = copy.deepcopy(model)
        scaled.get_input_embeddings().register_forward_hook(lambda _, args, out: out * 48**0.5)
        plan = make_plan(measured(scaled), model.config, hidden_size=32, divisor=16)
        smaller = prune_model(model, plan)
        smaller.get_input_embeddings().register_forward_hook(lambda _, args, out: out * 32**0.5)
        assert_same_logits(logits(smaller), logits(scaled))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("order", ["original", "importance"])
def test_all_axes_at_once(name, order):
    model, alive = with_dead_channels(name, DEAD)
    plan, smaller = pruned(model, measured(model), **smaller_sizes(name), order=order)
    silence(model, plan)
    assert sorted(plan.hidden) == alive
    assert_same_logits(logits(smaller), logits(model))
