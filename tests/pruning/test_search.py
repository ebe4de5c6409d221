"""search_plan() against scoring all candidates by hand; what it leaves alone, refuses, and goes on from."""

import io
import json
import math
import random
import re
import signal
import warnings

import numpy as np
import pytest
import torch

from minitron_kernels.pruning import LMLoss, find_sizes, make_plan, prune_model, search_plan
from minitron_kernels.pruning.search.progress_file import model_digest
from pruning.pruned_models import IDS, assert_unchanged, state_of
from pruning.score_tables import random_tables
from pruning.tiny_models import tiny_model
from tools.crashes import ended, in_child

BUDGET = {"params": 31_000, "divisor": 16}


@pytest.fixture(scope="module")
def model():
    return two_layers()


def two_layers():
    return tiny_model("mistral", num_hidden_layers=2, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def tables(model):
    return random_tables(model.config)


def weight_score(model):
    """A score without a forward pass."""
    return model.model.layers[0].mlp.down_proj.weight.detach().double().sum().item()


def by_hand(model, tables, score, k):
    """[(sizes, score)] of the first k candidates."""
    found = find_sizes(model.config, **BUDGET, limit=k)
    return [
        (c.sizes, score(prune_model(model, make_plan(tables, model.config, **c.sizes, divisor=16))))
        for c in found
    ]


@pytest.mark.parametrize(("score", "lower"), [(weight_score, False), (LMLoss([IDS]), True)])
def test_all_candidates_by_hand(model, tables, score, lower):
    found = search_plan(model, tables, score, k=5, lower_is_better=lower, progress=False, **BUDGET)
    want = by_hand(model, tables, score, 5)
    assert [(row.candidate.sizes, row.score) for row in found.rows] == want and len(want) == 5
    sizes, best = (min if lower else max)(want, key=lambda entry: entry[1])
    assert (found.best.candidate.sizes, found.best.score) == (sizes, best)
    assert [row.score for row in found.ranked] == sorted((s for _, s in want), reverse=not lower)
    plan = make_plan(tables, model.config, **sizes, divisor=16)
    assert (found.plan.target_config, found.plan.hidden, found.plan.layers) == (
        plan.target_config,
        plan.hidden,
        plan.layers,
    )
    assert found.plan.made_with["score"] == best and found.plan.made_with["params"] == BUDGET["params"]
    taken = make_plan(tables, model.config, **BUDGET)
    assert found.by_size.candidate == taken.candidates[0] == found.plan.candidates[0]


def test_what_is_printed_and_saved(model, tables, tmp_path):
    options = dict(k=4, score_name="sum", progress=False)
    found = search_plan(model, tables, weight_score, **options, **BUDGET)
    assert found.best is not found.by_size
    lines = found.summary().splitlines()
    assert lines[7] == "memory: of weights in bfloat16"
    assert lines[0] == "Search for mistral: params at most 31,000"
    assert lines[1] == "score: sum (lower is better)"
    assert " ".join(lines[2].split()) == "by size hidden_size intermediate_size parameters memory score"
    assert lines[3].endswith("best score") and f"{found.best.score:.6g}" in lines[3] and len(lines) == 8
    assert next(line for line in lines if "choice of make_plan()" in line).split()[0] == "1"
    found.save(tmp_path / "table.json")
    data = json.loads((tmp_path / "table.json").read_text())
    assert [row["score"] for row in data["rows"]] == [row.score for row in found.rows]
    assert data["rows"][data["best"]]["sizes"] == found.best.candidate.sizes
    assert (data["by_size"], data["score"], data["budgets"]) == (0, "sum", {"params": 31_000})
    found.plan.save(tmp_path / "plan.json")


def test_the_source_its_mode_and_all_rngs_stay(model, tables):
    before = state_of(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    seen = []

    def ruin(smaller):
        """Draws, trains and overwrites."""
        seen.append((torch.rand(1).item(), np.random.rand(), random.random(), torch.is_grad_enabled()))
        assert not smaller.training
        smaller.train()
        smaller(IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            for parameter in smaller.parameters():
                parameter.fill_(9.0)
        torch.set_grad_enabled(False)
        return len(seen)

    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    try:
        torch.manual_seed(1)
        np.random.seed(2)
        random.seed(3)
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        search_plan(model, tables, ruin, k=3, seed=7, progress=False, **BUDGET)
        assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
        assert np.random.get_state()[1].tolist() == states[1] and torch.is_grad_enabled()
        assert [module.training for module in model.modules()] == modes
    finally:
        model.eval()
    assert_unchanged(model, before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(seen) == 3 and len(set(seen)) == 1 and seen[0][3]


def test_killed_between_candidates_and_resumed(model, tables, tmp_path):
    """Killed within the score of each candidate; the last run scores the rest, with the same table."""
    path = tmp_path / "search.json"
    options = dict(k=4, score_name="sum and a random number", progress_file=path, progress=False, **BUDGET)

    def score(smaller):
        return weight_score(smaller) + torch.rand(1).item() + np.random.rand() + random.random()

    def begin(seed):
        """Random numbers that no other run has."""
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)

    begin(0)
    whole = search_plan(model, tables, score, **{**options, "progress_file": None})
    torch.set_num_threads(1)
    calls_of_a_child = []  # of each anew: a fork has a copy
    for survived in range(2):

        def until(smaller, calls=calls_of_a_child):
            calls.append(1)
            if len(calls) == 2:
                signal.raise_signal(signal.SIGKILL)
            return score(smaller)

        begin(survived + 1)
        pid = in_child(lambda until=until: search_plan(model, tables, until, **options))
        assert ended(pid) == -signal.SIGKILL
        assert len(json.loads(path.read_text())["scores"]) == survived + 1
    calls = []
    begin(9)
    found = search_plan(model, tables, lambda m: calls.append(m) or score(m), **options)
    assert len(calls) == 2 and found.resumed == 2
    assert found.rows == whole.rows and found.plan == whole.plan
    assert "2 scores were read from the progress file" in found.summary()
    more = search_plan(model, tables, lambda m: calls.append(m) or score(m), **{**options, "k": 5})
    assert len(calls) == 3 and more.rows[:4] == found.rows
    assert {entry.name for entry in tmp_path.iterdir()} == {"search.json"}


def test_progress_of_another_search_is_refused(model, tables, tmp_path):
    path = tmp_path / "search.json"
    options = dict(k=2, progress_file=path, progress=False)
    search_plan(model, tables, weight_score, **options, **BUDGET)
    kept = path.read_bytes()
    changed = two_layers()
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    others = random_tables(model.config, seed=1)
    for name, arguments, more in [
        ("model", (changed, tables, weight_score), {}),
        ("importance", (model, others, weight_score), {}),
        ("score_func", (model, tables, weight_score), {"score_name": "other"}),
        ("score_func", (model, tables, LMLoss([IDS])), {}),
        ("seed", (model, tables, weight_score), {"seed": 1}),
        ("target", (model, tables, weight_score), {"params": 30_000}),
        ("target", (model, tables, weight_score), {"order": "importance"}),
    ]:
        with pytest.raises(ValueError, match=rf"search\.json: holds scores of another {name}: .*delete this"):
            search_plan(*arguments, **{**options, **BUDGET, **more})
    assert path.read_bytes() == kept
    for text, message in [
        ("{", "is not the JSON of a search"),
        ("[]", "is not the progress of a search"),
        (kept.decode().replace('"version": 1', '"version": 2'), "is not the progress of a search"),
        (re.sub(r'": -?[\d.]+\n', '": NaN\n', kept.decode()), "must be a finite number, got nan"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=f"search.json: .*{message}"):
            search_plan(model, tables, weight_score, **options, **BUDGET)
    with pytest.raises(FileNotFoundError):
        search_plan(
            model, tables, weight_score, **{**options, "progress_file": tmp_path / "no" / "f"}, **BUDGET
        )
    for nameless in (lambda smaller: 0.0, type("Score", (), {"__call__": lambda self, m: 0.0})()):
        with pytest.raises(ValueError, match="score_name must be given with a progress_file"):
            search_plan(model, tables, nameless, **{**options, "progress_file": tmp_path / "new"}, **BUDGET)
    assert {entry.name for entry in tmp_path.iterdir()} == {"search.json"}


@pytest.mark.parametrize("wrong", ["raises", "nan", "inf", "text", "bool"])
def test_a_failing_score_loses_nothing(model, tables, tmp_path, wrong):
    calls = []
    given = {"nan": math.nan, "inf": torch.tensor(math.inf), "text": "3", "bool": True}

    def score(smaller):
        calls.append(1)
        if len(calls) != 2:
            return weight_score(smaller)
        if wrong == "raises":
            raise RuntimeError("out of\nmemory")
        return given[wrong]

    options = dict(k=3, score_name="sum", progress_file=tmp_path / "f", progress=False, **BUDGET)
    with pytest.warns(UserWarning, match="score_func failed for the candidate {'hidden_size'") as warned:
        found = search_plan(model, tables, score, **options)
    assert len(warned) == 1 and len(calls) == 3
    assert found.rows[1].score is None and found.ranked[2] is found.rows[1]
    reason = "RuntimeError: out of memory" if wrong == "raises" else "score_func must return a"
    assert reason in found.rows[1].failure and reason in found.summary()
    again = search_plan(model, tables, score, **options)  # the failed one alone is tried again
    assert len(calls) == 4 and again.rows[0] == found.rows[0] and again.rows[1].score is not None


def test_failures_keep_no_model_in_memory(model, tables):
    import weakref

    alive = []

    def fails(smaller):
        alive.append(weakref.ref(smaller))
        assert sum(ref() is not None for ref in alive) == 1
        raise RuntimeError("no score")

    message = "score_func gave no score for any of 3 models; the first: RuntimeError: no score"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message) as caught:
            search_plan(model, tables, fails, k=3, progress=False, **BUDGET)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert len(alive) == 3 and not any(ref() is not None for ref in alive)


def test_a_frozen_model_is_searched_without_warnings(tables):
    frozen = two_layers().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search_plan(frozen, tables, weight_score, k=2, progress=False, **BUDGET)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"params": None}, ValueError, "search_plan needs a budget"),
        ({"k": 0}, ValueError, "k must be a whole number from 1 on, got 0"),
        ({"params": 10**9}, ValueError, "params must be less than the .*nothing would be cut"),
        ({"hidden": 16}, ValueError, "hidden is not a size that can be pruned"),
        ({"score_name": ""}, TypeError, "score_name must be a string"),
        ({"score_func": 3.0}, TypeError, "score_func must be a function of a model, got float"),
        ({"block_losses": [1.0], "layers_by_score": True}, ValueError, "leave layers_by_score out"),
        ({"drop_layers": [1], "layers_by_score": True}, ValueError, "leave layers_by_score out"),
        (
            {"search": ["num_hidden_layers"], "block_losses": [1.0]},
            ValueError,
            "block_losses are of one number of layers",
        ),
    ],
)
def test_wrong_searches(model, tables, options, error, message):
    options = {"score_func": weight_score, **BUDGET, **options}
    with pytest.raises(error, match=message):
        search_plan(model, tables, progress=False, **options)


class Kept(torch.nn.Module):
    """A module that keeps something beside tensors, as those of Transformer Engine do."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


def test_extra_states_belong_to_a_model():
    def digest(state):
        model = two_layers()
        model.kept = Kept(state)
        return model_digest(model)

    states = (None, {"amax": 1.0}, {"amax": 2.0}, io.BytesIO(b"1"), io.BytesIO(b"2"), torch.tensor([1]))
    assert len({digest(state) for state in states}) == len(states)
    assert digest({"amax": 1.0}) == digest({"amax": 1.0}) != model_digest(two_layers())
    with pytest.raises(ValueError, match=r"kept._extra_state cannot be pickled.*leave progress_file out"):
        digest(lambda: None)
