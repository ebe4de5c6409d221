"""The results of an evaluation: a JSON file that grows task by task, and tables."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minitron_kernels._files import write_text
from minitron_kernels.evaluation.benchmarks import ANNOUNCEMENT, BENCHMARKS, PUBLISHED

FORMAT = "minitron_kernels.evaluation"
VERSION = 1
PUBLISHED_CHOICES = ("announcement", "all", "none")
_CUT = "runcat"  # in lm-eval's warnings of prompts that are too long
_KINDS = {"model": str, "settings": dict, "versions": dict, "tasks": dict, "left_out": list}
_OF_TASK = ("title", "metric", "shots", "unit", "value", "stderr", "documents", "of", "asked", "seconds")
_FIELDS = ("model", "settings", "versions", "tasks", "left_out", "fingerprint")


class OtherResultsError(ValueError):
    """A file holds results of another model, other settings, or other shots."""


@dataclass
class Evaluation:
    """The results of one model.

    Attributes:
        model: its folder, or its class's name.
        tasks: {task: {"value": of the metric, in per cent where it is a share; "stderr": its standard error
            in the same unit, or None; "metric", "shots", "title", "unit": "%" or ""; "documents" that were
            evaluated, "of": that there are; "data": {data set of a folder: a hash}; "batch_size"; "seconds";
            "warnings" of lm-eval; "all": what lm-eval returned}}.
        settings: limit, dtype, chat_template, max_length, seed, tasks_path (a hash of the files in it),
            tokenizer (a hash of one that was given): what the results depend on.
        versions: of lm_eval, transformers, torch and this library.
        left_out: tasks that were not run since they run code.
        fingerprint: a hash of the checkpoint's weights, config and tokenizer; None for a model in memory.
    """

    model: str
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    fingerprint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def table(self, published: str = "announcement") -> str:
        """A Markdown table, see evaluation_table()."""
        return evaluation_table([self], published)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON file, and the table beside it as .md; a file that was there stays until then."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path.with_suffix(".md"), self.table() + "\n")
        write_text(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Reads what save() wrote.

        Raises:
            ValueError, OSError: the file is something else; names it.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: is not JSON: {error}") from None
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"{path}: is not an evaluation's results ({FORMAT}, version {VERSION})")
        if lacking := [name for name in _FIELDS if name not in data]:
            raise ValueError(f"{path}: lacks {', '.join(lacking)}")
        for name, kind in _KINDS.items():
            if not isinstance(data[name], kind):
                raise ValueError(f"{path}: {name} must be a {kind.__name__}, got {data[name]!r:.80}")
        for name, entry in data["tasks"].items():
            wrong = not isinstance(entry, dict) or [key for key in _OF_TASK if key not in entry]
            if wrong:
                what = f"lacks {', '.join(wrong)}" if isinstance(wrong, list) else "is not an object"
                raise ValueError(f"{path}: the task {name} {what}")
        return cls(**{name: data[name] for name in _FIELDS})


def evaluation_table(results: Sequence[Evaluation], published: str = "announcement") -> str:
    """A Markdown table: a row for each model, a column for each task; then the published rows.

    Args:
        results: of the models, in the order of the rows.
        published: "announcement": the four models of the announcement; "all": those of the papers too;
            "none". They are shown where a task was run with the announcement's shots.

    Raises:
        ValueError: `published` is something else.
    """
    if published not in PUBLISHED_CHOICES:
        raise ValueError(f"published must be one of {', '.join(PUBLISHED_CHOICES)}, got {published!r}")
    columns: dict[str, tuple[Any, ...]] = {}
    for result in results:
        for name, entry in result.tasks.items():
            columns.setdefault(name, (entry["title"], entry["metric"], entry["shots"]))
    names = sorted(columns, key=lambda name: list(BENCHMARKS).index(name) if name in BENCHMARKS else 99)
    rows = [["model", *(_heading(name, *columns[name]) for name in names)]]
    for result in results:
        rows.append([result.model, *(_cell(result.tasks.get(name), columns[name]) for name in names)])
    comparable = [name for name in names if _comparable(name, columns[name])]
    shown = [row for row in PUBLISHED if published == "all" or row.source == ANNOUNCEMENT]
    for row in shown if comparable and published != "none" else []:
        cells = [
            f"{row.results[name]:g}" if name in row.results else "–" for name in names if name in comparable
        ]
        filled = iter(cells)
        rows.append([f"*{row.model}*", *(next(filled) if name in comparable else "–" for name in names)])
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|---" + "|---:" * len(names) + "|")
    return "\n".join([*lines, *_notes(results, bool(comparable) and published != "none")])


def _heading(name: str, title: str, metric: str, shots: int | None) -> str:
    metric = "" if name in BENCHMARKS else f" ({metric})"
    return f"{title}{metric}" + ("" if shots is None else f" {shots}-shot")


def _cell(entry: Mapping[str, Any] | None, column: tuple[Any, ...]) -> str:
    if entry is None:
        return "–"
    shown = f"{entry['value']:.2f}" if entry["unit"] else f"{entry['value']:.4g}"
    if entry["stderr"] is not None:
        shown += f" ± {entry['stderr']:.2f}" if entry["unit"] else f" ± {entry['stderr']:.2g}"
    other = (entry["title"], entry["metric"], entry["shots"]) != column
    return shown + (f" ({entry['metric']}, {entry['shots']}-shot)" if other else "")


def _comparable(name: str, column: tuple[Any, ...]) -> bool:
    benchmark = BENCHMARKS.get(name)
    return benchmark is not None and column[1:] == (benchmark.label, benchmark.shots)


def _on_other_data(entry: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
    """Whether both tell their files, and these differ."""
    mine, theirs = entry.get("data") or {}, (other or {}).get("data") or {}
    return any(theirs.get(name, digest) != digest for name, digest in mine.items())


def _differences(first: Evaluation, other: Evaluation) -> list[str]:
    """What rows of the same tasks differ in beside the model: settings, and the harness that ran them."""
    found = {**first.settings, "lm_eval": first.versions.get("lm_eval")}
    theirs = {**other.settings, "lm_eval": other.versions.get("lm_eval")}
    names = [name for name in {**found, **theirs} if name != "limit"]  # which is said by the documents
    return [
        f"{name} {theirs.get(name)!r}, not {found.get(name)!r}"
        for name in names
        if theirs.get(name) != found.get(name)
    ]


def _notes(results: Sequence[Evaluation], published: bool) -> list[str]:
    notes = []
    if published:
        notes.append(
            "Rows in italics are as published, by another set-up: harness version, prompts of XL-Sum and "
            "sampling differ."
        )
    for number, result in enumerate(results):
        first = next((one for one in results[:number] if set(one.tasks) & set(result.tasks)), result)
        data = [name for name in result.tasks if _on_other_data(result.tasks[name], first.tasks.get(name))]
        differ = _differences(first, result) + ([f"data of {', '.join(data)}"] if data else [])
        if differ:
            notes.append(f"{result.model}: evaluated otherwise than {first.model}: {', '.join(differ)}.")
    for result in results:
        parts = [
            f"{name}: {entry['documents']:,} of {entry['of']:,}"
            for name, entry in result.tasks.items()
            if entry["documents"] < entry["of"]
        ]
        if parts:
            notes.append(
                f"{result.model}: the first documents alone ({'; '.join(parts)}): not comparable with others."
            )
        other = [
            f"{name}: {entry['of']:,}, not {BENCHMARKS[name].documents:,}"
            for name, entry in result.tasks.items()
            if name in BENCHMARKS and entry["of"] != BENCHMARKS[name].documents
        ]
        if other:
            notes.append(
                f"{result.model}: other documents than the benchmark's ({'; '.join(other)}): not comparable "
                "with others."
            )
        cut = [
            name
            for name, entry in result.tasks.items()
            if any(_CUT in text for text in entry.get("warnings", ()))
        ]
        if cut:
            notes.append(f"{result.model}: prompts were cut off at the left to fit: {', '.join(cut)}.")
        if result.left_out:
            notes.append(f"{result.model}: left out, as they run code: {', '.join(result.left_out)}.")
    return [line for note in notes for line in ("", note)]
