"""Plans: sizes, ratios and budgets; what is chosen; the JSON file."""

import json
import math
import re

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitron_kernels.pruning import PruningPlan, find_sizes, make_plan
from minitron_kernels.pruning.families.registry import family_of
from minitron_kernels.pruning.plan.selection import choose_heads, format_runs, parse_runs
from pruning.score_tables import random_tables, smaller_sizes
from pruning.test_families import COUNTS, LLAMA, NEMO, NEMOTRON
from pruning.tiny_models import FAMILIES, tiny_config

GQA = dict(NEMO, hidden_size=64, intermediate_size=96, num_hidden_layers=6, head_dim=8, vocab_size=32)
GQA |= dict(num_attention_heads=12, num_key_value_heads=4)


def plan_of(config, seed=0, **target):
    return make_plan(random_tables(config, seed), config, **target)


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


def test_the_best_stay_in_either_order():
    scores = torch.tensor([3.0, 9.0, 1.0, 9.0, 5.0, 0.0], dtype=torch.float64)
    config = dict(GQA, hidden_size=6, num_attention_heads=6, num_key_value_heads=6)
    target = dict(hidden_size=4, divisor=1, rescale_norms=False, loadable=False)
    assert make_plan({"hidden": scores}, config, **target).hidden == (0, 1, 3, 4)
    by_importance = make_plan({"hidden": scores}, config, order="importance", **target)
    assert by_importance.hidden == (1, 3, 4, 0)
    # an axis that stays whole is not permuted
    assert by_importance.layers[0].mlp == tuple(range(96))
    with pytest.raises(ValueError, match="order must be one of original, importance, got 'best'"):
        make_plan({"hidden": scores}, config, hidden_size=4, order="best")


@pytest.mark.parametrize("order", ["original", "importance"])
def test_each_layer_ranks_its_own(order):
    tables = random_tables(GQA)
    plan = make_plan(tables, GQA, intermediate_size=64, num_attention_heads=8, order=order)
    for entry in plan.layers:
        score = tables["mlp"][entry.layer]
        best = sorted(range(96), key=lambda i: -score[i])[:64]
        assert list(entry.mlp) == (best if order == "importance" else sorted(best))
        for group in range(4):  # two of three heads of every KV group
            mine = entry.heads.query[2 * group : 2 * group + 2]
            best = sorted(range(3 * group, 3 * group + 3), key=lambda i: -tables["heads"][entry.layer][i])[:2]
            assert list(mine) == (best if order == "importance" else sorted(best))
    assert plan.layers[0].mlp != plan.layers[1].mlp


def test_whole_kv_groups_go():
    tables = random_tables(GQA)
    plan = make_plan(tables, GQA, num_attention_heads=4, num_key_value_heads=2)
    for entry in plan.layers:
        score = tables["heads"][entry.layer].view(4, 3).sort(descending=True).values[:, :2].sum(1)
        best = sorted(sorted(range(4), key=lambda i: -score[i])[:2])
        assert entry.heads.kv == tuple((group,) for group in best)
        assert [head // 3 for head in entry.heads.query] == [best[0]] * 2 + [best[1]] * 2
    target = plan.target_config
    assert (target["num_attention_heads"], target["num_key_value_heads"], target["head_dim"]) == (4, 2, 8)


def test_kv_heads_are_merged():
    whole = plan_of(GQA, num_key_value_heads=2, kv_heads="merge")
    assert whole.layers[0].heads.kv == ((0, 1), (2, 3))
    assert whole.layers[0].heads.query == tuple(range(12))
    tables = random_tables(GQA)
    fewer = make_plan(tables, GQA, num_key_value_heads=2, num_attention_heads=8, kv_heads="merge")
    score = tables["heads"][3]
    for group, heads in enumerate((range(6), range(6, 12))):
        best = sorted(sorted(heads, key=lambda i: -score[i])[:4])
        assert list(fewer.layers[3].heads.query[4 * group : 4 * group + 4]) == best
    assert "KV heads are the mean" in fewer.summary()


def test_kv_heads_follow_where_each_query_head_has_its_own():
    plan = plan_of(dict(GQA, num_key_value_heads=12), num_attention_heads=8)
    assert plan.target_config["num_key_value_heads"] == 8
    heads = plan.layers[0].heads
    assert heads.kv == tuple((head,) for head in heads.query)


@pytest.mark.parametrize(
    ("total", "kept", "pairs"),
    [
        # head_i <- 2 head_i - head_{2K-i+1}, i in [2K-L+1, K], counted from 1, by rank
        (4, 3, [(3, 4)]),
        (4, 2, [(1, 4), (2, 3)]),
        (6, 4, [(3, 6), (4, 5)]),
        (5, 3, [(2, 5), (3, 4)]),
    ],
)
def test_merged_heads_are_those_of_the_paper(total, kept, pairs):
    ranks = torch.randperm(
        total, generator=torch.Generator().manual_seed(3)
    )  # ranks[i]: the head of rank i + 1
    scores = torch.empty(2 * total, dtype=torch.float64)
    scores[ranks] = torch.arange(total, 0, -1, dtype=torch.float64)
    scores[ranks + total] = torch.arange(total, 0, -1, dtype=torch.float64)
    heads = choose_heads(
        scores,
        (2 * total, 2),
        (2 * kept, 2),
        merge_kv=False,
        merge_query=True,
        order="original",
    )
    first = {(int(ranks[i - 1]), int(ranks[j - 1])) for i, j in pairs}
    assert set(heads.merged) == first | {(i + total, j + total) for i, j in first}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (dict(num_attention_heads=10), "multiple of num_key_value_heads, 4, got 10"),
        (
            dict(num_key_value_heads=2),
            "would serve 6 query heads each, but a KV group has 3: keep at most 6",
        ),
        (
            dict(num_key_value_heads=3, kv_heads="merge"),
            "must divide 4 where KV heads are merged, got 3",
        ),
        (
            dict(num_attention_heads=4, merge_heads=True),
            "at least half of the 3 query heads of a KV group to stay, got 1",
        ),
        (
            dict(hidden_size=64, merge_heads=True),
            "nothing to merge: all 3 query heads",
        ),
        (dict(kv_heads="drop"), "kv_heads must be one of prune, merge, got 'drop'"),
    ],
)
def test_impossible_heads(target, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_of(GQA, **target)


def test_the_least_important_block_goes():
    importance = torch.tensor([0.9, 0.2, 0.3, 0.1, 0.4, 0.8], dtype=torch.float64)

    def dropped(**target):
        plan = make_plan({"layers": importance}, GQA, **target)
        assert plan.target_config["num_hidden_layers"] == len(plan.layers)
        return sorted(set(range(6)) - {entry.layer for entry in plan.layers})

    assert dropped(num_hidden_layers=5) == [3]
    assert dropped(num_hidden_layers=4) == [2, 3]
    assert dropped(num_hidden_layers=3) == [1, 2, 3]
    assert dropped(num_hidden_layers=4, block_losses={0: 9.0, 1: 3.5, 4: 2.5}) == [4, 5]
    assert dropped(num_hidden_layers=4, block_losses=[3.0, 1.0, 2.0, 4.0, 5.0]) == [1, 2]
    assert dropped(drop_layers=[4, 1]) == [1, 4]
    assert dropped(drop_layers=numpy.array([4, 1])) == [1, 4]
    assert dropped(drop_layers=[0], num_hidden_layers=5) == [0]
    for target, message in (
        (
            dict(drop_layers=[0], num_hidden_layers=4),
            "num_hidden_layers 4 is not what drop_layers leaves of 6: 5",
        ),
        (dict(drop_layers=[6]), "drop_layers must name some of 6 layers"),
        (dict(drop_layers=[1, 1]), "drop_layers must name some of 6 layers"),
        (dict(drop_layers=[1], block_losses=[1.0]), "block_losses must be None"),
        (dict(num_hidden_layers=4, block_losses={5: 1.0}), "first dropped layers from 0 to 4, got 5"),
        (dict(num_hidden_layers=4, block_losses={1: math.nan}), r"block_losses\[1\] must be finite, got nan"),
        (dict(num_hidden_layers=4, block_losses={}), "at least one loss"),
        (dict(num_hidden_layers=0), "num_hidden_layers must be from 1 to 6, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dropped(**target)


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


def test_scores_must_be_there_and_fit():
    tables = random_tables(GQA)
    target = dict(hidden_size=32, intermediate_size=64, divisor=32, num_attention_heads=8, loadable=False)
    for axis in ("hidden", "mlp", "heads", "energy"):
        less = {name: table for name, table in tables.items() if name != axis}
        with pytest.raises(ValueError, match=f"scores must have the table '{axis}' to .*, got "):
            make_plan(less, GQA, **target)
    make_plan({k: tables[k] for k in ("hidden", "mlp", "heads")}, GQA, rescale_norms=False, **target)
    for axis, key in (("mlp", 5), ("heads", 2), ("energy", "model.layers.1.input_layernorm")):
        less = {**tables, axis: {k: v for k, v in tables[axis].items() if k != key}}
        with pytest.raises(ValueError, match=rf"scores\[{axis}\] must have an entry for {key!r}"):
            make_plan(less, GQA, **target)
    for wrong, error, message in (
        (torch.rand(95), ValueError, r"scores\[mlp\]\[3\] must have the shape \(96,\), got \(95,\)"),
        (torch.full((96,), math.nan), ValueError, r"scores\[mlp\]\[3\] must be finite"),
        ("many", TypeError, r"scores\[mlp\]\[3\] must be a tensor, got str"),
    ):
        with pytest.raises(error, match=message):
            make_plan({**tables, "mlp": {**tables["mlp"], 3: wrong}}, GQA, **target)
    with pytest.raises(ValueError, match="must not be negative"):
        energy = {norm: -table for norm, table in tables["energy"].items()}
        make_plan({**tables, "energy": energy}, GQA, **target)
    with pytest.raises(TypeError, match="config must be given"):
        make_plan(tables, **target)
    with pytest.raises(TypeError, match="scores must be ImportanceScores or a mapping, got list"):
        make_plan([], GQA, **target)


def test_scores_object_gives_tables_and_config():
    class Scores:
        config = GQA

        def tables(self, batch, seq):
            assert (batch, seq) == ("mean", "var")
            return random_tables(GQA)

    plan = make_plan(Scores(), intermediate_size=64, batch="mean", seq="var")
    assert plan == make_plan(Scores(), GQA, intermediate_size=64, batch="mean", seq="var")
    assert (plan.made_with["batch"], plan.made_with["intermediate_size"]) == ("mean", 64)


def test_norm_factors():
    tables = random_tables(GQA)
    tables["energy"]["model.layers.2.input_layernorm"] = torch.zeros(64)
    plan = make_plan(tables, GQA, hidden_size=48, divisor=16, drop_layers=[1])
    names = {
        f"model.layers.{layer}.{norm}" for layer in (0, 2, 3, 4, 5) for norm in family_of(GQA).taps.norms
    }
    assert set(plan.norm_factors) == names | {"model.norm"}
    energy = tables["energy"]["model.norm"]
    share = sum(float(energy[i]) for i in plan.hidden) / float(energy.sum())
    assert plan.norm_factors["model.norm"] == pytest.approx(math.sqrt(share * 64 / 48), rel=1e-14)
    assert plan.norm_factors["model.layers.2.input_layernorm"] == 1  # nothing comes in
    assert make_plan(tables, GQA, hidden_size=48, divisor=16, rescale_norms=False).norm_factors == {}
    assert make_plan(tables, GQA, intermediate_size=64).norm_factors == {}


def test_experts():
    config = tiny_config("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[1])
    tables = random_tables(config)
    plan = make_plan(tables, config, num_experts=3, moe_intermediate_size=16, divisor=16)
    for entry in plan.layers:
        if entry.layer == 1:
            assert (entry.mlp, entry.experts) == (tuple(range(80)), None)
            continue
        dropped = int(tables["experts"][entry.layer].argmin())
        assert set(entry.experts) == {0, 1, 2, 3} - {dropped}
        for expert, keep in zip(entry.experts, entry.expert_mlp, strict=True):
            best = tables["expert_mlp"][entry.layer][expert].topk(16).indices.tolist()
            assert list(keep) == sorted(best)
    with pytest.raises(
        ValueError, match=r"a token goes to 2 experts, but only 1 stay.*num_experts_per_tok=1"
    ):
        make_plan(tables, config, num_experts=1)
    one = make_plan(tables, config, num_experts=1, num_experts_per_tok=1)
    assert one.target_config["num_experts_per_tok"] == 1
    with pytest.raises(ValueError, match="num_experts_per_tok must be from 1 to 1 experts, got 2"):
        make_plan(tables, config, num_experts=1, num_experts_per_tok=2)
    # a config that leaves out what transformers defaults to
    raw = {key: value for key, value in config.to_dict().items() if key != "num_experts_per_tok"}
    with pytest.raises(ValueError, match="a token goes to 8 experts"):
        make_plan(tables, raw, num_experts=3)


@pytest.mark.parametrize("written", [True, False])
def test_patterns_of_layers_stay_with_their_layers(written):
    config = tiny_config("gemma2", num_hidden_layers=4).to_dict()
    kinds = config["layer_types"]
    if not written:
        del config["layer_types"]
    plan = plan_of(config, drop_layers=[1])
    assert plan.target_config["layer_types"] == [kinds[0], kinds[2], kinds[3]]


def test_dense_layers_stay_dense():
    config = tiny_config("qwen3_moe", num_hidden_layers=6, mlp_only_layers=[3], decoder_sparse_step=2)
    family = family_of(config)
    plan = plan_of(config, drop_layers=[0, 3])
    kept = [family.is_sparse(config, layer) for layer in (1, 2, 4, 5)]
    assert kept == [True, False, False, True]
    assert [family.is_sparse(plan.target_config, layer) for layer in range(4)] == kept
    assert plan.target_config["mlp_only_layers"] == [1, 2]


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


@given(st.lists(st.integers(0, 99), unique=True))
def test_runs_are_read_as_written(indices):
    assert parse_runs(format_runs(indices)) == tuple(indices)


def test_runs_are_short():
    assert format_runs(range(4096)) == "0-4095"
    assert format_runs([5, 0, 1, 2, 9, 7, 8]) == "5,0-2,9,7-8"
    for text, message in (
        ("1-", "got '1-' in it"),
        ("a", "got 'a' in it"),
        ("-3", "got '-3' in it"),
        ("5-3", "ends before it starts: '5-3'"),
        ("0-99999999999", "longer than any axis"),
        ([1], r"must be a string of runs like \"0-63,70\", got \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_runs(text)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("order", ["original", "importance"])
def test_a_plan_is_read_as_written(name, order, tmp_path):
    config = tiny_config(name)
    plan = plan_of(config, **smaller_sizes(name), divisor=16, order=order)
    path = tmp_path / "plan.json"
    plan.save(path)
    assert PruningPlan.load(path) == plan
    merged = plan_of(config, num_key_value_heads=1, num_attention_heads=2, kv_heads="merge", merge_heads=True)
    merged.save(path)
    assert PruningPlan.load(path) == merged
    assert merged.layers[0].heads.merged
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_saving_keeps_what_was_there_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    path.write_text("before")
    plan = plan_of(GQA, intermediate_size=64)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        plan.save(path)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def edit(data, where, value):
    """Set the field at e.g. "layers.1.mlp"; value may be a function of the old one."""
    *path, last = where.split(".")
    for key in path:
        data = data[int(key) if isinstance(data, list) else key]
    last = int(last) if isinstance(data, list) else last
    data[last] = value(data[last]) if callable(value) else value


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("format", 2, "format must be 1, got 2"),
        ("order", "best", "order must be one of original, importance, got 'best'"),
        ("hidden", "0-46", "hidden must keep 48 of 64, got 47 indices"),
        ("hidden", "17-64", "hidden must hold indices below 64, got 64"),
        ("hidden", "0-46,5", "hidden has 5 twice"),
        ("hidden", "1-47,0", 'hidden must rise where order is "original", got 0 after 47'),
        ("hidden", 48, "hidden must be a string of runs"),
        ("hidden", "0-47x", "hidden must be runs like"),
        ("layers", {}, "layers must be a list"),
        ("layers", lambda old: old[:-1], "layers must keep 5 of 6, got 4 indices"),
        ("layers.1.layer", 0, "layers has 0 twice"),
        ("layers.1.layer", "0", "layers[1].layer must be a int"),
        ("layers.1.mlp", "0-62,96", "layers[1].mlp must hold indices below 96, got 96"),
        (
            "layers.1.heads",
            "0-3,6-9",
            "layers[1].heads must have 2 heads of KV group 1 from position 2 on, got 2",
        ),
        (
            "layers.1.heads",
            "0-7",
            "layers[1].heads must have 2 heads of KV group 1 from position 2 on, got 2",
        ),
        ("layers.1.heads", "1,0,3-4,6-7,9-10", "layers[1].heads must rise"),
        ("layers.1.kv_heads", "0-2", "layers[1].kv_heads must have 4 entries, got 3"),
        ("layers.1.kv_heads", "0-2,4", "layers[1].kv_heads must hold indices below 4, got 4"),
        ("layers.1.kv_heads", ["0", "1", "2", "3,0"], "layers[1].kv_heads must join as many heads"),
        ("layers.1.merged_heads", ["0"], "layers[1].merged_heads[0] must be \"kept,dropped\", got '0'"),
        ("layers.1.merged_heads", ["11,0"], "layers[1].heads cannot merge 0 into 11"),
        ("layers.1.experts", "0-3", "layers[1].experts must not be there"),
        ("layers.1.extra", 1, "layers[1] has an unknown field extra"),
        ("norm_factors.model.norm", 0.0, "norm_factors[model.norm] must be a positive number, got 0.0"),
        ("norm_factors.lm_head", 1.0, "norm_factors has 'lm_head', which is not a norm of a kept layer"),
        ("target_config.hidden_size", 32, "hidden must keep 32 of 64, got 48 indices"),
        ("target_config.head_dim", 4, "target_config must have the head_dim of the source, 8, got 4"),
        ("target_config.model_type", "llama", "target_config.model_type must be 'mistral', got 'llama'"),
        # null is what transformers takes where the key is left out
        ("target_config.hidden_size", None, "hidden must keep 4096 of 64, got 48 indices"),
        ("source_config.hidden_size", [64], "source_config: int() argument must be"),
        ("source_config.model_type", "gpt2", "source_config: config.model_type must be one of"),
        ("parameters.after", 1, "parameters must be {'before'"),
        ("extra", 1, "the plan has an unknown field extra"),
        ("candidates", [{}], "candidates[0] lacks parameters, sizes, spread"),
    ],
)
def test_a_wrong_file_says_where(where, value, message, tmp_path):
    target = dict(hidden_size=48, intermediate_size=64, num_attention_heads=8, drop_layers=[2])
    plan = plan_of(GQA, divisor=16, **target)
    path = tmp_path / "plan.json"
    plan.save(path)
    data = json.loads(path.read_text())
    if where.startswith("norm_factors."):
        data["norm_factors"][where.partition(".")[2]] = value
    else:
        edit(data, where, value) if where not in ("extra", "layers.1.extra") else None
        if where == "extra":
            data["extra"] = value
        if where == "layers.1.extra":
            data["layers"][1]["extra"] = value
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=re.escape(f"{path}: ")) as error:
        PruningPlan.load(path)
    assert message in str(error.value)


def test_merged_heads_that_cannot_be():
    plan = plan_of(GQA, num_attention_heads=8)
    data = plan.to_dict()
    stays, follows = plan.layers[1].heads.query[:2]
    goes, other = (min(set(range(i, i + 3)) - set(plan.layers[1].heads.query)) for i in (0, 3))
    for pairs, message in (
        ([f"{stays},{other}"], f"cannot merge {other} into {stays}: they have different KV heads"),
        ([f"{stays},99"], f"cannot merge 99 into {stays}: they have different KV heads"),
        ([f"{stays},{goes}", f"{follows},{goes}"], "cannot merge a head twice"),
    ):
        data["layers"][1]["merged_heads"] = pairs
        with pytest.raises(ValueError, match=re.escape(f"layers[1].heads {message}")):
            PruningPlan.from_dict(data)
    data["layers"][1]["merged_heads"] = [f"{stays},{goes}"]
    assert PruningPlan.from_dict(data).layers[1].heads.merged == ((stays, goes),)


def test_no_json(tmp_path):
    path = tmp_path / "plan.json"
    for text in ("{", "[]", '{"format": 1}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            PruningPlan.load(path)
