"""report.md, report.json and report.png: what came out of a recipe and of what it is compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_kernels._command.progress import duration
from minitron_kernels.distillation.cli import record as records
from minitron_kernels.distillation.recipe.config import Recipe
from minitron_kernels.distillation.recipe.dry_run import changes_text
from minitron_kernels.distillation.recipe.graph import TRAINED, Graph, Line, Node, folder_of
from minitron_kernels.distillation.recipe.picture import draw, title_of
from minitron_kernels.distillation.recipe.stages import EVALUATION, PLAN
from minitron_kernels.distillation.recipe.state import State
from minitron_kernels.pruning import PruningPlan

MARKDOWN, RECORD, PICTURE = "report.md", "report.json", "report.png"


def rows_of(graph: Graph, out: Path) -> list[dict[str, Any]]:
    """One entry a model, shared ones once: variant, model, its results, tokens that it was trained on."""
    found, seen = [], set()
    for line in graph.lines:
        for model, node in line.evaluations.items():
            if node.path in seen:
                continue
            seen.add(node.path)
            result = json.loads((out / node.path / EVALUATION).read_text(encoding="utf-8"))
            row = {"variant": line.variant.name, "model": model, "path": _path(line, model, out), **result}
            made = line.models[model]
            if isinstance(made, Node) and made.stage in TRAINED:
                row["training"] = _training(out / made.path)
            found.append(row)
    return found


def _path(line: Line, model: str, out: Path) -> str:
    return str(folder_of(line.models[model], out))


def _training(folder: Path) -> dict[str, Any]:
    """Steps, tokens, and the losses that were logged."""
    record = records.read_record(folder)
    job = record["job"]
    steps, losses = records.curves(record.get("log", ())).get("loss", ([], []))
    return {
        "steps": job["steps"],
        "tokens": job["steps"] * job["per_step"] * job["seq_len"],
        "tokens_a_step": job["per_step"] * job["seq_len"],
        "logged_steps": steps,
        "losses": losses,
    }


def write_report(recipe: Recipe, graph: Graph, state: State) -> str:
    """Writes the report; returns its tables, for the terminal."""
    out, rows = recipe.out, rows_of(graph, recipe.out)
    drawn = recipe.base["recipe"]["picture"] and draw(rows, out / PICTURE, out.name)
    stages = [{"stage": node.path, **_entry(state, node)} for node in graph.nodes]
    made_by = _made_by(graph, state)
    about = recipe.base["recipe"]["about"]
    result = {
        "about": about,
        "rows": rows,
        "variants": {line.variant.name: line.variant.changes for line in graph.lines[1:]},
        "stages": stages,
        "versions": made_by,
        "written": records.now(),
    }
    records.write_text(out / RECORD, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    table = _models(rows)
    parts = [f"# {out.name}", *([about] if about else []), table, *unequal(rows)]
    if drawn:
        parts.append(f"![perplexities and training losses]({PICTURE})")
    if len(graph.lines) > 1:
        parts += ["## Compared", _variants(graph)]
    parts += ["## Plans", *_plans(graph, out), "## Stages", _times(stages)]
    parts.append(", ".join(f"{name} {' and '.join(found)}" for name, found in made_by.items()))
    records.write_text(out / MARKDOWN, "\n\n".join(parts) + "\n")
    files = ", ".join([MARKDOWN, RECORD, *([PICTURE] if drawn else [])])
    return f"{table}\n\n{out}: {files}"


def _entry(state: State, node: Node) -> dict[str, Any]:
    entry = state.entries[node.path]
    return {"finished": entry["finished"], "seconds": entry["seconds"]}


def _made_by(graph: Graph, state: State) -> dict[str, list[str]]:
    """{package: its versions by which the stages were made}: those of an earlier run may be others."""
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        for name, version in state.entries[node.path].get("versions", {}).items():
            found.setdefault(name, [])
            found[name] += [version] * (version not in found[name])
    return found


def markdown_table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A table whose first `left` columns are words, and the others numbers."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def one(row: list[str]) -> str:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(cells) + " |"

    rule = (
        "|"
        + "|".join(("-" * (w + 2)) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths))
        + "|"
    )
    return "\n".join([one(head), rule, *(one(row) for row in rows)])


def _models(rows: list[dict[str, Any]]) -> str:
    """Parameters, tokens of training, perplexity on each file, tasks."""
    files = list(dict.fromkeys(file for row in rows for file in row.get("perplexity", {})))
    tasks = list(dict.fromkeys(task for row in rows for task in row.get("tasks", {})))
    short = {file: Path(file).name for file in files}
    if len(set(short.values())) < len(files):
        short = {file: file for file in files}
    head = ["model", "parameters", "trained on"]
    head += [f"perplexity, {short[file]}" for file in files] + [task_title(rows, task) for task in tasks]
    lines = []
    for row in rows:
        cells = [title_of(row), f"{row['parameters']:,}" if "parameters" in row else ""]
        cells.append(f"{row['training']['tokens']:,} tokens" if "training" in row else "")
        cells += [_number(row.get("perplexity", {}).get(file, {}).get("perplexity")) for file in files]
        cells += [_number(row.get("tasks", {}).get(task, {}).get("value")) for task in tasks]
        lines.append(cells)
    return markdown_table(head, lines)


def unequal(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences on what stands in one column and was measured otherwise: on other text, with other shots."""
    firsts: dict[str, tuple[str, str]] = {}
    notes = []
    for row in rows:
        how = {file: f"{entry['tokens']:,} tokens" for file, entry in row.get("perplexity", {}).items()}
        for task, entry in row.get("tasks", {}).items():
            how[task] = f"{entry.get('shots')} shots, {entry.get('documents')} documents"
        for name, measured in how.items():
            first, other = firsts.setdefault(name, (title_of(row), measured))
            if measured != other:
                notes.append(
                    f"{title_of(row)}: {name} is on {measured}; {first}: on {other}. They do not compare."
                )
    return notes


def task_title(rows: list[dict[str, Any]], task: str) -> str:
    """A task's name with its shots."""
    found: Mapping[str, Any] = next(row["tasks"][task] for row in rows if task in row.get("tasks", {}))
    shots = found.get("shots")
    return task if shots is None else f"{task} ({shots} shots)"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _variants(graph: Graph) -> str:
    rows = [[line.variant.name, changes_text(line)] for line in graph.lines[1:]]
    return markdown_table(["variant", "what differs from the recipe"], rows, left=2)


def _plans(graph: Graph, out: Path) -> list[str]:
    """The last plan of each variant that has one of its own."""
    found, seen = [], set()
    for line in graph.lines:
        node = line.plans[-1]
        if node.path not in seen:
            seen.add(node.path)
            summary = PruningPlan.load(out / node.path / PLAN).summary()
            found.append(f"{node.path}:\n\n```\n{summary}\n```")
    return found


def _times(stages: list[dict[str, Any]]) -> str:
    rows = [[entry["stage"], duration(entry["seconds"]), entry["finished"]] for entry in stages]
    return markdown_table(["stage", "time", "finished (UTC)"], rows)
