"""prune_model against the whole model with what goes put out of action by hand; files; configs; errors."""

import copy
import dataclasses
import itertools
import re

import pytest
import torch

from minitron_kernels.pruning import Cuts, make_plan, prune_model
from minitron_kernels.pruning.families import registry
from minitron_kernels.pruning.families.registry import family_of
from pruning.score_tables import random_tables, smaller_sizes
from pruning.tiny_models import FAMILIES, tiny_model

IDS = torch.arange(24).view(2, 12) * 7 % 96
# norms, RoPE and softmax of these models compute in fp32: 2^-24 at each of a few dozen steps in a row
TOLERANCE = 64 * 2**-24
DENSE = tuple(name for name in FAMILIES if name != "mixtral")
SPARSE = ("mixtral", "qwen3_moe")
FAMILY_AND_TIE = tuple(itertools.product(FAMILIES, (False, True)))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads only wait for each other over tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def assert_same_logits(actual, expected):
    """Equal but for rounding, and far from what an idle model would give."""
    expected = expected.double()
    scale = expected.abs().amax()
    assert scale > 0.01
    error = (actual.double() - expected).abs().amax()
    assert error <= TOLERANCE * scale, f"{error / scale:.2e} of the largest logit"


def exact_model(name, **changes):
    """A tiny model in float64, for which the experts' fused kernels do not work."""
    model = tiny_model(name, dtype=torch.float64, **changes)
    if name in SPARSE:
        model.set_experts_implementation("eager")
    return model


def layers_of(model):
    return model.get_submodule(family_of(model.config).layers)


def pruned(model, tables=None, *, divisor=16, **target):
    plan = make_plan(tables or random_tables(model.config), model.config, divisor=divisor, **target)
    smaller = prune_model(model, plan)
    assert sum(p.numel() for p in smaller.parameters()) == plan.parameters_after < plan.parameters_before
    return plan, smaller


@torch.no_grad()
def zero(parameter, *index):
    """Zero parameter[index], with lists as indices of one dimension each."""
    if parameter is not None:
        parameter[index] = 0


def gone(keep, size):
    return sorted(set(range(size)) - set(keep))


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


# ---- identity, files, modes


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


# ---- cuts of single parameters


def test_cuts_by_name():
    model = tiny_model("qwen3_moe", tie_word_embeddings=True)
    plan = make_plan(
        random_tables(model.config), model.config, divisor=16, num_experts=3, drop_layers=[1], hidden_size=32
    )
    cuts = Cuts(plan)
    kept = plan.layers[1].experts
    (dropped,) = set(range(4)) - set(kept)
    stem = "model.layers.2.mlp.experts"
    assert cuts.of(f"{stem}.{dropped}.up_proj.weight", stored=True) is None
    assert cuts.of("model.layers.1.mlp.up_proj.weight") is None
    cut = cuts.of(f"{stem}.{kept[-1]}.down_proj.weight", stored=True)
    assert (cut.name, cut.source_shape, cut.shape) == (
        "model.layers.1.mlp.experts.2.down_proj.weight",
        (48, 24),
        (32, 24),
    )
    fused = cuts.of(f"{stem}.gate_up_proj")
    assert (fused.name, fused.shape) == ("model.layers.1.mlp.experts.gate_up_proj", (3, 48, 32))
    assert cuts.of("model.layers.2.self_attn.q_norm.weight").unchanged
    assert not fused.unchanged
    assert cuts.source_module("model.layers.1.self_attn.rotary") == "model.layers.2.self_attn.rotary"
    assert cuts.source_module("model.rotary_emb.inv_freq") == "model.rotary_emb.inv_freq"
    # a checkpoint may hold the tied head a second time
    assert "lm_head.weight" not in cuts.names(stored=True)
    assert cuts.of("lm_head.weight", stored=True).shape == (96, 32)
    for name, stored in (
        (f"{stem}.gate_up_proj", True),
        (f"{stem}.0.up_proj.weight", False),
        ("model.layers.3.input_layernorm.weight", False),
        ("visual.weight", False),
    ):
        with pytest.raises(
            ValueError, match=f"'{name}' is not a parameter of the plan's source, a qwen3_moe"
        ):
            cuts.of(name, stored=stored)
    with pytest.raises(ValueError, match=r"experts.gate_up_proj is cut from .* \(4, 48, 48\), got \(4, 48\)"):
        fused.apply(torch.zeros(4, 48))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_gain_is_scaled_in_wide_arithmetic(dtype):
    for name, offset in (("llama", 0.0), ("gemma2", 1.0)):
        config = tiny_model(name).config
        plan = make_plan(random_tables(config), config, divisor=16, hidden_size=32)
        weight = (torch.randn(48, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 8).to(
            dtype
        )
        for norm, extra in (("input_layernorm", 1.0), ("post_attention_layernorm", (32 / 48) ** 0.5)):
            key = f"model.layers.1.{norm}"
            factor = plan.norm_factors[key] * (extra if name == "gemma2" else 1.0)
            out = torch.empty(32, 2, dtype=dtype)[:, 0]
            assert Cuts(plan).of(f"{key}.weight").apply(weight, out) is out
            expected = (offset + weight.double()[list(plan.hidden)]) * factor - offset
            ulp = torch.finfo(dtype).eps * expected.abs().clamp(min=2**-6)
            wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
            assert ((out.double() - expected).abs() <= ulp / 2 + 4 * wide).all()


def test_cuts_by_name_in_order_of_importance():
    """An expert's new number is its place among those that stay."""
    config = tiny_model("mixtral").config
    tables = random_tables(config)
    tables["experts"] = {layer: torch.tensor([1.0, 0.0, 3.0, 2.0]) for layer in range(3)}
    plan = make_plan(tables, config, num_local_experts=3, order="importance")
    stem = "model.layers.1.block_sparse_moe.experts"
    cuts = [Cuts(plan).of(f"{stem}.{expert}.w1.weight", stored=True) for expert in range(4)]
    assert [cut and cut.name for cut in cuts] == [
        f"{stem}.2.w1.weight",
        None,
        f"{stem}.0.w1.weight",
        f"{stem}.1.w1.weight",
    ]
    assert cuts[0].unchanged and not dataclasses.replace(cuts[0], factor=2.0).unchanged


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_means_of_heads_are_taken_in_wide_arithmetic(dtype):
    """One rounding to the dtype: a sum of four heads in bfloat16 would round three times more."""
    config = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4).config
    tables = random_tables(config)
    plan = make_plan(tables, config, num_key_value_heads=1, kv_heads="merge", hidden_size=32, divisor=16)
    generator = torch.Generator().manual_seed(1)
    for name, shape in (("weight", (64, 48)), ("bias", (64,))):
        heads = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
        out = Cuts(plan).of(f"model.layers.1.self_attn.k_proj.{name}").apply(heads)
        kept = heads.double()[:, list(plan.hidden)] if name == "weight" else heads.double()
        terms = kept.unflatten(0, (4, 16))
        expected = terms.mean(0)
        wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        error = (out.double() - expected).abs()
        assert out.dtype == dtype
        rounding = torch.finfo(dtype).eps / 2 * expected.abs()
        assert (error <= 1.001 * rounding + 4 * wide * terms.abs().sum(0)).all()
