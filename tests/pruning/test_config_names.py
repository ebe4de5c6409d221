"""Keys of a config.json that have two names, of which transformers reads both."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_kernels.pruning import make_plan, prune_checkpoint, prune_model
from pruning.family_configs import CASES
from pruning.score_tables import random_tables
from pruning.threads import one_thread  # noqa: F401  (autouse: of every test here)
from pruning.tiny_models import random_model

NARROW = {"n_embd": 24, "n_head": 2}


@pytest.mark.parametrize(
    ("model_type", "names", "target"),
    [
        ("gpt2", {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}, NARROW),
        ("gpt2", {"n_embd": "hidden_size", "n_positions": "max_position_embeddings"}, NARROW),
        ("gpt_neo", {"num_layers": "num_hidden_layers"}, {"hidden_size": 24, "num_heads": 2}),
        ("bloom", {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}, {}),
        # as in the checkpoints of Qwen3-30B-A3B
        ("qwen3_moe", {"num_local_experts": "num_experts"}, {"num_experts": 3}),
        ("glm4_moe", {"n_routed_experts": "num_local_experts"}, {"n_routed_experts": 3}),
    ],
)
def test_either_name_says_the_new_size(model_type, names, target, tmp_path):
    model = random_model(CASES[model_type].make_config())
    model.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    config = {names.get(key, key): value for key, value in config.items()}
    path.write_text(json.dumps(config))
    plan = make_plan(random_tables(model.config), config, divisor=8, drop_layers=[1], **target)
    prune_checkpoint(tmp_path / "source", tmp_path / "smaller", plan, progress=False)
    smaller, ids = prune_model(model, plan), torch.arange(12).view(1, 12)
    found = json.loads((tmp_path / "smaller" / "config.json").read_text())
    again = AutoConfig.from_pretrained(tmp_path / "smaller")
    for own, other in names.items():
        wanted = getattr(smaller.config, own)
        assert found[other] == wanted == getattr(again, own)
        assert found.get(own, wanted) == wanted
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller", dtype="auto")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, smaller(ids).logits)


def test_keys_and_values_of_starcoder_follow_its_heads():
    """transformers writes how many there are, and takes what is written over what follows."""
    config = CASES["gpt_bigcode"].make_config(multi_query=False)
    plan = make_plan(random_tables(config), config, divisor=8, **NARROW)
    assert plan.target_config["num_key_value_heads"] == plan.target_config["n_head"] == 2
    assert type(config).from_dict(plan.target_config).num_key_value_heads == 2
