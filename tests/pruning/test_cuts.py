"""Cuts of single parameters."""

import dataclasses
import math

import pytest
import torch

from minitron_kernels.pruning import Cuts, Family, Param, make_plan
from minitron_kernels.pruning.families import registry
from pruning.family_configs import CASES
from pruning.score_tables import random_tables
from pruning.threads import one_thread  # noqa: F401  (autouse: of every test here)
from pruning.tiny_models import tiny_model


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


MERGE = dict(num_attention_heads=6, num_key_value_heads=2, kv_heads="merge", merge_heads=True)


def merged(heads, entry):
    """Query heads after the merge: a kept one is 2 · itself - the one that it stands for."""
    partner = dict(entry.heads.merged)
    assert partner and set(partner) < set(entry.heads.query)
    return [2 * heads[q] - heads[partner[q]] if q in partner else heads[q] for q in entry.heads.query]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("order", ["original", "importance"])
def test_heads_merge_in_one_projection_of_grouped_queries_keys_and_values(monkeypatch, dtype, order):
    """Four KV groups of two query heads become two of three; each has its queries, then its key and value."""
    family = Family(
        ("grouped_qkv",),
        layer=(
            Param("self_attn.qkv.weight", "qkv, hidden"),
            Param("self_attn.qkv.bias", "qkv"),
            Param("self_attn.o_proj.weight", "hidden, heads"),
        ),
    )
    monkeypatch.setitem(registry._FAMILIES, "grouped_qkv", family)
    config = dict(model_type="grouped_qkv", vocab_size=8, hidden_size=12, intermediate_size=8, head_dim=2)
    config |= dict(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4)
    tables = random_tables(config)
    sizes = MERGE | {"hidden_size": 8}
    plan = make_plan(tables, config, divisor=1, order=order, rescale_norms=False, **sizes)
    generator = torch.Generator().manual_seed(3)
    for layer, entry in enumerate(plan.layers):
        for kind, shape in (("weight", (32, 12)), ("bias", (32,))):
            source = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
            kept = source[:, list(plan.hidden)] if kind == "weight" else source
            groups = kept.double().unflatten(0, (4, 4, 2))  # group, (query, query, key, value), element
            query = merged(groups[:, :2].flatten(0, 1), entry)
            expected = []
            for new, sources in enumerate(entry.heads.kv):
                key, value = (groups[list(sources), at].mean(0) for at in (2, 3))
                expected += [*query[3 * new : 3 * new + 3], key, value]
            got = Cuts(plan).of(f"model.layers.{layer}.self_attn.qkv.{kind}").apply(source)
            assert got.dtype == dtype
            torch.testing.assert_close(
                got.double(), torch.cat(expected), rtol=0, atol=16 * torch.finfo(dtype).eps
            )


def test_gains_of_each_head_stay_those_of_the_kept_heads_where_queries_merge():
    """A gain multiplies what a norm made of a query: 2 · gain - another gain would be of no head."""
    config = CASES["cohere"].make_config(num_attention_heads=8, num_key_value_heads=4)
    plan = make_plan(random_tables(config), config, **MERGE)
    inside = "model.layers.0.self_attn"
    entry = plan.layers[0]
    gains = torch.arange(8 * 16, dtype=torch.float64).view(8, 16) ** 2
    query = Cuts(plan).of(f"{inside}.q_norm.weight").apply(gains)
    assert torch.equal(query, gains[list(entry.heads.query)])
    key = Cuts(plan).of(f"{inside}.k_norm.weight").apply(gains[:4])
    assert torch.equal(key, torch.stack([gains[list(sources)].mean(0) for sources in entry.heads.kv]))
    weight = gains.view(128, 1).expand(-1, 48).contiguous()
    got = Cuts(plan).of(f"{inside}.q_proj.weight").apply(weight)
    assert torch.equal(got.view(6, 16, 48)[:, :, 0], torch.stack(merged(gains, entry)))


@pytest.mark.parametrize("name", ["gpt_neox", "persimmon", "deepseek_v3"])
def test_keys_do_not_merge_where_the_class_has_one_for_each_head(name):
    config = CASES[name].make_config()
    with pytest.raises(ValueError, match="num_key_value_heads"):
        make_plan(random_tables(config), config, num_key_value_heads=2, kv_heads="merge")


def test_a_bias_beside_what_reads_the_scaled_residual_stream_stays(monkeypatch):
    """W · (s · r) / s + b: only the weight makes up for a stream that is scaled by s."""
    gemma2 = registry._FAMILIES["gemma2"]
    reader = dataclasses.replace(gemma2, reads_residual=("self_attn.q_proj",))
    monkeypatch.setitem(registry._FAMILIES, "gemma2", reader)
    config = CASES["gemma2"].make_config()
    plan = make_plan(random_tables(config), config, divisor=16, hidden_size=32)
    weight, bias = (
        Cuts(plan).of(f"model.layers.1.self_attn.q_proj.{kind}").factor for kind in ("weight", "bias")
    )
    assert math.isclose(weight, math.sqrt(48 / 32)) and bias == 1
