"""The picture of a report: perplexities as bars, training losses as curves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS = {"teacher": "#4f6d7a", "corrected": "#4f6d7a", "pruned": "#c9a227", "distilled": "#d1495b"}
_NAMES = {
    "teacher": "teacher",
    "corrected": "teacher, corrected",
    "pruned": "pruned",
    "distilled": "distilled",
}


def title_of(row: Mapping[str, Any]) -> str:
    """A model's name in tables and pictures."""
    name = _NAMES[row["model"]]
    return f"{name}: {row['variant']}" if row["variant"] else name


def bars_of(rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[Mapping[str, Any]]]:
    """The file of the bars, the first that there is, and the rows that were measured on it."""
    file = next((name for row in rows for name in row.get("perplexity", {})), "")
    return file, [row for row in rows if file in row.get("perplexity", {})]


def draw(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> bool:
    """Draws a report as PNG; False where there is no matplotlib, or nothing to draw.

    Args:
        rows: of report.rows_of().
        path: of the picture, which appears whole.
        title: above it.
    """
    file, measured = bars_of(rows)
    trained = [row for row in rows if len(row.get("training", {}).get("losses", ())) > 1]
    if not measured:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    height = max(3.8, 0.32 * len(measured) + 1.2)
    figure = Figure(figsize=(11 if trained else 6, height), layout="constrained")
    left = figure.add_subplot(1, 2 if trained else 1, 1)
    values = [row["perplexity"][file]["perplexity"] for row in measured]
    colours = [_COLOURS[row["model"]] for row in measured]
    bars = left.barh([title_of(row) for row in measured][::-1], values[::-1], color=colours[::-1])
    left.bar_label(bars, fmt="%.1f", padding=4)
    left.set(xscale="log", xlabel=f"perplexity on {Path(file).name} (log scale; less is better)")
    left.set_xlim(right=max(values) * 2.2)
    axes = [left]
    if trained:
        right = figure.add_subplot(1, 2, 2)
        for row in trained:
            training = row["training"]
            right.plot(training["logged_steps"], training["losses"], label=title_of(row))
        each = {row["training"]["tokens_a_step"] for row in trained}
        unit = f"step of {each.pop():,} tokens" if len(each) == 1 else "step"
        right.set(xlabel=unit, ylabel="training loss, nats a token")
        right.legend(frameon=False)
        axes.append(right)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize="medium")
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(aside, format="png", dpi=150)
    os.replace(aside, path)
    return True
