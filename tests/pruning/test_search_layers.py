"""Layers by loss against dropping each by hand, alone and within a search of sizes."""

import itertools
import json

import pytest
import torch

from minitron_kernels.pruning import LMLoss, make_plan, prune_model, search_layers, search_plan
from pruning.pruned_models import IDS, assert_unchanged, state_of
from pruning.score_tables import random_tables
from pruning.tiny_models import tiny_model

LAYERS = 4


@pytest.fixture(scope="module")
def model():
    return tiny_model("mistral", num_hidden_layers=LAYERS, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def tables(model):
    return random_tables(model.config)


@torch.no_grad()
def loss_without(model, drop):
    """Cross-entropy of IDS, with the layers skipped in the model itself."""
    layers = model.model.layers
    hooks = [
        layers[i].register_forward_hook(lambda module, args, output: args[0], prepend=True) for i in drop
    ]
    logits = model(IDS, use_cache=False).logits.double()
    for hook in hooks:
        hook.remove()
    chosen = logits[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None])
    return -chosen.mean().item()


def test_blocks_are_those_of_brute_force(model, tables, tmp_path):
    before = state_of(model)
    found = search_layers(model, 2, LMLoss([IDS]), scores=tables, progress=False)
    want = {start: loss_without(model, (start, start + 1)) for start in range(LAYERS - 1)}
    assert found.block_losses == pytest.approx(want, rel=1e-5)
    best = min(want, key=want.get)
    assert found.drop_layers == (best, best + 1)
    sums = [float(tables["layers"][start : start + 2].sum()) for start in range(LAYERS - 1)]
    assert [row.importance for row in found.rows] == pytest.approx(sums)
    assert found.by_importance is found.rows[sums.index(min(sums))]
    by_loss = make_plan(tables, model.config, num_hidden_layers=2, block_losses=found.block_losses)
    assert by_loss.dropped_layers == found.drop_layers
    text = found.summary()
    assert "Search for mistral: 2 neighbouring layers to drop" in text
    marked = [line.split()[0] for line in text.splitlines() if "least importance" in line]
    assert marked == [f"{found.by_importance.drop_layers[0]}-{found.by_importance.drop_layers[1]}"]
    found.save(tmp_path / "table.json")
    assert json.loads((tmp_path / "table.json").read_text())["best"] == list(found.drop_layers)
    assert_unchanged(model, before)


def test_one_by_one(model, tmp_path):
    found = search_layers(
        model, 2, LMLoss([IDS]), contiguous=False, progress=False, progress_file=tmp_path / "f"
    )
    first = min(range(LAYERS), key=lambda layer: loss_without(model, [layer]))
    second = min(set(range(LAYERS)) - {first}, key=lambda layer: loss_without(model, [first, layer]))
    assert found.drop_layers == tuple(sorted((first, second)))
    assert len(found.rows) == LAYERS + LAYERS - 1 and "2 layers, one by one" in found.summary()
    deeper = search_layers(
        model, 1, LMLoss([IDS]), contiguous=False, progress=False, progress_file=tmp_path / "f"
    )
    assert deeper.resumed == len(found.rows) and set(found.drop_layers) < set(deeper.drop_layers)
    with pytest.raises(ValueError, match="block_losses are of contiguous blocks"):
        _ = found.block_losses


@pytest.mark.parametrize("depth", [0, LAYERS, 2.0, True])
def test_wrong_depths(model, depth):
    with pytest.raises(ValueError, match=f"num_hidden_layers must be from 1 to {LAYERS - 1}, got {depth}"):
        search_layers(model, depth, LMLoss([IDS]))


def test_sizes_with_layers_by_score(model, tables, tmp_path):
    """Depth is searched as well: for each depth the block goes without which the loss is least."""
    loss = LMLoss([IDS])
    budget = dict(params=55_000, search=["num_hidden_layers", "intermediate_size"], divisor=16, k=4)
    found = search_plan(
        model, tables, loss, layers_by_score=True, progress=False, progress_file=tmp_path / "f", **budget
    )
    depths = set()
    for row in found.rows:
        depth = row.candidate.sizes["num_hidden_layers"]
        depths.add(depth)
        count = LAYERS - depth
        want = ()
        if count:
            blocks = [tuple(range(start, start + count)) for start in range(depth + 1)]
            want = min(blocks, key=lambda block: loss_without(model, block))
        assert row.drop_layers == want
        plan = make_plan(tables, model.config, **row.candidate.sizes, drop_layers=want or None, divisor=16)
        assert row.score == loss(prune_model(model, plan))
    assert len(depths) > 1 and found.plan.dropped_layers == found.best.drop_layers
    again = search_plan(
        model, tables, loss, layers_by_score=True, progress=False, progress_file=tmp_path / "f", **budget
    )
    assert again.rows == found.rows
    assert again.resumed == len(json.loads((tmp_path / "f").read_text())["scores"])
    fixed = search_plan(
        model,
        tables,
        loss,
        layers_by_score=True,
        progress=False,
        num_hidden_layers=2,
        params=30_000,
        k=2,
        divisor=16,
    )
    blocks = itertools.pairwise(range(LAYERS))
    assert {row.drop_layers for row in fixed.rows} == {min(blocks, key=lambda b: loss_without(model, b))}
    assert "by importance" not in fixed.plan.summary()
