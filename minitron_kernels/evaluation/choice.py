"""Which tasks are run: names and shots as a user writes them, found in a folder or among lm-eval's own."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_kernels.evaluation.benchmarks import BENCHMARKS, Benchmark

_SHOTS = re.compile(r"(.*[^:]):(\d+)")  # "::" belongs to names


@dataclass(frozen=True)
class Choice:
    """One task that is to be run.

    Args:
        name: of its results.
        task: lm-eval's name.
        shots: examples in the prompt; None: as the task's configuration says.
        benchmark: what the announcement says of it; None: it is none of those.
    """

    name: str
    task: str
    shots: int | None
    benchmark: Benchmark | None


def written(tasks: Sequence[str], own: Collection[str] = ()) -> list[Choice]:
    """The choices that `tasks` name: benchmarks, or tasks and groups of lm-eval, as "name" or "name:shots".

    Args:
        tasks: what the user wrote.
        own: tasks and groups in a folder of the user's; one that is called as a benchmark is what that name
            means, also where lm-eval calls its own task otherwise (truthfulqa: truthfulqa_mc2).

    Raises:
        TypeError, ValueError: none, not strings, or one twice.
    """
    if isinstance(tasks, str) or not all(isinstance(name, str) for name in tasks):
        raise TypeError(f"tasks must be a list of names, got {tasks!r}")
    found = []
    for text in tasks:
        match = _SHOTS.fullmatch(text)
        name, shots = (match[1], int(match[2])) if match else (text, None)
        benchmark = BENCHMARKS.get(name) or next(
            (one for one in BENCHMARKS.values() if one.task == name), None
        )
        if benchmark is None:
            found.append(Choice(name, name, shots, None))
            continue
        shots = benchmark.shots if shots is None else shots
        task = name if name in own else benchmark.task
        found.append(Choice(benchmark.name, task, shots, benchmark))
    names = [choice.name for choice in found]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks must be different names, at least one, got {list(tasks)}")
    return found


def of_folder(index: Mapping[str, Any]) -> list[str]:
    """The groups and tasks of a folder's index that are in no group of it, by name."""
    inside: set[str] = set()
    for entry in index.values():
        inside |= set(_members(entry))
    return [name for name, entry in index.items() if name not in inside and entry.kind.name != "TAG"]


def check_known(choices: Sequence[Choice], known: Sequence[str], where: str) -> None:
    """Raises ValueError if a task is not known; names those like it."""
    names = set(known)
    for choice in choices:
        if choice.task in names:
            continue
        near = difflib.get_close_matches(choice.name, [*BENCHMARKS, *known], 3)
        like = f": did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"tasks: there is no task {choice.name!r} in {where}{like}")


def running_code(choices: Sequence[Choice], index: Mapping[str, Any]) -> list[str]:
    """The names of those choices that run code which the model wrote."""
    return [
        choice.name
        for choice in choices
        if (choice.benchmark is not None and choice.benchmark.runs_code)
        or any(config.get("unsafe_code") for config in configs_of(choice.task, index))
    ]


def configs_of(task: str, index: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The configurations of a task, or of a group, a tag and all that is in it."""
    found: dict[str, Mapping[str, Any]] = {}
    todo = [task]
    while todo:
        entry = index.get(name := todo.pop())
        if entry is None or name in found:
            continue
        found[name] = entry.cfg or {}
        # the tags of a group are those it belongs to, those of a tag its tasks
        todo += [*entry.tags] if entry.kind.name == "TAG" else _members(entry)
    return list(found.values())


def _members(entry: Any) -> list[str]:
    """The names of the tasks and groups in a group."""
    members = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
    if not isinstance(members, list):
        return []
    return [
        str(member.get("task") or member.get("group")) if isinstance(member, Mapping) else str(member)
        for member in members
    ]


def check_folder(path: Path) -> None:
    """Raises an error if `path` is not a folder with tasks."""
    if not path.is_dir():
        reason = "is not a folder" if path.exists() else "there is no such folder"
        raise FileNotFoundError(2, f"{reason} (of tasks: YAML files as lm-eval has them)", str(path))
    if not any(path.glob("**/*.yaml")):
        raise ValueError(f"{path}: has no .yaml files, as which lm-eval describes tasks")
