"""Data sets in a folder, laid out as the hub calls them, which lm-eval takes instead of the hub's."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_kernels._files import sha256_of_folder
from minitron_kernels.evaluation.benchmarks import Source
from minitron_kernels.evaluation.choice import Choice, configs_of


def check_datasets(folder: Path) -> None:
    """Raises FileNotFoundError if `folder` is not a folder."""
    if not folder.is_dir():
        reason = "is not a folder" if folder.exists() else "there is no such folder"
        raise FileNotFoundError(2, f"{reason} (of data sets: OWNER/NAME as the hub calls them)", str(folder))


def digests(choice: Choice, index: Mapping[str, Any], folder: Path | None) -> dict[str, str]:
    """{data set: a hash of its files}, of those data sets of a choice that are in the folder.

    They tell results on other data apart. Hidden folders do not count: downloads keep times there.
    """
    if folder is None:
        return {}
    names = {str(config.get("dataset_path") or "") for config in configs_of(choice.task, index)}
    names |= {source.path for source in (choice.benchmark.sources if choice.benchmark else ())}
    there = sorted(name for name in names if name and (folder / name).is_dir())
    return {name: sha256_of_folder(folder / name, hidden=False)[:16] for name in there}


def lacking(choice: Choice, folder: Path | None) -> list[Source]:
    """What a benchmark takes from the hub and is not in the folder."""
    sources = choice.benchmark.sources if choice.benchmark else ()
    return [source for source in sources if folder is None or not (folder / source.path).is_dir()]


@dataclass(frozen=True)
class Places:
    """Where tasks and data are looked for.

    Args:
        tasks: a folder with tasks and their data; None: lm-eval's own tasks alone.
        datasets: a folder of data sets; None: the hub's, or what is kept of them.
    """

    tasks: Path | None = None
    datasets: Path | None = None

    @functools.cached_property
    def key(self) -> str | None:
        """A hash of all files in the folder of tasks."""
        return None if self.tasks is None else sha256_of_folder(self.tasks)[:16]

    @contextlib.contextmanager
    def reading(self, mine: bool, data: Mapping[str, str]) -> Iterator[None]:
        """Data are looked for here, and what was made of them before is only taken if they are the same.

        The libraries of data sets and of metrics look for a name in the process's working folder first. That
        of data sets knows a file that it has read before by its path and time, so another one in its place,
        out of an archive that sets all times alike, would be taken for the first.

        Args:
            mine: whether the task is one of the folder of tasks.
            data: the data sets of the task that are in the folder of data sets, with their hashes.
        """
        folder = self.tasks if mine else self.datasets
        if folder is None:
            yield
            return
        import datasets

        config, before = datasets.config, os.getcwd()
        cache = config.HF_DATASETS_CACHE
        if key := self.key if mine else _key_of(data):
            config.HF_DATASETS_CACHE = Path(cache) / "minitron_kernels" / key
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
            config.HF_DATASETS_CACHE = cache


def _key_of(data: Mapping[str, str]) -> str | None:
    """One hash of several, since groups of tasks may have more data sets than a file's name has room for."""
    return hashlib.sha256("-".join(data.values()).encode()).hexdigest()[:16] if data else None
