"""What is asked for, and whether it can be run here: all tasks are loaded before a model is."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_kernels.evaluation import harness
from minitron_kernels.evaluation.benchmarks import BENCHMARKS
from minitron_kernels.evaluation.choice import (
    Choice,
    check_folder,
    check_known,
    of_folder,
    running_code,
    written,
)
from minitron_kernels.evaluation.contexts import code_allowed
from minitron_kernels.evaluation.local_data import Places, check_datasets, lacking


@dataclass(frozen=True)
class Availability:
    """Whether a task can be run here.

    Attributes:
        name: the task's.
        documents: how many there are; None: the task cannot be run.
        shots: examples in a prompt; None: members of a group differ.
        reason: why it cannot be run; None: it can.
        commands: of a benchmark, those that bring what it lacks, where there is a network.
        expected: documents that the benchmark has; None: it is none of the nine.
    """

    name: str
    documents: int | None
    shots: int | None
    reason: str | None
    commands: tuple[str, ...]
    expected: int | None


def check_tasks(
    tasks: Sequence[str] | None = None,
    *,
    tasks_path: str | Path | None = None,
    datasets: str | Path | None = None,
) -> list[Availability]:
    """Which tasks can be run here, without a model: they are loaded as evaluate() does it.

    No code that a model wrote is run.

    Args:
        tasks, tasks_path, datasets: as of evaluate().

    Returns:
        One entry a task, in the order that was asked for.

    Raises:
        ImportError: lm-eval is not installed; says how.
        TypeError, ValueError, OSError: an argument is not as above; a task is not known.

    Example:
        >>> [one.name for one in check_tasks(datasets="datasets") if one.reason]      # doctest: +SKIP
        ['mbpp', 'humaneval']
    """
    harness.check_installed()
    places = places_of(tasks_path, datasets)
    manager, choices = choices_of(tasks, places.tasks)
    folder = "DIR" if places.datasets is None else str(datasets)
    found = []
    for choice in choices:
        expected = None if choice.benchmark is None else choice.benchmark.documents
        try:
            with code_allowed(True):  # the libraries try a program of their own
                loaded = harness.load_task(manager, choice, places)
        except ValueError as error:
            reason = getattr(error, "reason", str(error))
            commands = tuple(source.command(folder) for source in lacking(choice, places.datasets))
            found.append(Availability(choice.name, None, choice.shots, reason, commands, expected))
            continue
        documents, shots = harness.documents_of(loaded), harness.shots_of(loaded)
        found.append(Availability(choice.name, documents, shots, None, (), expected))
    return found


def places_of(tasks_path: str | os.PathLike[str] | None, datasets: str | os.PathLike[str] | None) -> Places:
    """The folders that were named, absolute: tasks are loaded with theirs as the working folder.

    Raises:
        ValueError, OSError: one is not there, or is something else.
    """
    if tasks_path is not None:
        check_folder(Path(tasks_path))
    if datasets is not None:
        check_datasets(Path(datasets))
    return Places(*(None if path is None else Path(os.path.abspath(path)) for path in (tasks_path, datasets)))


def load_all(
    manager: Any, choices: Sequence[Choice], places: Places, run_code: bool | None
) -> dict[str, harness.Loaded]:
    """The choices by name, with their data.

    Raises:
        ValueError: some cannot be loaded, which are all named; one runs code, and may not.
    """
    loaded: dict[str, harness.Loaded] = {}
    failed: list[harness.NotLoadedError] = []
    for choice in choices:
        try:
            loaded[choice.name] = harness.load_task(manager, choice, places)
        except harness.NotLoadedError as error:
            failed.append(error)
            continue
        if harness.runs_code(loaded[choice.name]) and not run_code:
            raise ValueError(
                f"tasks: {choice.name} runs code that the model wrote: allow it by run_code=True"
            )
    if len(failed) == 1:
        raise failed[0]
    if failed:
        names = ", ".join(error.choice.name for error in failed)
        reasons = dict.fromkeys(f"{error.choice.name}: {error.reason}" for error in failed)
        advice = dict.fromkeys(error.advice for error in failed)
        raise ValueError(
            f"tasks: {names} cannot be loaded (check_tasks() says what each needs): "
            f"{'; '.join(reasons)}; {'; '.join(advice)}"
        )
    return loaded


def choices_of(tasks: Sequence[str] | None, folder: Path | None) -> tuple[Any, list[Choice]]:
    """(lm-eval's index, the choices). Its own tasks, thousands of files, are read only if one is wanted."""
    own = None if folder is None else harness.manager_of(folder, defaults=False)
    if tasks is None:
        tasks = list(BENCHMARKS) if own is None else of_folder(own.task_index)
        if not tasks:
            raise ValueError(f"{folder}: describes no task: its .yaml files need a key `task` or `group`")
    choices = written(tasks, () if own is None else own.task_index)
    if own is not None and all(choice.task in own.task_index for choice in choices):
        return own, choices
    manager = harness.manager_of(folder, defaults=True)
    where = f"lm_eval {harness.version()}" + ("" if folder is None else f" or {folder}")
    check_known([choice for choice in choices if choice.task != "xlsum_en"], list(manager.task_index), where)
    return manager, choices


def allowed(choices: list[Choice], manager: Any, run_code: bool | None) -> tuple[list[Choice], list[str]]:
    """(the choices without those that run code, where that is not wanted; the names of these).

    Raises:
        ValueError: there are such, and it was not said whether they may; or there are no others.
    """
    running = running_code(choices, manager.task_index)
    if not running or run_code:
        return choices, []
    if run_code is None:
        raise ValueError(
            f"tasks: {', '.join(running)} run code that the model wrote, on this machine with your rights: "
            "allow it by run_code=True, best in a container without network, or leave them out by "
            "run_code=False"
        )
    warnings.warn(f"tasks: {', '.join(running)} are left out, since they run code", stacklevel=3)
    kept = [choice for choice in choices if choice.name not in running]
    if not kept:
        raise ValueError(f"tasks: all of {', '.join(running)} run code, and run_code=False leaves them out")
    return kept, running
