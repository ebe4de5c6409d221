"""The output layer of checkpoints, beside those of test_every_family.py: tied or not, and of other models."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from minitron_kernels.pruning.checkpoint.head import stored_head
from minitron_kernels.pruning.checkpoint.safetensors_files import open_folder, read_json
from pruning import family_checks
from pruning.family_configs import CASES
from pruning.tiny_models import random_model, tiny_model

TIED = ("gpt2", "opt", "bloom", "falcon", "exaone", "gpt_neox", "phi", "gemma3_text", "qwen3_vl")


def names_of(folder):
    with open_folder(folder) as source:
        config = folder / "config.json"
        weight, bias = stored_head(source, read_json(config) if config.is_file() else {})
    return weight.name, bias and bias.name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", TIED)
def test_heads_that_are_tied_and_heads_that_are_not(name, tied, tmp_path):
    case = CASES[name]
    config = case.make_config(tie_word_embeddings=tied)
    config.tie_word_embeddings = tied
    model = random_model(config, auto=case.auto)
    model.save_pretrained(tmp_path)
    family_checks.check_head(model, tmp_path)
    assert ("embed" in names_of(tmp_path)[0] or "wte" in names_of(tmp_path)[0]) == (
        tied or name == "gpt_neox"  # whose head is called embed_out
    )


@pytest.mark.parametrize("name", ["ctrl", "openai-gpt", "gpt_neox_japanese"])
def test_models_that_no_table_describes(name, tmp_path):
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 96}
    model = random_model(AutoConfig.for_model(name, **sizes))
    model.save_pretrained(tmp_path)
    family_checks.check_head(model, tmp_path)


def test_what_is_not_there(tmp_path):
    model = tiny_model("llama")
    model.model.save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match="alone: has no output layer"):
        names_of(tmp_path / "alone")
    tiny_model("llama", tie_word_embeddings=True).model.save_pretrained(tmp_path / "tied")
    assert names_of(tmp_path / "tied") == ("embed_tokens.weight", None)
    # of two tensors that share memory one is stored, whatever the config says
    model.save_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    assert names_of(tmp_path / "whole") == ("model.embed_tokens.weight", None)
    # a model that nobody here knows
    for config, tensor, found in (
        ({"model_type": "my_model"}, "lm_head.weight", ("lm_head.weight", None)),
        (None, "lm_head.weight", ("lm_head.weight", None)),
        ({"model_type": "my_model"}, "embed_tokens.weight", None),
    ):
        folder = tmp_path / f"own {tensor} {config}"
        folder.mkdir()
        save_file({tensor: torch.ones(2, 2)}, folder / "model.safetensors", {"format": "pt"})
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        if found is None:
            with pytest.raises(ValueError, match="has no output layer that its my_model model"):
                names_of(folder)
        else:
            assert names_of(folder) == found
