"""Models with layers of several kinds: what a plan keeps of state spaces, and what their configs say."""

import json

import pytest
import torch

from minitron_kernels.pruning import PruningPlan, make_plan, prune_model
from minitron_kernels.pruning.checkpoint.prune import target_config
from minitron_kernels.pruning.families.configs import full_config
from minitron_kernels.pruning.families.registry import family_of
from pruning.family_configs import CASES
from pruning.family_configs.hybrid import MAMBA
from pruning.score_tables import random_tables
from pruning.threads import one_thread  # noqa: F401  (autouse: of every test here)
from pruning.tiny_models import random_model

LIST = ["mamba", "attention", "mamba"]


def _bamba(**changes):
    return CASES["bamba"].make_config(**changes)


def _scores(heads=8, dim=12):
    """Of 2 groups of 4 heads: the second has the better heads, and channels 1 and 3 are the best in sum."""
    table = torch.full((heads, dim), 0.25, dtype=torch.float64)
    table[:, 1] += 2
    table[:, 3] += 1
    table[0, 0] = 2  # the best of one head alone, which is less than others have in sum
    table[[1, 2, 5, 7]] += 0.5
    table[4:] *= 10
    return table.flatten()


def test_heads_are_ranked_in_their_group_by_the_channels_that_stay():
    config = _bamba()
    tables = {"mamba": dict.fromkeys((0, 1), _scores())}
    assert make_plan(tables, config, mamba_n_heads=4).layers[0].mamba_heads == (1, 2, 5, 7)
    plan = make_plan(tables, config, mamba_n_heads=4, mamba_d_head=2, loadable=False)
    first, _, last = plan.layers
    assert (first.mamba_heads, first.mamba_dim) == ((1, 2, 5, 7), (1, 3))
    assert first.heads is None and last.mamba_heads is None and len(last.heads.query) == 4
    assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_channels_that_go_do_not_count_for_heads():
    table = torch.ones(8, 12, dtype=torch.float64)
    table[:, :2] = 5
    table[[1, 2, 5, 6], :2] = 6
    table[[0, 3, 4, 7], 2] = 9  # the third channel of all: √(4 · 81 + 4) is less than √(8 · 25)
    table[[0, 3, 4, 7], 2:] = 4.9
    tables = {"mamba": dict.fromkeys((0, 1), table.flatten())}
    plan = make_plan(tables, _bamba(), mamba_n_heads=4, mamba_d_head=2, loadable=False)
    assert (plan.layers[0].mamba_heads, plan.layers[0].mamba_dim) == ((1, 2, 5, 6), (0, 1))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"mamba_n_heads": 5}, "multiple of its 2 groups"),
        ({"mamba_n_heads": 6}, "no multiple of hidden_size 48"),
        ({"mamba_n_heads": 9}, "mamba_n_heads must be from 1 to 8"),
        ({"mamba_n_heads": 4, "mamba_d_head": 6}, "no multiple of hidden_size 48"),
    ],
)
def test_impossible_sizes_of_a_state_space_are_refused(sizes, said):
    tables = {"mamba": dict.fromkeys((0, 1), _scores())}
    with pytest.raises(ValueError, match=said):
        make_plan(tables, _bamba(), **sizes)


def test_a_plan_with_a_head_of_another_group_is_refused():
    plan = make_plan({"mamba": dict.fromkeys((0, 1), _scores())}, _bamba(), mamba_n_heads=4)
    wrong = plan.to_dict()
    wrong["layers"][0]["mamba_heads"] = "0-2,4"
    with pytest.raises(ValueError, match=r"mamba_heads must have 2 heads of group 1 at 2, got 2"):
        PruningPlan.from_dict(wrong)
    del wrong["layers"][0]["mamba_heads"]
    with pytest.raises(ValueError, match="mamba_heads must be there"):
        PruningPlan.from_dict(wrong)


def test_the_expansion_follows_from_what_stays():
    config = _bamba(mamba_n_heads=8, mamba_d_head=12, hidden_size=48)
    plan = make_plan({"mamba": dict.fromkeys((0, 1), _scores())}, config, mamba_n_heads=4)
    assert plan.target_config["mamba_expand"] == 1


def test_configs_of_checkpoints_are_rewritten_where_they_say_a_thing_twice():
    case = CASES["nemotron_h"]
    config = {**case.make_config().to_dict(), "hybrid_override_pattern": "M-*E-"}
    del config["layers_block_type"]
    plan = make_plan({}, config, drop_layers=[1, 3])
    new = target_config(config, plan)
    assert (new["hybrid_override_pattern"], new["num_hidden_layers"]) == ("M*-", 3)
    assert new["layers_block_type"] == ["linear_attention", "full_attention", "mlp"]

    config = CASES["lfm2"].make_config().to_dict()
    config |= {"block_ff_dim": 126, "conv_dim": 48, "tie_embedding": False}
    del config["intermediate_size"]
    scores = {"mlp": {layer: torch.rand(80) for layer in range(3)}}
    plan = make_plan(scores, config, intermediate_size=64)
    new = target_config(config, plan)
    assert (new["block_ff_dim"], new["intermediate_size"], new["block_auto_adjust_ff_dim"]) == (64, 64, False)
    assert family_of(new).sizes(new)["mlp"] == 64


def test_older_names_of_layers_are_read():
    config = {"model_type": "granitemoehybrid", **MAMBA, "hidden_size": 48, "num_hidden_layers": 3}
    config |= {"layer_types": LIST, "num_attention_heads": 4, "num_local_experts": 0}
    family = family_of(config)
    assert ["heads" in family.layer_axes(config, layer) for layer in range(3)] == [False, True, False]
    assert family.layer_axes(config, 0) >= {"mamba_heads", "mamba_dim", "mlp"}
    assert "experts" not in family.layer_axes(config, 0)
    plan = make_plan({}, config, drop_layers=[0])
    assert plan.target_config["layer_types"] == ["full_attention", "linear_attention"]


def test_other_names_of_lists_in_config_json_are_rewritten():
    """transformers takes the list of layers by two names: the one that stayed would be of the whole model."""
    nemotron = CASES["nemotron_h"].make_config().to_dict()
    nemotron["layer_types"] = nemotron.pop("layers_block_type")
    granite = CASES["granitemoehybrid"].make_config().to_dict()
    granite["layers_block_type"] = granite.pop("layer_types")
    for config, names in ((nemotron, "layer_types"), (granite, "layers_block_type")):
        plan = make_plan({}, config, drop_layers=[1])
        new = target_config(config, plan)
        kinds = config[names][:1] + config[names][2:]
        assert new["layer_types"] == new["layers_block_type"] == kinds
        assert full_config(new).num_hidden_layers == len(kinds) == new["num_hidden_layers"]


def test_sizes_of_state_spaces_that_are_not_there_follow_hidden_size():
    """Granite 4.0 Micro has attention only, but its class compares them: 2 · 48 is no multiple of 40."""
    config = CASES["granitemoehybrid"].make_config(layer_types=["full_attention"] * 3, num_local_experts=0)
    model = random_model(config)
    plan = make_plan(random_tables(config), config, hidden_size=40, divisor=8)
    smaller = prune_model(model, plan)
    keys = ("hidden_size", "mamba_expand", "mamba_n_heads", "mamba_d_head")
    assert [getattr(smaller.config, key) for key in keys] == [40, 1, 1, 40]
    assert "approximate" not in plan.summary() and "mamba" not in plan.summary()
    full_config(plan.target_config).validate_architecture()
    whole = make_plan(random_tables(config), config, drop_layers=[1]).target_config
    assert [whole[key] for key in keys] == [48, 2, 8, 12]
    mixed = CASES["granitemoehybrid"].make_config()
    with pytest.raises(ValueError, match="no multiple of hidden_size 40"):
        make_plan(random_tables(mixed), mixed, hidden_size=40, divisor=8)


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "nemotron_h"])
def test_one_expert_alone_is_refused_where_the_router_adds_up_two(name):
    config = CASES[name].make_config()
    tables = {"experts": {layer: torch.arange(4.0) for layer in range(5)}}
    with pytest.raises(ValueError, match="two best experts, but n_routed_experts is 1"):
        make_plan(tables, config, n_routed_experts=1, num_experts_per_tok=1)
    make_plan(tables, config, n_routed_experts=2, num_experts_per_tok=1)
