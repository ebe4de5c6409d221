"""search_plan(): scores the best sizes for a budget by a function of the pruned model, and takes the best."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from minitron_kernels._files import write_text
from minitron_kernels.pruning.families.configs import completed
from minitron_kernels.pruning.families.registry import family_of
from minitron_kernels.pruning.families.wrappers import unwrapped
from minitron_kernels.pruning.plan.counts import Budget
from minitron_kernels.pruning.plan.find_sizes import Candidate, nothing_to_cut, sizes_within
from minitron_kernels.pruning.plan.loadable import warn_of_hidden
from minitron_kernels.pruning.plan.make_plan import make_plan
from minitron_kernels.pruning.plan.pruning_plan import PruningPlan
from minitron_kernels.pruning.plan.sizes import given_sizes, named_sizes, size_names
from minitron_kernels.pruning.plan.tables import Tables, kept_layers
from minitron_kernels.pruning.search.progress_file import ProgressFile, model_digest, tables_digest
from minitron_kernels.pruning.search.scoring import ScoreFunc, Scorer, bar, name_of
from minitron_kernels.pruning.search.search_layers import best_of, models_for, score_layers
from minitron_kernels.pruning.search.table import score_text, table

# the arguments of make_plan() by name that are not sizes
_OPTIONS = {
    name
    for name, parameter in inspect.signature(make_plan).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
}


@dataclass(frozen=True)
class ScoredCandidate:
    """A candidate and its score.

    Args:
        candidate: the sizes.
        drop_layers: the layers that go.
        score: of the pruned model; None where the function failed.
        failure: why; None where it did not.
    """

    candidate: Candidate
    drop_layers: tuple[int, ...]
    score: float | None
    failure: str | None = None


@dataclass(frozen=True)
class PlanSearch:
    """The result of search_plan(); print(result.summary()).

    Args:
        rows: the candidates in the order of find_sizes(); the first is what make_plan() takes.
        plan: of the candidate with the best score.
        model_type: of the model.
        budgets: that the candidates keep, by name.
        score_name: of the score.
        counted: how memory is counted: memory_dtype, kv_tokens and kv_sequences.
        lower_is_better: whether the best score is the lowest.
        resumed: how many scores came from the progress file.
    """

    rows: tuple[ScoredCandidate, ...]
    plan: PruningPlan
    model_type: str
    budgets: Mapping[str, float]
    score_name: str
    counted: Mapping[str, Any]
    lower_is_better: bool = True
    resumed: int = 0

    @property
    def ranked(self) -> tuple[ScoredCandidate, ...]:
        """The candidates, the best score first; of equal scores in the order of `rows`; failed ones last."""
        sign = 1 if self.lower_is_better else -1
        return tuple(sorted(self.rows, key=lambda row: (row.score is None, sign * (row.score or 0))))

    @property
    def best(self) -> ScoredCandidate:
        """The candidate with the best score."""
        return self.ranked[0]

    @property
    def by_size(self) -> ScoredCandidate:
        """The candidate that make_plan() takes without scores: nearly as large as allowed, evenly shrunk."""
        return self.rows[0]

    def summary(self) -> str:
        """A table of candidates, the best score first, with the one that make_plan() takes marked."""
        names = list(self.rows[0].candidate.sizes)
        experts = any(row.candidate.active_parameters != row.candidate.parameters for row in self.rows)
        head = ["by size", *names, "parameters", *(["active"] if experts else []), "memory", "score", ""]
        lines = []
        for row in self.ranked:
            candidate = row.candidate
            marks = ["best score"] if row is self.best else []
            marks += ["choice of make_plan()"] if row is self.by_size else []
            marks += [row.failure] if row.failure else []
            lines.append(
                [
                    str(self.rows.index(row) + 1),
                    *(f"{candidate.sizes[name]:,}" for name in names),
                    f"{candidate.parameters:,}",
                    *([f"{candidate.active_parameters:,}"] if experts else []),
                    f"{(candidate.memory_bytes or 0) / 1e9:.3f} GB",
                    score_text(row.score),
                    "; ".join(marks),
                ]
            )
        budgets = ", ".join(f"{name} at most {budget:,.0f}" for name, budget in self.budgets.items())
        order = "lower" if self.lower_is_better else "higher"
        first = f"Search for {self.model_type}: {budgets}"
        text = [first, f"score: {self.score_name} ({order} is better)", *table(head, lines, left=1)]
        tokens, sequences = self.counted["kv_tokens"], self.counted["kv_sequences"]
        of = f" in {sequences:,} sequences" if sequences > 1 else ""
        cache = f" and the cache of {tokens:,} tokens{of}" if tokens else ""
        text.append(f"memory: of weights{cache} in {self.counted['memory_dtype']}")
        if self.resumed:
            text.append(f"{self.resumed} scores were read from the progress file")
        return "\n".join(text)

    def to_dict(self) -> dict[str, Any]:
        """What save() writes; JSON types."""
        return {
            "model_type": self.model_type,
            "budgets": dict(self.budgets),
            **self.counted,
            "score": self.score_name,
            "lower_is_better": self.lower_is_better,
            "best": self.rows.index(self.best),
            "by_size": 0,
            "rows": [
                {**dataclasses.asdict(row.candidate), "drop_layers": list(row.drop_layers)}
                | {"score": row.score, "failure": row.failure}
                for row in self.rows
            ],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as JSON; the plan is saved by `plan.save()`."""
        write_text(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")


def search_plan(
    model: nn.Module,
    scores: Any,
    score_func: ScoreFunc,
    *,
    k: int = 8,
    params: float | None = None,
    active_params: float | None = None,
    memory_bytes: float | None = None,
    memory_dtype: Any = "bfloat16",
    kv_tokens: int = 0,
    kv_sequences: int = 1,
    search: Sequence[str] | None = None,
    layers_by_score: bool = False,
    score_name: str | None = None,
    lower_is_better: bool = True,
    seed: int = 0,
    progress_file: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    **target: Any,
) -> PlanSearch:
    """The best of the k best candidates for a budget, by a score of the pruned model.

    find_sizes() ranks sizes by how well they fill the budget and how evenly they shrink, which needs no
    model. Here its first k are cut from `model`, one after the other, and `score_func` measures each.
    Minitron does the same, with a short retraining of each candidate and then its loss: a `score_func` may
    train the model that it is given, which is its own.

    Args:
        model: the source, loaded whole; not changed, nor is its mode. A smaller model is in memory beside it.
        scores: ImportanceScores, or tables, as for make_plan().
        score_func: (model) -> a finite number. LMLoss(batches) is the loss on held-out text. It gets each
            model in eval mode, with gradients enabled and all RNGs seeded by `seed`.
        k: how many candidates.
        params, active_params, memory_bytes, memory_dtype, kv_tokens, kv_sequences, search: budgets and sizes
            to choose, as for make_plan().
        layers_by_score: choose the layers that go, for each number of layers, as search_layers() does, and
            not by importance. That is one more model for each block of neighbouring layers.
        score_name: what tells this score from others in the progress file, and in results; default: the name
            of the function. It should name its data too.
        lower_is_better: whether the lowest score is the best.
        seed: of all RNGs, before each call of score_func. They are restored afterwards.
        progress_file: a JSON that holds the scores so far, replaced after each. A search that was killed goes
            on from it; scores of another model, other importance, target or score are refused. A larger k
            goes on too. One process at a time.
        progress: whether tqdm shows a bar; None: where standard error is a terminal.
        **target: sizes and options of make_plan().

    Returns:
        The table of candidates, and the plan of the best.

    Raises:
        TypeError, ValueError: an impossible target, as from make_plan(); a model that prune_model() does not
            cut; a progress file of another search (says what differs); score_func failed for all candidates.

    Warns:
        UserWarning: score_func raised for a candidate, or did not return a finite number; the others go on.
            The hidden size stays, since transformers would load no smaller multiple of the divisor.

    Source: Minitron (arXiv 2407.14679) section 2.3; its sequel (arXiv 2408.11796) section 3.

    Example:
        >>> loss = LMLoss(held_out_batches)                                       # doctest: +SKIP
        >>> found = search_plan(model, scores, loss, params=8.5e9)                # doctest: +SKIP
        >>> print(found.summary())                                                # doctest: +SKIP
        >>> found.plan.save("plan.json")                                          # doctest: +SKIP
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be a whole number from 1 on, got {k!r}")
    budget = Budget(
        params=params,
        active_params=active_params,
        memory_bytes=memory_bytes,
        memory_dtype=memory_dtype,
        kv_tokens=kv_tokens,
        kv_sequences=kv_sequences,
        num_experts_per_tok=target.get("num_experts_per_tok"),
        search=search,
    )
    if not budget.limits:
        raise ValueError("search_plan needs a budget: params, active_params or memory_bytes")
    if target.get("block_losses") is not None and layers_by_score:
        raise ValueError("block_losses tell which layers go: leave layers_by_score out")
    if target.get("drop_layers") is not None and layers_by_score:
        raise ValueError("drop_layers say which layers go: leave layers_by_score out")
    source = unwrapped(model)
    config = completed(source.config)
    name = name_of(score_func, score_name, must_tell=progress_file is not None)
    goal = _Target(scores, config, target, search or ())
    identity = {}
    if progress_file is not None:
        options = {"search": search, "layers_by_score": layers_by_score, **target}
        what = {**budget.limits, **budget.counted, **options}
        identity = {
            "model": model_digest(source),
            "importance": tables_digest(goal.tables),
            "target": json.dumps(what, sort_keys=True, default=str),
            "score_func": name,
            "seed": str(seed),
        }
    scorer = Scorer(model, score_func, ProgressFile(progress_file, identity), seed)
    by_score = _LayersByScore(scorer, config, lower_is_better, progress) if layers_by_score else None
    candidates = sizes_within(
        config,
        budget,
        fixed=goal.fixed,
        layers=goal.kept_layers(by_score),
        divisor=target.get("divisor"),
        loadable=target.get("loadable", True),
        limit=k,
    )
    if goal.keeps_everything(candidates[0]):
        raise ValueError(nothing_to_cut(budget, candidates[0]))
    if target.get("loadable", True):
        searched = {goal.names[name] for name in candidates[0].sizes}
        sizes = goal.sizes_of(candidates[0])
        warn_of_hidden(goal.family, config, sizes, searched, target.get("divisor"))
    plans = [goal.plan(candidate, by_score) for candidate in candidates]
    outcomes = []
    with bar(progress, len(plans)) as shown:
        for candidate, plan in zip(candidates, plans, strict=True):
            outcomes.append(scorer(plan, f"the candidate {candidate.sizes}"))
            shown()
    scorer.raise_if_nothing(outcomes)
    rows = tuple(
        ScoredCandidate(candidate, plan.dropped_layers, outcome.score, outcome.failure)
        for candidate, plan, outcome in zip(candidates, plans, outcomes, strict=True)
    )
    resumed = len(scorer.resumed)
    found = PlanSearch(
        rows,
        plans[0],
        config["model_type"],
        budget.limits,
        name,
        budget.counted,
        lower_is_better,
        resumed,
    )
    best = rows.index(found.best)
    made_with = plans[best].made_with | budget.limits | {"scored_by": name, "score": rows[best].score}
    if memory_bytes is not None:
        made_with |= budget.counted
    if by_score is not None and rows[best].drop_layers:
        made_with["layers_by"] = "score"
    plan = dataclasses.replace(plans[best], candidates=tuple(candidates), made_with=made_with)
    return dataclasses.replace(found, plan=plan)


class _LayersByScore:
    """The layers that go by score, for each number of layers; measured once for each."""

    def __init__(
        self, scorer: Scorer, config: Mapping[str, Any], lower_is_better: bool, progress: bool | None
    ) -> None:
        self.scorer, self.config, self.progress = scorer, config, progress
        self.lower_is_better = lower_is_better
        self.layers = family_of(config).sizes(config)["layers"]
        self._found: dict[int, tuple[int, ...]] = {}

    def __call__(self, depth: int) -> tuple[int, ...]:
        """The block to drop so that this many layers stay."""
        count = self.layers - depth
        if count and depth not in self._found:
            with bar(self.progress, models_for(self.layers, count, True)) as shown:
                rows = score_layers(self.scorer, self.config, count, True, self.lower_is_better, shown)
            self._found[depth] = best_of(rows, self.lower_is_better).drop_layers
        return self._found.get(depth, ())


class _Target:
    """The sizes and options of make_plan() that are the same for all candidates.

    Args:
        scores, config: as for make_plan().
        target: its other arguments.
        search: the names of the sizes in which candidates differ.
    """

    def __init__(
        self, scores: Any, config: Mapping[str, Any], target: Mapping[str, Any], search: Sequence[str]
    ) -> None:
        self.scores, self.config, self.target = scores, config, dict(target)
        self.family = family_of(config)
        self.before = self.family.sizes(config)
        options = {key: value for key, value in target.items() if key in _OPTIONS}
        sizes = {key: value for key, value in target.items() if key not in _OPTIONS}
        self.names = size_names(self.family, config)
        self.searches_depth = any(self.names.get(name) == "layers" for name in search)
        if self.searches_depth and target.get("block_losses") is not None:
            raise ValueError(
                "block_losses are of one number of layers, but search chooses it: take layers_by_score"
            )
        self.given = given_sizes(self.family, config, sizes, options.get("ratio"), options.get("divisor"))
        self.fixed = named_sizes(self.names, self.given)
        aggregations = {key: options[key] for key in ("batch", "seq") if key in options}
        self.tables = scores.tables(**aggregations) if hasattr(scores, "tables") else scores
        if not isinstance(self.tables, Mapping):
            raise TypeError(f"scores must be ImportanceScores or a mapping, got {type(scores).__name__}")
        self.depth = self.given.get("layers", self.before["layers"])

    def kept_layers(self, by_score: _LayersByScore | None) -> list[int] | None:
        """The layers that stay in all candidates; None for all, or where their number is searched."""
        if self.searches_depth:
            return None
        drop, losses = self.target.get("drop_layers"), self.target.get("block_losses")
        if by_score is not None and drop is None:
            drop = by_score(self.depth) or None
        table = Tables(self.tables, self.before)
        kept = kept_layers(table, self.before["layers"], self.depth, "layers" in self.given, drop, losses)
        return kept if len(kept) < self.before["layers"] else None

    def keeps_everything(self, candidate: Candidate) -> bool:
        """Whether a candidate is the whole model."""
        return self.sizes_of(candidate) == self.before and not self.target.get("drop_layers")

    def sizes_of(self, candidate: Candidate) -> dict[str, int]:
        """The sizes of a candidate by axis."""
        chosen = {self.names[name]: size for name, size in candidate.sizes.items()}
        return {**self.before, **self.given, **chosen}

    def plan(self, candidate: Candidate, by_score: _LayersByScore | None) -> PruningPlan:
        """The plan of a candidate."""
        target = {**self.target, **candidate.sizes}
        if by_score is not None and target.get("drop_layers") is None:
            target["drop_layers"] = by_score(self.sizes_of(candidate)["layers"]) or None
        try:
            return make_plan(self.scores, self.config, **target)
        except ValueError as error:
            raise ValueError(f"the candidate {candidate.sizes} cannot be made: {error}") from error
