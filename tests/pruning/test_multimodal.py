"""Text models inside models for text and images: what their configs and checkpoints may look like."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_kernels.pruning import collect_importance, make_plan, prune_checkpoint, prune_model
from minitron_kernels.pruning.families import registry
from minitron_kernels.pruning.families.registry import family_of
from pruning.family_checks import IDS, bits, check_masked
from pruning.family_configs import CASES
from pruning.family_configs.dense import FOUR
from pruning.score_tables import random_tables
from pruning.threads import one_thread  # noqa: F401  (autouse: of every test here)
from pruning.tiny_models import random_model


def made(name, **changes):
    case = CASES[name]
    config = case.make_config()
    for key, value in changes.items():
        setattr(config, key, value)
    return random_model(config, auto=case.auto)


def plan_of(config, **target):
    return make_plan(random_tables(config), config, divisor=8, **target)


def written(folder):
    return json.loads((folder / "config.json").read_text())


def test_a_config_with_all_entries_in_one_dict_stays_one(tmp_path):
    """As Qwen2.5-VL's is on the hub."""
    model = made("qwen2_5_vl")
    model.save_pretrained(tmp_path / "nested")
    model.save_pretrained(tmp_path / "flat")
    config = written(tmp_path / "flat")
    text = config.pop("text_config")
    text.pop("model_type")
    (tmp_path / "flat" / "config.json").write_text(json.dumps({**text, **config}))
    plan = plan_of(model.config, hidden_size=24, num_attention_heads=2)
    for name in ("nested", "flat"):
        prune_checkpoint(tmp_path / name, tmp_path / f"{name} pruned", plan, progress=False)
    flat = written(tmp_path / "flat pruned")
    assert "text_config" not in flat
    assert (flat["hidden_size"], flat["vision_config"]["out_hidden_size"]) == (24, 24)
    assert bits(tmp_path / "flat pruned") == bits(tmp_path / "nested pruned")
    sizes = family_of(flat).sizes(flat)
    assert sizes == family_of(flat).sizes(written(tmp_path / "nested pruned"))


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_names_in_the_result_have_the_prefixes_of_the_source(name, tmp_path):
    model = made(name)
    model.save_pretrained(tmp_path / "new", save_original_format=False)
    plan = plan_of(model.config, intermediate_size=48, drop_layers=[1])
    prune_checkpoint(tmp_path / "new", tmp_path / "pruned", plan, progress=False)
    smaller = prune_model(model, plan)
    tied = {"lm_head.weight"} if smaller.config.tie_word_embeddings else set()
    assert set(load_file(tmp_path / "pruned" / "model.safetensors")) == set(smaller.state_dict()) - tied
    assert "model.language_model.layers.1.mlp.up_proj.weight" in smaller.state_dict()


def test_a_head_of_its_own_though_the_config_says_tied(tmp_path):
    model = made("gemma3")
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    plan = plan_of(model.config, hidden_size=32)
    smaller = prune_model(model, plan)
    assert smaller.config.tie_word_embeddings is smaller.config.text_config.tie_word_embeddings is False
    assert smaller.lm_head.weight is not smaller.get_input_embeddings().weight
    smaller.save_pretrained(tmp_path / "memory")
    model.save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors["language_model.lm_head.weight"] = model.lm_head.weight.detach()
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    prune_checkpoint(tmp_path / "source", tmp_path / "disk", plan, progress=False)
    assert bits(tmp_path / "disk") == bits(tmp_path / "memory")
    config = written(tmp_path / "disk")
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False


def test_a_decoder_alone_and_the_whole_model_have_the_same_scores():
    model = made("qwen3_vl")
    whole = collect_importance(model, [IDS], progress=False)
    base = collect_importance(model.model, [IDS], progress=False)
    for axis, table in whole.tables().items():
        other = base.tables()[axis]
        pairs = (
            zip(table.values(), other.values(), strict=True) if isinstance(table, dict) else [(table, other)]
        )
        assert all(torch.equal(one, two) for one, two in pairs), axis


def test_a_parameter_that_follows_the_text_model_must_be_declared(tmp_path, monkeypatch):
    whole = registry._MULTIMODAL["gemma3"]
    monkeypatch.setitem(registry._MULTIMODAL, "gemma3", dataclasses.replace(whole, params=()))
    model = made("gemma3")
    plan = plan_of(model.config, hidden_size=32)
    name = "model.multi_modal_projector.mm_input_projection_weight"
    with pytest.raises(ValueError, match=name):
        prune_model(model, plan)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=rf"{name} \[20, 48\] becomes \(20, 32\) .* register_multimodal\(\)"):
        prune_checkpoint(tmp_path / "source", tmp_path / "pruned", plan, progress=False)


def test_the_plan_is_for_this_text_model():
    model = made("gemma3")
    plan = plan_of(model.config, hidden_size=32)
    config = copy.deepcopy(plan.source_config)
    config["text_config"]["model_type"] = "gemma2"
    with pytest.raises(ValueError, match="model_type 'gemma2', got 'gemma3_text'"):
        prune_model(model, dataclasses.replace(plan, source_config=config))


def test_a_text_model_that_is_not_known():
    with pytest.raises(ValueError, match=r"the text_config of this llava: config.model_type 'ctrl'"):
        family_of({"model_type": "llava", "text_config": {"model_type": "ctrl"}})


def test_images_are_not_read_for_scores():
    batch = {"input_ids": IDS, "pixel_values": torch.zeros(1, 3, 8, 8)}
    with pytest.raises(ValueError, match="pixel_values is not read"):
        collect_importance(made("gemma3"), [batch], progress=False)


def test_experts_in_groups_and_layers_beyond_the_model():
    """DeepSeek-V3: routing that is limited to groups of experts, MTP layers, one key for each head."""
    config = CASES["deepseek_v3"].make_config(n_group=2, topk_group=1)
    tables = random_tables(config)
    with pytest.raises(ValueError, match=r"n_routed_experts cannot be pruned .* n_group groups"):
        make_plan(tables, config, n_routed_experts=3)
    plan = make_plan(tables, config, num_attention_heads=2)
    assert plan.target_config["num_key_value_heads"] == 2
    assert (config.num_nextn_predict_layers, plan.target_config["num_nextn_predict_layers"]) == (1, 0)
    assert prune_model(random_model(config), plan).config.num_nextn_predict_layers == 0
    with pytest.raises(ValueError, match="num_key_value_heads is not a size that can be pruned"):
        make_plan(tables, config, num_key_value_heads=2)


@pytest.mark.parametrize("name", ["llava", "mistral3"])
def test_images_keep_their_share_of_a_stream_whose_embeddings_are_scaled(name):
    """Gemma 2 multiplies embeddings of tokens by √hidden_size, and not the images that take their places."""
    text = {"model_type": "gemma2", "query_pre_attn_scalar": 16}
    case = CASES[name]
    case = dataclasses.replace(
        case,
        config={**case.config, "text_config": text},
        places=dataclasses.replace(case.places, norms=FOUR),
        norm_offset=1.0,
    )
    model = random_model(case.make_config(), auto=case.auto)
    check_masked(case, model, plan_of(model.config, hidden_size=32))


def test_the_factor_of_a_final_norm_without_a_gain_goes_to_the_head():
    """OLMo's norms have no gains; inside another model its final norm and its head have other names."""
    inside, case = CASES["olmo"], CASES["llava"]
    case = dataclasses.replace(
        case,
        config={**case.config, "text_config": {"model_type": "olmo"}},
        centred=True,
        tolerance=10 * inside.tolerance,  # its epsilon weighs more beside so small features
    )
    model = random_model(case.make_config(), auto=case.auto)
    plan = plan_of(model.config, hidden_size=32)
    kept = torch.tensor(plan.hidden)
    with torch.no_grad():
        for written in model.model.multi_modal_projector.linear_2.parameters():
            written[kept] -= written[kept].mean(0, keepdim=True)
    check_masked(case, model, plan)
