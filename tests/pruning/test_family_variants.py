"""Forms of a family that its config chooses, beside the one of test_every_family; and what they refuse."""

import dataclasses
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_kernels.pruning import PruningPlan, find_sizes, make_plan, prune_checkpoint, prune_model
from minitron_kernels.pruning.families.registry import family_of
from pruning import family_checks as checks
from pruning.family_case import DROPPED_LAYER
from pruning.family_configs import CASES
from pruning.score_tables import random_tables
from pruning.threads import one_thread  # noqa: F401  (autouse: of every test here)
from pruning.tiny_models import random_model
from pruning.usage_checks import check_usage

ONE_NORM = ("input_layernorm",)
TWO_NORMS = (*ONE_NORM, "post_attention_layernorm")
OLD_FALCON = {"new_decoder_architecture": False, "num_kv_heads": None, "bias": False}
NARROW = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48}
VARIANTS = {
    "Falcon 7B: one key for all queries": ("falcon", OLD_FALCON, NARROW, ONE_NORM),
    "Falcon RW: ALiBi": (
        "falcon",
        {**OLD_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
        {"intermediate_size": 48},
        TWO_NORMS,
    ),
    "a key for each query": ("gpt_bigcode", {"multi_query": False}, NARROW, None),
    "beside each other": (
        "stablelm",
        {"qk_layernorm": False, "use_parallel_residual": True},
        NARROW,
        ONE_NORM,
    ),
    "no biases": ("opt", {"enable_bias": False}, NARROW, None),
    "queries without a latent": (
        "deepseek_v2",
        {"attention_bias": True, "mlp_bias": True},
        {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "n_routed_experts": 3},
        None,
    ),
}


def variant(name):
    model_type, changes, target, norms = VARIANTS[name]
    case = CASES[model_type]
    places = case.places if norms is None else dataclasses.replace(case.places, norms=norms)
    return dataclasses.replace(case, config={**case.config, **changes}, places=places), target


def plan_of(config, **target):
    return make_plan(random_tables(config), config, divisor=8, **target)


@pytest.fixture(scope="module")
def fresh():
    process = checks.FreshProcess()
    yield process
    process.close()


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name, fresh, tmp_path):
    case, target = variant(name)
    config = case.make_config()
    if name == "queries without a latent":
        config.q_lora_rank = None  # make_config() takes None for "as the class has it"
    model = random_model(config)
    checks.check_table(case, model)
    plan = plan_of(model.config, drop_layers=[DROPPED_LAYER], **target)
    checks.check_cut(case, model, plan, tmp_path, fresh)
    checks.check_masked(case, model, plan)


def test_gemma_4_whose_last_layers_take_their_keys_from_others(fresh, tmp_path):
    """As E2B and E4B, whose last layers have MLPs twice as wide, and nothing in a cache."""
    kinds = ["sliding_attention", "full_attention"] * 2
    shared = {"layer_types": kinds, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
    case = CASES["gemma4_text"]
    case = dataclasses.replace(case, config={**case.config, **shared, "use_double_wide_mlp": True})
    model = random_model(case.make_config())
    assert model.model.layers[3].mlp.up_proj.out_features == 160
    checks.check_table(case, model)
    check_usage(model)
    plan = plan_of(model.config, hidden_size=32)
    checks.check_cut(case, model, plan, tmp_path, fresh)
    checks.check_masked(case, model, plan)


@pytest.mark.parametrize(
    ("name", "changes", "target", "said"),
    [
        ("gpt2", {}, {"n_embd": 24}, "n_embd must be 12 for each of n_head.*got 24 for 4: cut both alike"),
        ("gpt2", {}, {"n_embd": 24, "hidden_size": 24}, "size of hidden a second time"),
        ("gpt2", {"add_cross_attention": True}, {"n_inner": 48}, "without cross-attention"),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            {"drop_layers": [0]},
            "divided by a layer's number",
        ),
        ("falcon", {}, {"hidden_size": 24}, "hidden_size must be 12 for each of num_attention_heads"),
        ("falcon", {"new_decoder_architecture": False}, {"num_kv_heads": 1}, "there is one, or one for each"),
        ("falcon", {"alibi": True}, {"num_attention_heads": 2}, "ALiBi gives each head a slope"),
        ("bloom", {}, {"num_attention_heads": 2}, "ALiBi gives each head a slope"),
        ("opt", {"word_embed_proj_dim": 20}, {"ffn_dim": 48}, "word_embed_proj_dim 20, not 48"),
        ("opt", {"do_layer_norm_before": False}, {"ffn_dim": 48}, "do_layer_norm_before False, not True"),
        (
            "stablelm",
            {},
            {"num_key_value_heads": 1, "kv_heads": "merge"},
            r"layers\[0\].kv_heads cannot be joined: each has a norm of its own",
        ),
    ],
)
def test_refused(name, changes, target, said):
    config = CASES[name].make_config(**changes)
    tables = random_tables(CASES[name].make_config())
    with pytest.raises(ValueError, match=said):
        make_plan(tables, config, divisor=8, **target)


def test_keys_are_merged_where_they_have_no_norms():
    config = CASES["stablelm"].make_config(qk_layernorm=False)
    assert plan_of(config, num_key_value_heads=1, kv_heads="merge").layers[0].heads.kv == ((0, 1),)


def test_sizes_for_a_budget_keep_the_size_of_heads():
    config = CASES["gpt2"].make_config()
    count = family_of(config).count_parameters(config)
    found = find_sizes(config, 0.9 * count, search=["n_embd", "n_head"], divisor=4)
    assert {(one.sizes["n_embd"], one.sizes["n_head"]) for one in found} == {(12, 1), (24, 2), (36, 3)}
    assert "n_inner" in find_sizes(config, 0.9 * count, search=["n_inner"], divisor=4)[0].sizes


def test_heads_of_conv1d_cannot_be_joined():
    """No option of make_plan() joins them; a plan on disk could."""
    model = random_model(CASES["gpt2"].make_config())
    data = json.loads(json.dumps(plan_of(model.config, **NARROW).to_dict()))
    for layer in data["layers"]:
        layer["heads"], layer["kv_heads"] = "0,2", ["0-1", "2-3"]
    with pytest.raises(ValueError, match=r"c_attn.weight is \[in, out\]: its heads cannot be joined"):
        prune_model(model, PruningPlan.from_dict(data))


def saved(name, folder, **changes):
    model = random_model(CASES[name].make_config(**changes))
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


def test_masks_of_old_checkpoints_are_left_out(tmp_path):
    """The names of GPT-2's own checkpoint: a decoder alone, with a buffer for each layer's mask."""
    model, tensors = saved("gpt2", tmp_path / "source")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(3)}
    save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    plan = plan_of(model.config, drop_layers=[1], **NARROW)
    prune_checkpoint(tmp_path / "source", tmp_path / "smaller", plan, progress=False)
    smaller = prune_model(model, plan)
    found = load_file(tmp_path / "smaller" / "model.safetensors")
    expected = {name.removeprefix("transformer."): tensor for name, tensor in smaller.state_dict().items()}
    assert set(found) == set(expected) - {"lm_head.weight"}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_masks_of_pythia_are_left_out(tmp_path):
    model, tensors = saved("gpt_neox", tmp_path / "source")
    masks = {"bias": torch.ones(1, 1, 64, 64, dtype=torch.bool), "masked_bias": torch.tensor(-1e9)}
    for name, mask in masks.items():
        tensors |= {f"gpt_neox.layers.{layer}.attention.{name}": mask.clone() for layer in range(3)}
    save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    plan = plan_of(model.config, drop_layers=[1])
    prune_checkpoint(tmp_path / "source", tmp_path / "smaller", plan, progress=False)
    found = load_file(tmp_path / "smaller" / "model.safetensors")
    assert found and not any(name.endswith(("attention.bias", "masked_bias")) for name in found)


def test_budget_says_that_heads_hold_the_hidden_size():
    config = CASES["gpt2"].make_config()
    count = family_of(config).count_parameters(config)
    with pytest.warns(UserWarning, match="n_embd stays 48: .* n_embd must be 12 for each of n_head"):
        plan = plan_of(config, params=0.9 * count)
    assert len(plan.hidden) == 48
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = plan_of(config, params=0.9 * count, search=["n_embd", "n_head"])
    assert len(plan.hidden) == 24


def test_layers_of_gpt_neo_are_named_twice():
    config = CASES["gpt_neo"].make_config()
    target = plan_of(config, drop_layers=[1]).target_config
    assert target["attention_types"] == [[["global"], 1], [["local"], 1]]
    assert target["attention_layers"] == ["global", "local"] and target["num_layers"] == 2


@pytest.mark.parametrize("layout", ["checkpoint", "model"])
def test_names_of_a_checkpoint_stay(tmp_path, layout):
    """EXAONE's: as they are written for programs that know no others; and a config that says depth twice."""
    model, tensors = saved("exaone", tmp_path / "source")
    assert "transformer.h.0.attn.attention.out_proj.weight" in tensors
    if layout == "model":
        save_file(model.state_dict(), tmp_path / "source" / "model.safetensors", {"format": "pt"})
        tensors = model.state_dict()
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 3}))
    plan = plan_of(model.config, drop_layers=[1])
    prune_checkpoint(tmp_path / "source", tmp_path / "smaller", plan, progress=False)
    found = load_file(tmp_path / "smaller" / "model.safetensors")
    assert set(found) == {name for name in tensors if ".2." not in name}
    last = next(name for name in found if ".1." in name)
    assert torch.equal(found[last], tensors[last.replace(".1.", ".2.")])
    config = json.loads((tmp_path / "smaller" / "config.json").read_text())
    assert (config["num_layers"], config["num_hidden_layers"]) == (2, 2)


def test_norms_of_each_head_go_with_their_head():
    model = random_model(CASES["stablelm"].make_config())
    tables = random_tables(model.config)
    tables["heads"] = dict.fromkeys(range(3), torch.tensor([0.0, 1.0, 1.0, 0.0]))  # of 2 KV heads
    plan = make_plan(tables, model.config, num_attention_heads=2, hidden_size=24, divisor=8)
    smaller = prune_model(model, plan)
    for old, new in zip(model.model.layers, smaller.model.layers, strict=True):
        queries, keys = (
            [norm.weight for norm in getattr(layer.self_attn, f"{side}_layernorm").norms]
            for layer, side in ((new, "q"), (new, "k"))
        )
        there = old.self_attn
        assert all(map(torch.equal, queries, [there.q_layernorm.norms[i].weight for i in (1, 2)]))
        assert all(map(torch.equal, keys, [norm.weight for norm in there.k_layernorm.norms]))
        assert len(queries) == len(keys) == 2
