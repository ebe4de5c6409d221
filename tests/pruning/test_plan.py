"""Plans: what is chosen by which scores."""

import math

import numpy
import pytest
import torch

from minitron_kernels.pruning import make_plan
from minitron_kernels.pruning.families.registry import family_of
from pruning.plans import GQA, plan_of
from pruning.score_tables import random_tables
from pruning.tiny_models import tiny_config


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
        (dict(drop_layers=[6]), "drop_layers must name some of the layers 0 to 5"),
        (dict(drop_layers=[1, 1]), "drop_layers must name some of the layers 0 to 5"),
        (dict(drop_layers=[1], block_losses=[1.0]), "block_losses must be None"),
        (dict(num_hidden_layers=4, block_losses={5: 1.0}), "first dropped layers from 0 to 4, got 5"),
        (dict(num_hidden_layers=4, block_losses={1: math.nan}), r"block_losses\[1\] must be finite, got nan"),
        (dict(num_hidden_layers=4, block_losses={}), "at least one loss"),
        (dict(num_hidden_layers=0), "num_hidden_layers must be from 1 to 6, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dropped(**target)


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
