"""Parameters that serve a token, and bytes of memory, against real models; budgets of them."""

import dataclasses
import re

import pytest
import torch

from minitron_kernels.pruning import Usage, count_usage, find_sizes, make_plan
from minitron_kernels.pruning.families import registry
from minitron_kernels.pruning.families.registry import family_of
from pruning.family_configs import CASES
from pruning.paper_models import NEMO
from pruning.plans import GQA, plan_of
from pruning.score_tables import random_tables
from pruning.tiny_models import tiny_config, tiny_model
from pruning.usage_checks import check_usage

MIXTRAL = NEMO | dict(
    model_type="mixtral",
    hidden_size=4096,
    num_hidden_layers=32,
    vocab_size=32000,
    num_local_experts=8,
    num_experts_per_tok=2,
)
QWEN3_MOE = dict(
    model_type="qwen3_moe",
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    vocab_size=151936,
    num_experts=128,
    num_experts_per_tok=8,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(
    ("config", "parameters", "active"),
    [  # published as 46.7 B and 12.9 B; 30.5 B and 3.3 B; here worked out by hand from the shapes
        (MIXTRAL, 46_702_792_704, 12_879_925_248),
        (QWEN3_MOE, 30_532_122_624, 3_353_032_704),
        (NEMO, 12_247_782_400, 12_247_782_400),
    ],
)
def test_published_models(config, parameters, active):
    assert count_usage(config) == Usage(parameters, active, 2 * parameters)


@pytest.mark.parametrize(("name", "dtype"), [("qwen3_moe", torch.bfloat16), ("phi3", torch.float64)])
def test_usage_is_that_of_the_model(name, dtype):  # in fp32 of every family: test_every_family.py
    check_usage(tiny_model(name, dtype=dtype, num_hidden_layers=2))


def test_a_cache_that_no_table_describes_is_not_counted(monkeypatch):
    config = CASES["youtu"].make_config()
    latent = dataclasses.replace(family_of(config), token_states=())
    monkeypatch.setitem(registry._FAMILIES, "youtu", latent)
    whole = count_usage(config)
    assert whole.memory_bytes == 2 * whole.parameters
    with pytest.raises(ValueError, match="kv_tokens must be 0 for youtu: its table does not say what"):
        count_usage(config, kv_tokens=14)


def test_latents_of_deepseek_by_hand():
    """DeepSeek-V3 keeps 512 + 64 elements of a token in each of 61 layers: 70272 bytes in bf16."""
    config = {"model_type": "deepseek_v3"}  # the class's own sizes
    whole, cached = count_usage(config), count_usage(config, kv_tokens=1000, kv_sequences=3)
    assert cached.memory_bytes - whole.memory_bytes == 1000 * 61 * (512 + 64) * 2


def test_gemma_4_with_experts_is_refused():
    config = CASES["gemma4_text"].make_config(enable_moe_block=True)
    with pytest.raises(ValueError, match="enable_moe_block: no table describes its experts"):
        count_usage(config)


def test_budgets_against_brute_force():
    """All budgets, alone and together, on a model with experts: which sizes fit, and which come first."""
    config = tiny_config("qwen3_moe", tie_word_embeddings=False).to_dict()
    options = dict(
        search=["hidden_size", "moe_intermediate_size", "num_local_experts"], divisor=4, limit=10**6
    )
    all_of_them = find_sizes(config, 10**9, kv_tokens=100, **options)
    assert len(all_of_them) == 10 * 5 * 3  # 12, 16, ... 48; 8, 12, ... 24; 2, 3, 4
    for candidate in all_of_them:
        want = count_usage({**config, **candidate.sizes}, kv_tokens=100)
        assert (candidate.parameters, candidate.active_parameters, candidate.memory_bytes) == want
    half = [sorted(values)[len(values) // 2] for values in zip(*map(usage_of, all_of_them), strict=True)]
    names, several = ("params", "active_params", "memory_bytes"), 0
    for chosen in [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)]:
        budgets = {names[i]: half[i] for i in chosen}
        found = find_sizes(config, **budgets, kv_tokens=100, **options)
        fit = [c for c in all_of_them if all(usage_of(c)[i] <= half[i] for i in chosen)]
        assert {usage_of(c) for c in found} == {usage_of(c) for c in fit} and len(found) == len(fit)
        full = [max(usage_of(c)[i] / half[i] for i in chosen) for c in found]
        near = [c for c, share in zip(found, full, strict=True) if share >= 0.97 * max(full)]
        assert found[: len(near)] == near and 0 < len(near) < len(found) < len(all_of_them)
        assert [c.spread for c in near] == sorted(c.spread for c in near)
        several += len({c.spread for c in near}) > 1
        assert full[len(near) :] == sorted(full[len(near) :], reverse=True)
    assert several > 2  # where the order of those that are nearly full can be wrong


def usage_of(candidate):
    return candidate.parameters, candidate.active_parameters, candidate.memory_bytes


def test_plans_for_budgets():
    config = tiny_config("qwen3_moe")
    tables = random_tables(config)
    whole = count_usage(config)
    assert whole.active_parameters < whole.parameters
    budget = round(0.8 * whole.active_parameters)
    plan = make_plan(tables, config, active_params=budget, divisor=8)
    assert 0.7 * budget < count_usage(plan.target_config).active_parameters <= budget
    assert f"({plan.candidates[0].active_parameters:,} active)" in plan.summary()
    assert re.search(rf"active parameters +{whole.active_parameters:,} ", plan.summary())
    assert plan.made_with["active_params"] == budget
    memory = round(0.7 * count_usage(config, memory_dtype="float32", kv_tokens=500).memory_bytes)
    plan = make_plan(
        tables, config, memory_bytes=memory, memory_dtype=torch.float32, kv_tokens=500, divisor=8
    )
    used = count_usage(plan.target_config, memory_dtype="float32", kv_tokens=500).memory_bytes
    assert 0.6 * memory < used <= memory and used == plan.candidates[0].memory_bytes
    assert (plan.made_with["memory_dtype"], plan.made_with["kv_tokens"]) == ("float32", 500)
    # one expert a token halves what serves it, without fewer experts
    fewer = find_sizes(config, whole.parameters, num_experts_per_tok=1, divisor=8)[0]
    more = find_sizes(config, whole.parameters, divisor=8)[0]
    assert fewer.parameters == more.parameters == whole.parameters
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    assert more.active_parameters - fewer.active_parameters == 2 * expert  # one of three layers is dense
    for wrong in (0, -1, 5, 1.5, True):
        with pytest.raises(ValueError, match=f"num_experts_per_tok must be from 1 to 4 experts, got {wrong}"):
            find_sizes(config, whole.parameters, num_experts_per_tok=wrong, divisor=8)
    with pytest.raises(ValueError, match="num_experts_per_tok must be from 1 to no experts, got 1"):
        find_sizes(tiny_config("llama"), whole.parameters, num_experts_per_tok=1, divisor=8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "give a budget: params, active_params or memory_bytes"),
        ({"active_params": 0}, ValueError, "active_params must be above 0, got 0"),
        ({"memory_bytes": float("nan")}, ValueError, "memory_bytes must be above 0, got nan"),
        ({"memory_bytes": "1GB"}, TypeError, "memory_bytes must be a number, got '1GB'"),
        (
            {"params": 1e9, "memory_dtype": "bf16"},
            TypeError,
            "memory_dtype must be a torch dtype or its name",
        ),
        ({"params": 1e9, "memory_dtype": "nn"}, TypeError, "memory_dtype must be a torch dtype or its name"),
        ({"params": 1e9, "kv_tokens": -1}, ValueError, "kv_tokens must be at least 0, got -1"),
        ({"params": 1e9, "kv_tokens": 1.5}, TypeError, "kv_tokens must be an int, got 1.5"),
        (
            {"params": 1e9, "memory_bytes": 9},
            ValueError,
            "memory_bytes must be at least [0-9,]+, the smallest",
        ),
    ],
)
def test_wrong_budgets(arguments, error, message):
    with pytest.raises(error, match=message):
        find_sizes(GQA, divisor=8, **arguments)


def test_budgets_that_cut_nothing_or_stand_alone():
    whole = count_usage(GQA)
    with pytest.raises(
        ValueError, match=rf"params must be less than the {whole.parameters:,} of the whole.*;"
    ):
        plan_of(GQA, params=whole.parameters, memory_bytes=whole.memory_bytes)
    for options in ({"kv_tokens": 5}, {"memory_dtype": "float32"}):
        with pytest.raises(ValueError, match="memory_dtype and kv_tokens belong to a budget"):
            plan_of(GQA, hidden_size=64, **options)
