"""Gated delta nets and gated attention: which heads stay, and what becomes of gates where heads merge."""

import json

import pytest
import torch

from minitron_kernels.pruning import Cuts, PruningPlan, count_usage, find_sizes, make_plan
from pruning.family_configs import CASES
from pruning.score_tables import random_tables
from pruning.threads import one_thread  # noqa: F401  (autouse: of every test here)

# of 4 key heads with 2 value heads each
SCORES = torch.tensor([1.0, 5.0, 4.0, 4.0, 9.0, 0.5, 2.0, 3.0], dtype=torch.float64)
TABLES = {"delta": dict.fromkeys((0, 1), SCORES)}


def _config(**changes):
    return CASES["qwen3_5_text"].make_config(**changes)


@pytest.mark.parametrize(
    ("values", "keys", "order", "kept"),
    [
        (4, None, "original", ((1, 2, 4, 7), (0, 1, 2, 3))),
        (4, 2, "original", ((2, 3, 4, 5), (1, 2))),  # 9 + 0.5 and 4 + 4
        (4, 2, "importance", ((4, 5, 2, 3), (2, 1))),
        (2, 2, "original", ((1, 4), (0, 2))),
        (6, 3, "original", ((0, 1, 2, 3, 4, 5), (0, 1, 2))),
        (1, 1, "original", ((4,), (2,))),
    ],
)
def test_the_best_value_heads_of_each_key_head_stay(values, keys, order, kept):
    sizes = {"linear_num_value_heads": values} | ({} if keys is None else {"linear_num_key_heads": keys})
    plan = make_plan(TABLES, _config(), order=order, **sizes)
    for entry in plan.layers[:2]:
        assert (entry.delta_heads, entry.delta_keys) == kept and entry.heads is None
    last = plan.layers[2]
    assert last.delta_heads is last.delta_keys is None and last.heads is not None
    assert plan.target_config["linear_num_value_heads"] == values
    assert plan.target_config["linear_num_key_heads"] == len(kept[1])
    assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_key_heads_follow_where_each_value_head_has_its_own():
    config = _config(linear_num_key_heads=8)
    plan = make_plan(TABLES, config, linear_num_value_heads=3)
    assert plan.layers[0].delta_heads == plan.layers[0].delta_keys == (1, 2, 4)  # of equal ones the first
    options = dict(search=["linear_num_value_heads"], limit=100)
    sizes = [found.sizes["linear_num_value_heads"] for found in find_sizes(config, 1e9, **options)]
    assert sorted(sizes) == list(range(2, 9))
    sizes = [found.sizes["linear_num_value_heads"] for found in find_sizes(_config(), 1e9, **options)]
    assert sorted(sizes) == [4, 8]  # for 4 key heads


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"linear_num_value_heads": 6}, "multiple of linear_num_key_heads, 4, got 6"),
        ({"linear_num_key_heads": 2}, "would serve 4 value heads each, but a key head has 2: keep at most 4"),
        ({"linear_num_value_heads": 9}, "linear_num_value_heads must be from 1 to 8, got 9"),
        ({"linear_key_head_dim": 4}, "linear_key_head_dim cannot be pruned in this qwen3_5_text: heads of a"),
        ({"linear_num_value_heads": 4, "linear_num_key_heads": 3}, "multiple of linear_num_key_heads, 3"),
    ],
)
def test_impossible_heads_of_a_delta_net_are_refused(sizes, said):
    with pytest.raises(ValueError, match=said):
        make_plan(TABLES, _config(), **sizes)


def test_scores_of_value_heads_are_needed_and_checked():
    with pytest.raises(ValueError, match="must have the table 'delta' to prune a gated delta net"):
        make_plan({}, _config(), linear_num_value_heads=4)
    with pytest.raises(ValueError, match=r"scores\[delta\]\[0\] must have the shape \(8,\), got \(4,\)"):
        make_plan({"delta": {0: SCORES[:4]}}, _config(), linear_num_value_heads=4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"delta_heads": "0-1,4,7"}, "delta_heads must have 1 heads of group 1 at 1, got 1"),
        ({"delta_heads": "1-3,7"}, "delta_heads must have 1 heads of group 2 at 2, got 3"),
        ({"delta_keys": "0-2"}, "delta_keys must keep 4 of 4, got 3 indices"),
        ({"delta_keys": None}, "delta_keys must be there"),
    ],
)
def test_a_plan_whose_heads_do_not_go_together_is_refused(changes, said):
    written = make_plan(TABLES, _config(), linear_num_value_heads=4).to_dict()
    entry = written["layers"][1]
    assert (entry["delta_heads"], entry["delta_keys"]) == ("1-2,4,7", "0-3")
    entry.update({key: value for key, value in changes.items() if value is not None})
    for key, value in changes.items():
        if value is None:
            del entry[key]
    with pytest.raises(ValueError, match=said):
        PruningPlan.from_dict(written)


def test_gates_stay_those_of_the_kept_heads_where_queries_merge():
    """q_proj has, of each head, its query and then its gate: 2 · gate - another gate would be of no head."""
    config = _config(num_attention_heads=8, num_key_value_heads=2)
    plan = make_plan(random_tables(config), config, num_attention_heads=4, merge_heads=True)
    entry = plan.layers[2]
    partner = dict(entry.heads.merged)
    assert len(partner) == 4
    generator = torch.Generator().manual_seed(1)
    for kind, shape in (("weight", (256, 48)), ("bias", (256,))):
        source = torch.randn(shape, dtype=torch.float64, generator=generator)
        heads = source.view(8, 2, 16, -1)
        got = Cuts(plan).of(f"model.layers.2.self_attn.q_proj.{kind}").apply(source).view(4, 2, 16, -1)
        for new, kept in enumerate(entry.heads.query):
            assert torch.equal(got[new, 1], heads[kept, 1])
            assert torch.equal(got[new, 0], 2 * heads[kept, 0] - heads[partner[kept], 0])


def test_states_do_not_grow_with_the_tokens_but_with_the_sequences():
    config = _config()
    state = 2 * (4 * 8 * 6 * 5 + 2 * (2 * 24 + 40) * 4)  # two layers: in float32, and the last inputs in bf16
    token = 2 * 2 * 2 * 16  # of the one layer of attention: 2 heads of 16, keys and values, in bf16
    weights = count_usage(config).memory_bytes
    for tokens, sequences in ((1, 1), (100, 1), (100, 7)):
        used = count_usage(config, kv_tokens=tokens, kv_sequences=sequences).memory_bytes
        assert used == weights + tokens * token + sequences * state
    with pytest.raises(ValueError, match=r"kv_sequences must be at most kv_tokens, 3, .* got 4"):
        count_usage(config, kv_tokens=3, kv_sequences=4)
    with pytest.raises(ValueError, match="kv_sequences must be at least 1, got 0"):
        count_usage(config, kv_tokens=3, kv_sequences=0)
    with pytest.raises(ValueError, match="kv_sequences must be at most kv_tokens, 0"):
        count_usage(config, kv_sequences=2)
    with pytest.raises(ValueError, match="belong to a budget"):
        make_plan(TABLES, config, linear_num_value_heads=4, kv_tokens=9, kv_sequences=2)
    without = count_usage(config, kv_tokens=100, kv_sequences=7).memory_bytes - 2 * 80 * 48
    found = find_sizes(config, memory_bytes=without, kv_tokens=100, kv_sequences=7, divisor=8)
    assert all(candidate.memory_bytes <= without for candidate in found)
    smaller = config.to_dict() | found[0].sizes
    assert count_usage(smaller, kv_tokens=100, kv_sequences=7).memory_bytes == found[0].memory_bytes
