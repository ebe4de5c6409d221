"""Plans: the JSON file."""

import json
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_kernels.pruning import PruningPlan
from minitron_kernels.pruning.plan.selection import format_runs, parse_runs
from pruning.plans import GQA, plan_of
from pruning.score_tables import smaller_sizes
from pruning.tiny_models import FAMILIES, tiny_config


@given(st.lists(st.integers(0, 99), unique=True))
def test_runs_are_read_as_written(indices):
    assert parse_runs(format_runs(indices)) == tuple(indices)


def test_runs_are_short():
    assert format_runs(range(4096)) == "0-4095"
    assert format_runs([5, 0, 1, 2, 9, 7, 8]) == "5,0-2,9,7-8"
    for text, message in (
        ("1-", "got '1-' in it"),
        ("a", "got 'a' in it"),
        ("-3", "got '-3' in it"),
        ("5-3", "ends before it starts: '5-3'"),
        ("0-99999999999", "longer than any axis"),
        ([1], r"must be a string of runs like \"0-63,70\", got \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_runs(text)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("order", ["original", "importance"])
def test_a_plan_is_read_as_written(name, order, tmp_path):
    config = tiny_config(name)
    plan = plan_of(config, **smaller_sizes(name), divisor=16, order=order)
    path = tmp_path / "plan.json"
    plan.save(path)
    assert PruningPlan.load(path) == plan
    merged = plan_of(config, num_key_value_heads=1, num_attention_heads=2, kv_heads="merge", merge_heads=True)
    merged.save(path)
    assert PruningPlan.load(path) == merged
    assert merged.layers[0].heads.merged
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    os.umask(umask := os.umask(0))
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_saving_keeps_what_was_there_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    path.write_text("before")
    plan = plan_of(GQA, intermediate_size=64)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        plan.save(path)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def edit(data, where, value):
    """Set the field at e.g. "layers.1.mlp"; value may be a function of the old one."""
    *path, last = where.split(".")
    for key in path:
        data = data[int(key) if isinstance(data, list) else key]
    last = int(last) if isinstance(data, list) else last
    data[last] = value(data[last]) if callable(value) else value


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("format", 2, "format must be 1, got 2"),
        ("order", "best", "order must be one of original, importance, got 'best'"),
        ("hidden", "0-46", "hidden must keep 48 of 64, got 47 indices"),
        ("hidden", "17-64", "hidden must hold indices below 64, got 64"),
        ("hidden", "0-46,5", "hidden has 5 twice"),
        ("hidden", "1-47,0", 'hidden must rise where order is "original", got 0 after 47'),
        ("hidden", 48, "hidden must be a string of runs"),
        ("hidden", "0-47x", "hidden must be runs like"),
        ("layers", {}, "layers must be a list"),
        ("layers", lambda old: old[:-1], "layers must keep 5 of 6, got 4 indices"),
        ("layers.1.layer", 0, "layers has 0 twice"),
        ("layers.1.layer", "0", "layers[1].layer must be a int"),
        ("layers.1.mlp", "0-62,96", "layers[1].mlp must hold indices below 96, got 96"),
        (
            "layers.1.heads",
            "0-3,6-9",
            "layers[1].heads must have 2 heads of KV group 1 from position 2 on, got 2",
        ),
        (
            "layers.1.heads",
            "0-7",
            "layers[1].heads must have 2 heads of KV group 1 from position 2 on, got 2",
        ),
        ("layers.1.heads", "1,0,3-4,6-7,9-10", "layers[1].heads must rise"),
        ("layers.1.kv_heads", "0-2", "layers[1].kv_heads must have 4 entries, got 3"),
        ("layers.1.kv_heads", "0-2,4", "layers[1].kv_heads must hold indices below 4, got 4"),
        ("layers.1.kv_heads", ["0", "1", "2", "3,0"], "layers[1].kv_heads must join as many heads"),
        ("layers.1.merged_heads", ["0"], "layers[1].merged_heads[0] must be \"kept,dropped\", got '0'"),
        ("layers.1.merged_heads", ["11,0"], "layers[1].heads cannot merge 0 into 11"),
        ("layers.1.experts", "0-3", "layers[1].experts must not be there"),
        ("layers.1.extra", 1, "layers[1] has an unknown field extra"),
        ("norm_factors.model.norm", 0.0, "norm_factors[model.norm] must be a positive number, got 0.0"),
        ("norm_factors.lm_head", 1.0, "norm_factors has 'lm_head', which is not a norm of a kept layer"),
        ("target_config.hidden_size", 32, "hidden must keep 32 of 64, got 48 indices"),
        ("target_config.head_dim", 4, "target_config must have the head_dim of the source, 8, got 4"),
        ("target_config.model_type", "llama", "target_config.model_type must be 'mistral', got 'llama'"),
        # null is what transformers takes where the key is left out
        ("target_config.hidden_size", None, "hidden must keep 4096 of 64, got 48 indices"),
        ("source_config.hidden_size", [64], "source_config: int() argument must be"),
        ("source_config.model_type", "ctrl", "source_config: config.model_type 'ctrl' is not supported"),
        ("parameters.after", 1, "parameters must be {'before'"),
        ("extra", 1, "the plan has an unknown field extra"),
        ("candidates", [{}], "candidates[0] lacks parameters, sizes, spread"),
    ],
)
def test_a_wrong_file_says_where(where, value, message, tmp_path):
    target = dict(hidden_size=48, intermediate_size=64, num_attention_heads=8, drop_layers=[2])
    plan = plan_of(GQA, divisor=16, **target)
    path = tmp_path / "plan.json"
    plan.save(path)
    data = json.loads(path.read_text())
    if where.startswith("norm_factors."):
        data["norm_factors"][where.partition(".")[2]] = value
    else:
        edit(data, where, value) if where not in ("extra", "layers.1.extra") else None
        if where == "extra":
            data["extra"] = value
        if where == "layers.1.extra":
            data["layers"][1]["extra"] = value
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=re.escape(f"{path}: ")) as error:
        PruningPlan.load(path)
    assert message in str(error.value)


def test_merged_heads_that_cannot_be():
    plan = plan_of(GQA, num_attention_heads=8)
    data = plan.to_dict()
    stays, follows = plan.layers[1].heads.query[:2]
    goes, other = (min(set(range(i, i + 3)) - set(plan.layers[1].heads.query)) for i in (0, 3))
    for pairs, message in (
        ([f"{stays},{other}"], f"cannot merge {other} into {stays}: they have different KV heads"),
        ([f"{stays},99"], f"cannot merge 99 into {stays}: they have different KV heads"),
        ([f"{stays},{goes}", f"{follows},{goes}"], "cannot merge a head twice"),
    ):
        data["layers"][1]["merged_heads"] = pairs
        with pytest.raises(ValueError, match=re.escape(f"layers[1].heads {message}")):
            PruningPlan.from_dict(data)
    data["layers"][1]["merged_heads"] = [f"{stays},{goes}"]
    assert PruningPlan.from_dict(data).layers[1].heads.merged == ((stays, goes),)


def test_no_json(tmp_path):
    path = tmp_path / "plan.json"
    for text in ("{", "[]", '{"format": 1}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            PruningPlan.load(path)
