"""Where transformers refuses a size: what is said, and the way round it that docs/pruning.md shows."""

import json
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from minitron_kernels._files import write_text
from minitron_kernels.pruning import make_plan, search_plan
from minitron_kernels.pruning.score import score_files
from pruning.score_tables import random_tables

SIZES = dict(
    hidden_size=72, intermediate_size=96, num_hidden_layers=2, vocab_size=64, max_position_embeddings=32
)
NINE = {**SIZES, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8}


def planned(**target):
    config = LlamaConfig(**NINE)
    return make_plan(random_tables(config, 0), config, **target)


def test_the_error_names_hidden_sizes_that_load():
    message = (
        r"multiple of num_attention_heads 9\. hidden_size 54 or 63 would load, with another divisor\. As a"
    )
    with pytest.raises(ValueError, match=message):
        planned(hidden_size=56, divisor=8)
    assert planned(hidden_size=54, divisor=2).target_config["hidden_size"] == 54
    assert planned(hidden_size=56, divisor=8, loadable=False).target_config["hidden_size"] == 56


def test_a_budget_that_leaves_the_hidden_size_says_so():
    with pytest.warns(
        UserWarning, match=r"hidden_size stays 72: .*no smaller multiple of 8: .*hidden_size 63"
    ):
        plan = planned(params=50_000, divisor=8)
    assert plan.target_config["hidden_size"] == 72 and plan.target_config["intermediate_size"] < 96


def test_a_search_that_leaves_the_hidden_size_says_so():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**NINE))
    scores = random_tables(model.config, 0)
    options = {"params": 50_000, "divisor": 8, "k": 2, "progress": False}
    with pytest.warns(UserWarning, match=r"hidden_size stays 72: .*no smaller multiple of 8") as caught:
        found = search_plan(model, scores, lambda smaller: smaller.num_parameters(), **options)
    assert {row.candidate.sizes["hidden_size"] for row in found.rows} == {72} and len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search_plan(model, scores, lambda smaller: 1.0, **options, search=["intermediate_size"])


def test_a_budget_that_can_cut_the_hidden_size_is_silent(recwarn):
    assert planned(params=35_000, divisor=3).target_config["hidden_size"] < 72
    config = LlamaConfig(**{**NINE, "num_attention_heads": 4, "num_key_value_heads": 2})
    make_plan(random_tables(config, 0), config, params=35_000, divisor=8)
    assert not recwarn.list


def test_a_llama_is_the_same_as_a_mistral(tmp_path):
    torch.manual_seed(0)
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**NINE)).eval()
    llama.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    path.write_text(json.dumps(config))
    mistral = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert type(mistral).__name__ == "MistralForCausalLM" and mistral(ids).logits.equal(llama(ids).logits)
    plan = make_plan(random_tables(mistral.config, 0), mistral.config, hidden_size=56, divisor=8)
    assert plan.target_config["hidden_size"] == 56


def test_layers_to_drop_are_named_as_runs():
    with pytest.raises(ValueError, match="some of the layers 0 to 1, each once and not all, got 0-98"):
        planned(drop_layers=list(range(99)))


@pytest.mark.parametrize("write", [write_text, lambda path, text: score_files._replace(path, text.encode())])
def test_an_error_of_writing_names_the_file(tmp_path, write):
    """And not the temporary one that is written first."""
    (tmp_path / "a.json").mkdir()  # cannot be replaced by a file
    with pytest.raises(OSError) as caught:
        write(tmp_path / "a.json", "text")
    assert caught.value.filename == str(tmp_path / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(FileNotFoundError) as caught:
        write(tmp_path / "no" / "a.json", "text")
    assert caught.value.filename == str(tmp_path / "no" / "a.json")
