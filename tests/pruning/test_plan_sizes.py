"""Plans: sizes, ratios and budgets."""

import re

import pytest

from minitron_kernels.pruning import PruningPlan, find_sizes, make_plan
from minitron_kernels.pruning.families.registry import family_of
from pruning.paper_models import COUNTS, LLAMA, NEMO, NEMOTRON
from pruning.plans import GQA, plan_of
from pruning.score_tables import random_tables
from pruning.tiny_models import tiny_config


@pytest.fixture(scope="module")
def nemo_tables():
    return random_tables(NEMO)


def test_nemo_becomes_minitron_8b(nemo_tables, tmp_path):
    plan = make_plan(nemo_tables, NEMO, hidden_size=4096, intermediate_size=11520)
    assert (plan.parameters_before, plan.parameters_after) == (12_247_782_400, 8_414_105_600)
    summary = plan.summary()
    for line in (r"hidden_size +5,120 +4,096 +80.0%", r"intermediate_size +14,336 +11,520 +80.4%"):
        assert re.search(line, summary)
    assert re.search(r"parameters +12,247,782,400 +8,414,105,600 +68.7%", summary)
    assert re.search(r"without embeddings +10,905,605,120 +7,340,363,776", summary)
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    assert (tmp_path / "plan.json").stat().st_size < 8 << 20
    # cut anew from the same scores
    smaller = make_plan(nemo_tables, NEMO, hidden_size=3072, intermediate_size=11520)
    assert set(smaller.hidden) < set(plan.hidden)
    assert smaller.layers[7].mlp == plan.layers[7].mlp


@pytest.mark.parametrize(
    ("source", "target", "sizes"),
    [
        (
            LLAMA,
            "Llama-3.1-Minitron 4B width",
            dict(hidden_size=3072, intermediate_size=9216),
        ),
        (LLAMA, "Llama-3.1-Minitron 4B depth", dict(num_hidden_layers=16)),
        (
            NEMOTRON,
            "Minitron 4B",
            dict(hidden_size=3072, intermediate_size=9216, num_attention_heads=24),
        ),
    ],
)
def test_counts_of_the_papers(source, target, sizes):
    plan = plan_of(source, **sizes)
    assert plan.parameters_after == COUNTS[target][1]
    assert plan.target_config["head_dim"] == 128


def test_sizes_by_ratio():
    config = dict(LLAMA, num_hidden_layers=2)
    plan = plan_of(config, ratio=0.75)
    assert plan.target_config["hidden_size"] == 3072
    assert plan.target_config["intermediate_size"] == 10752
    plan = plan_of(config, ratio={"intermediate_size": 0.7})  # 10035.2: to the nearest multiple of 64
    assert (plan.target_config["hidden_size"], plan.target_config["intermediate_size"]) == (4096, 10048)
    assert plan.made_with["ratio"] == {"intermediate_size": 0.7}
    plan = plan_of(config, ratio=0.5, hidden_size=3072)
    assert (plan.target_config["hidden_size"], plan.target_config["intermediate_size"]) == (3072, 7168)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (
            dict(hidden=64),
            ValueError,
            "hidden is not a size that can be pruned in mistral: it can be hidden_size, intermediate_size, "
            "num_attention_heads, num_key_value_heads, num_hidden_layers",
        ),
        (dict(vocab_size=8), ValueError, "vocab_size is not a size that can be pruned"),
        (dict(head_dim=4), ValueError, "head_dim is not a size that can be pruned"),
        (dict(num_experts=4), ValueError, "num_experts is not a size that can be pruned"),
        (dict(hidden_size=65), ValueError, "hidden_size must be from 1 to 64, got 65"),
        (dict(hidden_size=0), ValueError, "hidden_size must be from 1 to 64, got 0"),
        (dict(hidden_size=32.0), TypeError, "hidden_size must be an int, got 32.0"),
        (
            dict(intermediate_size=80),
            ValueError,
            "multiple of 64, got 80: take 64, or another divisor",
        ),
        (
            dict(intermediate_size=50, divisor=16),
            ValueError,
            "multiple of 16, got 50: take 48 or 64, or another divisor",
        ),
        (
            dict(intermediate_size=50, divisor={"intermediate_size": 0}),
            ValueError,
            "divisor must be at least 1",
        ),
        (dict(intermediate_size=50, divisor=2.0), TypeError, "divisor must be an int"),
        (dict(ratio={"mlp": 0.5}), ValueError, "mlp is not a size that can be pruned"),
        (dict(ratio=1.5), ValueError, "above 0 and at most 1, got 1.5"),
        (dict(ratio="half"), TypeError, "must be a number, got 'half'"),
        (
            dict(ratio={"hidden_size": 0.5}, hidden_size=64),
            ValueError,
            "size of hidden a second time",
        ),
        (dict(search=["hidden_size"]), ValueError, "give params as well"),
        (dict(num_experts_per_tok=1), ValueError, "from 1 to no experts"),
    ],
)
def test_impossible_targets(target, error, message):
    with pytest.raises(error, match=re.escape(message)):
        plan_of(GQA, **target)


def test_head_dim_is_written():
    # it followed from hidden_size / num_attention_heads, which are another ratio afterwards
    config = {key: value for key, value in LLAMA.items() if key not in ("head_dim", "num_key_value_heads")}
    config["num_hidden_layers"] = 2
    plan = plan_of(config, hidden_size=2048)
    assert plan.target_config["head_dim"] == 4096 // 32
    assert plan.target_config["num_key_value_heads"] == 32


def test_own_size_and_divisors_by_name():
    config = dict(GQA, intermediate_size=90)
    assert plan_of(config, intermediate_size=90).target_config["intermediate_size"] == 90
    plan = plan_of(config, intermediate_size=80, hidden_size=64, divisor={"intermediate_size": 16})
    assert plan.target_config["intermediate_size"] == 80
    with pytest.raises(ValueError, match="hidden_size must be a multiple of 64, got 32"):
        plan_of(config, hidden_size=32, divisor={"intermediate_size": 16})


def test_budget_of_parameters(nemo_tables):
    found = find_sizes(NEMO, 8.5e9, limit=1000)
    family = family_of(NEMO)
    for candidate in found[:: len(found) // 50]:
        assert candidate.parameters == family.count_parameters({**NEMO, **candidate.sizes}) <= 8.5e9
        assert all(size % 128 == 0 for size in candidate.sizes.values())
    best = found[0]
    near = [c for c in found if c.parameters >= 0.97 * max(c.parameters for c in found)]
    assert found[: len(near)] == near and best.spread == min(c.spread for c in near)
    assert best.sizes == {"hidden_size": 4096, "intermediate_size": 11520}  # what the paper took
    plan = make_plan(nemo_tables, NEMO, params=8.5e9)
    assert plan.parameters_after == best.parameters
    assert [c.sizes for c in plan.candidates] == [c.sizes for c in found[:10]]
    assert (
        f"candidate: {best.parameters:,} parameters with hidden_size {best.sizes['hidden_size']}"
        in plan.summary()
    )


def test_budget_with_fixed_and_searched_sizes():
    plan = plan_of(GQA, params=140_000, hidden_size=64, divisor=8)
    assert plan.target_config["hidden_size"] == 64
    found = find_sizes(GQA, 100_000, search=["num_hidden_layers", "num_attention_heads"])
    for candidate in found:
        assert candidate.sizes["num_attention_heads"] % 4 == 0
        config = {**GQA, **candidate.sizes}
        assert candidate.parameters == family_of(config).count_parameters(config)
    shallow = find_sizes(GQA, 1e6, fixed={"num_hidden_layers": 4})[0]
    assert shallow.parameters == family_of(GQA).count_parameters(GQA | {"num_hidden_layers": 4})
    plan = plan_of(GQA, params=100_000, search=["num_hidden_layers", "num_attention_heads"])
    assert plan.parameters_after == found[0].parameters <= 100_000
    assert len(plan.layers) == found[0].sizes["num_hidden_layers"] < 6
    dropped = plan_of(GQA, params=100_000, drop_layers=[0, 3], divisor=8)
    assert [entry.layer for entry in dropped.layers] == [1, 2, 4, 5]
    assert dropped.parameters_after <= 100_000


def test_heads_are_searched_with_their_kv_heads():
    mha = dict(GQA, num_key_value_heads=12)
    for target in (dict(), dict(kv_heads="merge", num_key_value_heads=4)):
        found = plan_of(mha, params=180_000, search=["num_attention_heads"], **target).target_config
        assert found["num_attention_heads"] < 12
        kv_heads = target.get("num_key_value_heads", found["num_attention_heads"])
        assert found["num_key_value_heads"] == kv_heads


def test_impossible_budgets():
    least = min(c.parameters for c in find_sizes(GQA, 1e9, divisor=8, limit=10**6))
    with pytest.raises(ValueError, match=rf"params must be at least {least:,}.*got 9"):
        find_sizes(GQA, 9, divisor=8)
    with pytest.raises(ValueError, match="search must hold sizes that are not given otherwise"):
        find_sizes(GQA, 1e6, search=["hidden_size"], fixed={"hidden_size": 64})
    with pytest.raises(ValueError, match="hidden_size must be from 1 to 64, got 65"):
        find_sizes(GQA, 1e6, fixed={"hidden_size": 65})
    with pytest.raises(ValueError, match=r"no sizes \['num_attention_heads'\] that go with the others"):
        odd = dict(GQA, model_type="llama", hidden_size=61, tie_word_embeddings=False)
        odd |= dict(attention_bias=False, mlp_bias=False)
        find_sizes(odd, 1e6, search=["num_attention_heads"])
    with pytest.raises(TypeError, match="params must be a number, got '8B'"):
        find_sizes(GQA, "8B")
    with pytest.raises(ValueError, match="combinations, at most 200000"):
        find_sizes(LLAMA, 1e9, divisor=1)
    with pytest.raises(ValueError, match="layers must name the layers that stay"):
        find_sizes(tiny_config("qwen3_moe"), 1e9, search=["num_hidden_layers"])
    with pytest.raises(ValueError, match="layers must be 4 as fixed says, got 2"):
        find_sizes(GQA, 1e6, fixed={"num_hidden_layers": 4}, layers=[1, 2])
    with pytest.raises(ValueError, match="search cannot choose num_hidden_layers"):
        plan_of(GQA, params=100_000, search=["num_hidden_layers"], drop_layers=[1])


def test_sizes_that_transformers_would_not_load():
    config = dict(LLAMA, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_hidden_layers=2)
    config |= dict(num_key_value_heads=3, head_dim=64)
    with pytest.raises(ValueError, match="hidden_size 480 is not a multiple of num_attention_heads 9"):
        plan_of(config, hidden_size=480, divisor=32)
    plan = plan_of(config, hidden_size=480, divisor=32, loadable=False)
    assert plan.target_config["hidden_size"] == 480
    found = find_sizes(config, 1e9, divisor=8, limit=10**6)
    assert {c.sizes["hidden_size"] % 9 for c in found} == {0}
    long_rope = tiny_config("phi3").to_dict()
    long_rope["rope_parameters"] |= {
        "rope_type": "longrope",
        "short_factor": [1.0] * 6,
        "long_factor": [1.0] * 6,
    }
    with pytest.raises(ValueError, match=r"6 entries of RoPE's short_factor are not half of.*32 // 4"):
        plan_of(long_rope, hidden_size=32, divisor=16)
