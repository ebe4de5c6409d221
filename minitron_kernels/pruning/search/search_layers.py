"""search_layers(): which layers to drop, by a score of the model without them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from minitron_kernels._files import write_text
from minitron_kernels.pruning.families.configs import completed
from minitron_kernels.pruning.families.registry import family_of
from minitron_kernels.pruning.families.wrappers import unwrapped
from minitron_kernels.pruning.plan.make_plan import make_plan
from minitron_kernels.pruning.plan.selection import checked_scores, format_runs
from minitron_kernels.pruning.search.progress_file import ProgressFile, model_digest
from minitron_kernels.pruning.search.scoring import Outcome, ScoreFunc, Scorer, bar, name_of
from minitron_kernels.pruning.search.table import score_text, table


@dataclass(frozen=True)
class ScoredLayers:
    """Layers that were dropped, and the score of the model without them.

    Args:
        drop_layers: the layers, in rising order.
        score: of the model without them; None where there is none.
        failure: why there is none.
        importance: their summed block importance; None where it is not known.
    """

    drop_layers: tuple[int, ...]
    score: float | None
    failure: str | None = None
    importance: float | None = None


@dataclass(frozen=True)
class LayerSearch:
    """The result of search_layers(); print(result.summary()).

    Args:
        rows: what was scored, in order.
        count: how many layers go.
        contiguous: whether each row is a block of neighbouring layers; else they are rounds, one layer more
            in each.
        model_type: of the model.
        score_name: of the score.
        lower_is_better: whether the best score is the lowest.
        resumed: how many scores came from the progress file.
    """

    rows: tuple[ScoredLayers, ...]
    count: int
    contiguous: bool
    model_type: str
    score_name: str
    lower_is_better: bool = True
    resumed: int = 0

    @property
    def best(self) -> ScoredLayers:
        """The layers to drop: those with the best score; of equal scores the first."""
        return best_of([row for row in self.rows if len(row.drop_layers) == self.count], self.lower_is_better)

    @property
    def drop_layers(self) -> tuple[int, ...]:
        """The layers to drop, for make_plan(drop_layers=)."""
        return self.best.drop_layers

    @property
    def block_losses(self) -> dict[int, float]:
        """{first layer of a block: score without the block}, for make_plan(block_losses=): losses.

        Raises:
            ValueError: the rows are not blocks, or the score is not a loss.
        """
        if not self.contiguous or not self.lower_is_better:
            raise ValueError("block_losses are of contiguous blocks, by a score of which the lowest is best")
        return {row.drop_layers[0]: row.score for row in self.rows if row.score is not None}

    @property
    def by_importance(self) -> ScoredLayers | None:
        """The block with the least summed importance, the first of equal ones; None where not known."""
        rows = [row for row in self.rows if row.importance is not None and len(row.drop_layers) == self.count]
        if not rows or not self.contiguous:
            return None
        return min(rows, key=lambda row: row.importance or 0.0)

    def summary(self) -> str:
        """A table of what was dropped and the scores, with the choice by importance marked."""
        known = any(row.importance is not None for row in self.rows)
        lines = []
        for row in self.rows:
            marks = ["best score"] if row is self.best else []
            marks += ["least importance"] if row is self.by_importance else []
            marks += [row.failure] if row.failure else []
            importance = "" if row.importance is None else f"{row.importance:.4g}"
            lines.append(
                [
                    format_runs(row.drop_layers),
                    *([importance] if known else []),
                    score_text(row.score),
                    "; ".join(marks),
                ]
            )
        how = "neighbouring layers" if self.contiguous else "layers, one by one"
        order = "lower" if self.lower_is_better else "higher"
        text = [
            f"Search for {self.model_type}: {self.count} {how} to drop",
            f"score: {self.score_name} ({order} is better)",
            *table(["dropped", *(["importance"] if known else []), "score", ""], lines, left=1),
        ]
        if self.resumed:
            text.append(f"{self.resumed} scores were read from the progress file")
        return "\n".join(text)

    def to_dict(self) -> dict[str, Any]:
        """What save() writes; JSON types."""
        chosen = self.by_importance
        return {
            "model_type": self.model_type,
            "contiguous": self.contiguous,
            "score": self.score_name,
            "lower_is_better": self.lower_is_better,
            "best": list(self.drop_layers),
            "by_importance": None if chosen is None else list(chosen.drop_layers),
            "rows": [
                {
                    "drop_layers": list(row.drop_layers),
                    "score": row.score,
                    "failure": row.failure,
                    "importance": row.importance,
                }
                for row in self.rows
            ],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as JSON."""
        write_text(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")


def search_layers(
    model: nn.Module,
    num_hidden_layers: int,
    score_func: ScoreFunc,
    *,
    contiguous: bool = True,
    scores: Any = None,
    score_name: str | None = None,
    lower_is_better: bool = True,
    seed: int = 0,
    progress_file: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> LayerSearch:
    """Which layers go, so that `num_hidden_layers` stay, by the score of the model without them.

    With `contiguous`, as in Minitron's depth pruning, each block of neighbouring layers is dropped from the
    model once, and the block without which the score is best goes: L − n + 1 models for n of L layers. Else
    layers go one by one: in each round every layer that is left is dropped once, and the one without which
    the score is best goes for good; n·L − n(n − 1)/2 models.

    Args:
        model, score_func, score_name, lower_is_better, seed, progress: as for search_plan().
        num_hidden_layers: how many layers stay.
        contiguous: whether a block of neighbours goes, or layers one by one.
        scores: ImportanceScores, or a mapping of tables, with the table "layers": prints their choice beside.
        progress_file: as for search_plan(). It serves any number of layers of the same model.

    Returns:
        The table, and the layers to drop: `make_plan(scores, drop_layers=found.drop_layers, ...)`.

    Raises:
        TypeError, ValueError: as search_plan(); no layer would go, or none stay.

    Warns:
        UserWarning: score_func raised for a model, or did not return a finite number; the others go on.

    Source: Minitron's sequel (arXiv 2408.11796) section 3: layers by loss.

    Example:
        >>> found = search_layers(model, 16, LMLoss(held_out_batches), scores=scores)   # doctest: +SKIP
        >>> plan = make_plan(scores, drop_layers=found.drop_layers)                     # doctest: +SKIP
    """
    source = unwrapped(model)
    config = completed(source.config)
    layers = family_of(config).sizes(config)["layers"]
    depth = num_hidden_layers
    if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth < layers:
        raise ValueError(f"num_hidden_layers must be from 1 to {layers - 1}, got {depth!r}")
    importance = importance_of(scores, layers)
    name = name_of(score_func, score_name, must_tell=progress_file is not None)
    identity = {}
    if progress_file is not None:
        identity = {"model": model_digest(source), "score_func": name, "seed": str(seed)}
    scorer = Scorer(model, score_func, ProgressFile(progress_file, identity), seed)
    count = layers - depth
    with bar(progress, models_for(layers, count, contiguous)) as shown:
        rows = score_layers(scorer, config, count, contiguous, lower_is_better, shown, importance)
    return LayerSearch(
        tuple(rows), count, contiguous, config["model_type"], name, lower_is_better, len(scorer.resumed)
    )


def models_for(layers: int, count: int, contiguous: bool) -> int:
    """How many models are scored to drop `count` of the layers."""
    return layers - count + 1 if contiguous else count * layers - count * (count - 1) // 2


def score_layers(
    scorer: Scorer,
    config: Mapping[str, Any],
    count: int,
    contiguous: bool,
    lower_is_better: bool,
    shown: Callable[[], object],
    importance: list[float] | None = None,
) -> list[ScoredLayers]:
    """Scores the model without each block of layers, or without one layer after the other.

    Raises:
        ValueError: there was no score in a round.
    """
    layers = family_of(config).sizes(config)["layers"]

    def scored(choices: list[tuple[int, ...]]) -> list[ScoredLayers]:
        rows, outcomes = [], []
        for drop in choices:
            outcome = _without(scorer, config, drop)
            outcomes.append(outcome)
            summed = None if importance is None else math.fsum(importance[layer] for layer in drop)
            rows.append(ScoredLayers(drop, outcome.score, outcome.failure, summed))
            shown()
        scorer.raise_if_nothing(outcomes)
        return rows

    if contiguous:
        starts = range(layers - count + 1)
        return scored([tuple(range(start, start + count)) for start in starts])
    rows: list[ScoredLayers] = []
    gone: tuple[int, ...] = ()
    for _ in range(count):
        left = [layer for layer in range(layers) if layer not in gone]
        tried = scored([tuple(sorted((*gone, layer))) for layer in left])
        gone = best_of(tried, lower_is_better).drop_layers
        rows += tried
    return rows


def _without(scorer: Scorer, config: Mapping[str, Any], drop: tuple[int, ...]) -> Outcome:
    """The score of the model without these layers."""
    try:
        plan = make_plan({}, config, drop_layers=drop, rescale_norms=False)
    except ValueError as error:  # the family does not allow it, as where the last layer of a kind would go
        return Outcome(failure=f"cannot be dropped: {error}")
    return scorer(plan, f"the model without layers {format_runs(drop)}")


def best_of(rows: list[ScoredLayers], lower_is_better: bool) -> ScoredLayers:
    """The row with the best score; of equal scores the first."""
    sign = 1 if lower_is_better else -1
    return min((row for row in rows if row.score is not None), key=lambda row: sign * (row.score or 0.0))


def importance_of(scores: Any, layers: int) -> list[float] | None:
    """The table "layers" of scores; None where there is none."""
    tables = scores.tables() if hasattr(scores, "tables") else scores
    if tables is not None and not isinstance(tables, Mapping):
        raise TypeError(f"scores must be ImportanceScores or a mapping, got {type(scores).__name__}")
    if not tables or "layers" not in tables:
        return None
    return checked_scores(tables["layers"], (layers,), "layers").tolist()
