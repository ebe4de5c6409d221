"""What a plan does where it could do otherwise: ties, borders, defaults; what it warns of."""

import math
import random
import re
import warnings

import pytest
import torch

from minitron_kernels.pruning import PruningPlan, find_sizes, make_plan
from minitron_kernels.pruning.families.registry import family_of
from minitron_kernels.pruning.plan.selection import best_block, choose_heads, least_loss, top
from pruning.paper_models import LLAMA
from pruning.plans import GQA, plan_of
from pruning.score_tables import random_tables
from pruning.tiny_models import tiny_config

# ---- ties


@pytest.mark.parametrize("order", ["original", "importance"])
@pytest.mark.parametrize("size", [6, 200])
def test_of_equal_scores_the_lower_numbers_stay(order, size):
    """200 are more than a sort keeps in order by chance."""
    assert top(torch.ones(size, dtype=torch.float64), size // 2, order) == tuple(range(size // 2))
    # three levels: all of the first stay, of the second the lowest numbers
    scores = torch.tensor([(2.0, 0.0, 1.0)[i % 3] for i in range(size)], dtype=torch.float64)
    first, second = list(range(0, size, 3)), list(range(2, size, 3))[: size // 6]
    expected = first + second if order == "importance" else sorted(first + second)
    assert top(scores, len(expected), order) == tuple(expected)


def test_of_equal_heads_and_groups_the_lower_numbers_stay():
    def chosen(scores, after, order="original", **options):
        options = {"merge_kv": False, "merge_query": False, **options}
        return choose_heads(torch.tensor(scores, dtype=torch.float64), (8, 4), after, order=order, **options)

    equal = [1.0] * 8
    for order in ("original", "importance"):
        assert chosen(equal, (4, 4), order).query == (0, 2, 4, 6)
        assert chosen(equal, (4, 2), order).query == (0, 1, 2, 3)
        assert chosen(equal, (4, 2), order).kv == ((0,), (1,))
    # groups are told by the heads that they keep, not by all that they have
    lopsided = [9.0, 0.0, 5.0, 5.0, 1.0, 1.0, 6.0, 0.0]
    assert chosen(lopsided, (2, 2)).kv == ((0,), (3,))
    assert chosen(lopsided, (4, 2)).kv == ((0,), (1,))
    assert chosen(lopsided, (2, 2), "importance").query == (0, 6)
    assert chosen([5.0, 5.0, 9.0, 0.0, 1.0, 1.0, 6.0, 0.0], (2, 2), "importance").kv == ((1,), (3,))
    merged = chosen([3.0, 3.0, 3.0, 1.0, *[0.0] * 4], (4, 2), merge_kv=True, merge_query=True)
    assert merged.query == (0, 1, 4, 5) and merged.merged == ((0, 3), (1, 2), (4, 7), (5, 6))


def test_of_equal_blocks_the_first_goes():
    assert best_block(torch.ones(6, dtype=torch.float64), 2) == 0
    assert best_block(torch.tensor([5.0, 1.0, 1.0, 5.0, 1.0, 1.0], dtype=torch.float64), 2) == 1
    # the same three layers in other orders: their sums are equal, however they are rounded
    tenths = torch.tensor([0.3, 0.2, 0.1, 9.0, 0.1, 0.2, 0.3], dtype=torch.float64)
    assert best_block(tenths, 3) == 0 and best_block(tenths.flip(0), 3) == 0
    assert best_block(torch.tensor([2.0, 1.0], dtype=torch.float64), 1) == 1
    assert best_block(torch.tensor([2.0, 1.0], dtype=torch.float64), 2) == 0


def test_of_equal_losses_the_first_block_goes():
    assert least_loss({4: 1.0, 2: 1.0, 3: 2.0}, 8, 3) == 2
    assert least_loss([3.0, 1.0, 1.0], 8, 3) == 1
    assert least_loss({5: 1.0}, 8, 3) == 5  # the last block
    for start in (6, -1, True, 1.0):
        with pytest.raises(ValueError, match="first dropped layers from 0 to 5"):
            least_loss({start: 1.0}, 8, 3)


def test_experts_that_are_equal(order="original"):
    config = tiny_config("qwen3_moe")
    tables = random_tables(config)
    tables["experts"] = {layer: torch.ones(4) for layer in tables["experts"]}
    tables["expert_mlp"] = {layer: torch.ones(4, 24) for layer in tables["expert_mlp"]}
    plan = make_plan(tables, config, num_experts=2, moe_intermediate_size=16, divisor=16)
    assert plan.layers[0].experts == (0, 1)
    assert plan.layers[0].expert_mlp == (tuple(range(16)),) * 2


def test_neurons_go_with_their_experts_score():
    """Each kept expert has its own row of the table, in order of importance as well."""
    config = tiny_config("qwen3_moe")
    tables = random_tables(config)
    plan = make_plan(tables, config, num_experts=3, moe_intermediate_size=8, divisor=8, order="importance")
    for entry in plan.layers:
        if entry.experts is None:
            continue
        ranked = tables["experts"][entry.layer].argsort(descending=True)[:3].tolist()
        assert list(entry.experts) == ranked
        for expert, keep in zip(entry.experts, entry.expert_mlp, strict=True):
            best = tables["expert_mlp"][entry.layer][expert].argsort(descending=True)[:8]
            assert list(keep) == best.tolist()


# ---- borders


def test_measured_losses_tell_the_block_where_the_budget_chose_the_depth():
    tables = random_tables(GQA)
    target = dict(params=100_000, search=["num_hidden_layers"])
    by_score = make_plan(tables, GQA, **target)
    count = 6 - len(by_score.layers)
    assert 0 < count < 6
    for start in range(6 - count + 1):
        losses = {other: 2.0 for other in range(6 - count + 1)} | {start: 1.0}
        plan = make_plan(tables, GQA, block_losses=losses, **target)
        assert [entry.layer for entry in plan.layers] == [*range(start), *range(start + count, 6)]
        assert plan.made_with["layers_by"] == "loss"
    with pytest.raises(ValueError, match="block_losses tell which layers go, but all stay: give num_hidden"):
        make_plan(tables, GQA, block_losses=[1.0], hidden_size=64)


def test_as_many_experts_as_serve_a_token():
    config = tiny_config("mixtral")
    tables = random_tables(config)
    plan = make_plan(tables, config, num_local_experts=2)  # just as many
    assert plan.target_config["num_experts_per_tok"] == 2
    with pytest.raises(ValueError, match="a token goes to 2 experts, but only 1 stay"):
        make_plan(tables, config, num_local_experts=1)
    assert make_plan(tables, config, num_experts_per_tok=4).target_config["num_experts_per_tok"] == 4
    for wrong in (0, 5, True):
        with pytest.raises(
            ValueError, match=rf"num_experts_per_tok must be from 1 to 4 experts, got {wrong}"
        ):
            make_plan(tables, config, num_experts_per_tok=wrong)
    assert {c.sizes["num_local_experts"] for c in find_sizes(config, 1e9, search=["num_local_experts"])} == {
        2,
        3,
        4,
    }


def test_sizes_that_are_searched_go_down_to_a_quarter():
    config = dict(GQA, hidden_size=64, intermediate_size=96)
    found = find_sizes(config, 1e9, divisor=8, limit=10**6)
    assert {c.sizes["hidden_size"] for c in found} == set(range(16, 65, 8))
    assert {c.sizes["intermediate_size"] for c in found} == set(range(24, 97, 8))
    # a source that is no multiple of the divisor: its own size counts as one
    odd = dict(GQA, intermediate_size=90)
    assert {c.sizes["intermediate_size"] for c in find_sizes(odd, 1e9, divisor=8, limit=10**6)} == {
        *range(24, 89, 8),
        90,
    }
    # the budget itself still fits
    exact = found[len(found) // 2].parameters
    assert find_sizes(config, exact, divisor=8)[0].parameters <= exact
    assert exact in {c.parameters for c in find_sizes(config, exact, divisor=8, limit=10**6)}
    assert exact not in {c.parameters for c in find_sizes(config, exact - 1, divisor=8, limit=10**6)}


def test_the_best_candidates_shrink_most_alike():
    """At least 97 % of the largest that fits, by spread; then the others, the largest first."""
    found = find_sizes(LLAMA, 5e9, divisor=128, limit=10**6)
    largest = max(c.parameters for c in found)
    near = [c for c in found if c.parameters >= 0.97 * largest]
    assert [c.spread for c in near] == sorted(c.spread for c in near)
    assert found[: len(near)] == near
    rest = found[len(near) :]
    assert [c.parameters for c in rest] == sorted((c.parameters for c in rest), reverse=True)
    for candidate in random.Random(0).sample(found, 20):
        shares = [candidate.sizes[name] / LLAMA[name] for name in ("hidden_size", "intermediate_size")]
        assert candidate.spread == pytest.approx(max(shares) / min(shares))


def test_ratios_are_rounded_to_the_nearest_multiple():
    for ratio, divisor, expected in (
        (0.5, 64, 64),
        (0.01, 64, 64),
        (0.74, 8, 72),
        (0.8, 8, 80),
        (1.0, 50, 96),
    ):
        config = dict(GQA, intermediate_size=96)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = plan_of(config, ratio={"intermediate_size": ratio}, divisor=divisor)
        assert plan.target_config["intermediate_size"] == expected, ratio


def test_a_ratio_never_makes_more():
    plan = plan_of(dict(GQA, intermediate_size=100), ratio={"intermediate_size": 0.99}, hidden_size=64)
    assert plan.target_config["intermediate_size"] == 100  # not 128, the nearest multiple


def test_kv_heads_that_are_told_do_not_follow():
    every_head_its_own = dict(GQA, num_key_value_heads=12)
    with pytest.raises(
        ValueError, match="num_key_value_heads 6 would serve 2 query heads each, but a KV group"
    ):
        plan_of(every_head_its_own, num_key_value_heads=6)
    merged = plan_of(every_head_its_own, num_key_value_heads=6, kv_heads="merge").target_config
    assert (merged["num_attention_heads"], merged["num_key_value_heads"]) == (12, 6)


def test_layer_lists_follow_the_layers():
    config = tiny_config("qwen3_moe", num_hidden_layers=6, mlp_only_layers=[1, 4])
    plan = plan_of(config, drop_layers=[0, 2])
    assert plan.target_config["mlp_only_layers"] == [0, 2]
    assert [entry.experts is None for entry in plan.layers] == [True, False, True, False]


def test_index_keys_are_numbered_anew(monkeypatch):
    """A config that lists layers by their index: those that stay, by their new one."""
    import dataclasses

    from minitron_kernels.pruning.families import registry

    mistral = family_of({"model_type": "mistral"})
    changed = dataclasses.replace(mistral, layer_index_keys=("global_layers",))
    monkeypatch.setitem(registry._FAMILIES, "mistral", changed)
    config = dict(GQA, global_layers=[0, 3, 5])
    assert plan_of(config, drop_layers=[1, 3]).target_config["global_layers"] == [0, 3]
    assert plan_of(config, drop_layers=[5]).target_config["global_layers"] == [0, 3]
    assert plan_of(config, hidden_size=64, intermediate_size=64).target_config["global_layers"] == [0, 3, 5]


def test_merging_needs_half_of_the_heads():
    config = dict(GQA, num_attention_heads=16)  # four to a group
    assert plan_of(config, num_attention_heads=8, merge_heads=True).layers[0].heads.merged  # just half
    with pytest.raises(ValueError, match="at least half of the 4 query heads of a KV group to stay, got 1"):
        plan_of(config, num_attention_heads=4, merge_heads=True)
    # where KV heads are merged, of the heads of all that become one
    assert plan_of(config, num_attention_heads=8, num_key_value_heads=2, kv_heads="merge", merge_heads=True)


def test_norm_factors_where_little_stays():
    tables = random_tables(GQA)
    energy = torch.zeros(64, dtype=torch.float64)
    tables["hidden"] = torch.arange(64, 0, -1, dtype=torch.float64)  # the first channels stay
    energy[40:] = 1.0  # all that comes in goes
    tables["energy"]["model.norm"] = energy
    tables["energy"]["model.layers.0.input_layernorm"] = energy.flip(0)  # all of it stays
    plan = make_plan(tables, GQA, hidden_size=32, divisor=32, loadable=False)
    assert plan.norm_factors["model.norm"] == 1
    assert plan.norm_factors["model.layers.0.input_layernorm"] == pytest.approx(math.sqrt(24 / 24 * 64 / 32))


# ---- what is said


def test_scores_that_are_not_finite_are_named():
    tables = random_tables(GQA)
    for axis, place, where in (
        ("mlp", (3, 7), "[mlp][3] must be finite, got nan at [7], the first of 2 such"),
        ("heads", (2, 5), "[heads][2] must be finite, got nan at [5]"),
        ("hidden", (None, 9), "[hidden] must be finite, got nan at [9]"),
    ):
        layer, index = place
        wrong = {
            key: value.clone() if torch.is_tensor(value) else dict(value) for key, value in tables.items()
        }
        table = wrong[axis] if layer is None else wrong[axis][layer].clone()
        table[index] = math.nan
        if axis == "mlp":
            table[80] = math.inf
        if layer is not None:
            wrong[axis][layer] = table
        target = dict(hidden_size=32, intermediate_size=64, num_attention_heads=8, divisor=32)
        with pytest.raises(ValueError, match=re.escape(f"scores{where}")):
            make_plan(wrong, GQA, **target)
    config = tiny_config("qwen3_moe")
    tables = random_tables(config)
    tables["expert_mlp"][2][1, 3] = -math.inf
    with pytest.raises(
        ValueError, match=re.escape("scores[expert_mlp][2] must be finite, got -inf at [1, 3]")
    ):
        make_plan(tables, config, moe_intermediate_size=16, divisor=16)


def test_a_plan_that_cuts_nothing_says_so():
    with pytest.warns(UserWarning, match=r"the plan keeps everything: give sizes \(hidden_size, .*params="):
        plan = make_plan({}, GQA)
    assert "nothing is cut" in plan.summary()
    whole = family_of(GQA).count_parameters(GQA)
    for params in (whole, 1e12):
        given = f"{int(params):,}"
        message = f"params must be less than the {whole:,} of the whole model, got {given}: nothing would be"
        with pytest.raises(ValueError, match=re.escape(message)):
            plan_of(GQA, params=params)
    assert plan_of(GQA, params=whole - 1, divisor=8).parameters_after < whole
    # a budget that is met by what is told otherwise
    assert plan_of(GQA, params=1e12, num_attention_heads=8).parameters_after < whole
    assert plan_of(GQA, params=1e12, drop_layers=[0]).parameters_after < whole
    for params in (math.nan, 0, -1):
        with pytest.raises(ValueError, match="params must be above 0"):
            find_sizes(GQA, params)


def test_a_summary_warns_of_a_head_dim_that_no_longer_follows():
    config = dict(LLAMA, num_hidden_layers=2)
    warning = "32 heads of 128 are no longer hidden_size 3072: runtimes that take head_dim"
    assert warning in plan_of(config, hidden_size=3072).summary()
    fewer = plan_of(config, num_attention_heads=16)
    assert "16 heads of 128 are no longer hidden_size 4096" in fewer.summary()
    assert "no longer" not in plan_of(config, hidden_size=3072, num_attention_heads=24).summary()
    assert "no longer" not in plan_of(config, intermediate_size=1024).summary()
    # where it did not follow before, nothing is new
    assert "no longer" not in plan_of(dict(config, head_dim=64), hidden_size=3072).summary()


def test_a_summary_says_how_layers_were_chosen():
    warning = "warning: layers were chosen by importance"
    assert warning in plan_of(GQA, num_hidden_layers=4).summary()
    assert warning not in plan_of(GQA, num_hidden_layers=4, block_losses=[1.0, 2.0]).summary()
    named = plan_of(GQA, drop_layers=[2, 3, 5])
    assert warning not in named.summary() and "layers dropped: 2-3,5" in named.summary()
    assert "layers dropped" not in plan_of(GQA, intermediate_size=64).summary()


def test_repr_is_a_line():
    plan = plan_of(LLAMA, hidden_size=3072, num_hidden_layers=16)
    assert repr(plan) == (
        "<PruningPlan for llama: hidden_size 4096 -> 3072, num_hidden_layers 32 -> 16; "
        f"8,030,261,248 -> {plan.parameters_after:,} parameters>"
    )


def test_a_file_that_changes_a_constant_axis(tmp_path):
    """Sizes that are never pruned are the source's, of every axis that the family has."""
    plan = plan_of(GQA, intermediate_size=64)
    data = plan.to_dict()
    for key, axis in (("vocab_size", "vocab"), ("head_dim", "head_dim")):
        changed = data | {"target_config": data["target_config"] | {key: 4}}
        with pytest.raises(ValueError, match=f"target_config must have the {axis} of the source, "):
            PruningPlan.from_dict(changed)
