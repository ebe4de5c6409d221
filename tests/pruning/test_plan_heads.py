"""Plans: which heads stay, which are merged."""

import re

import pytest
import torch

from minitron_kernels.pruning import make_plan
from minitron_kernels.pruning.plan.selection import choose_heads
from pruning.plans import GQA, plan_of
from pruning.score_tables import random_tables


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
