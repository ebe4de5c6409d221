"""What is known here of lm-evaluation-harness (lm-eval): loading its tasks, running them, their results."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import math
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minitron_kernels.evaluation import xlsum
from minitron_kernels.evaluation.choice import Choice

VERSION = "0.4.13"
PIP = f"pip install 'lm_eval[hf]=={VERSION}'"
# metrics that are shares, shown in per cent; an earlier one is rather the headline of a task
# (squadv2's and SCROLLS' f1 are in per cent already: a share is at most 1)
SHARES = ("acc_norm", "acc", "exact_match", "pass@1", "pass_at_1", "f1", "em", "mcc", "rougeL")
# what lm-eval says of every model that it did not load itself
_ALWAYS_SAID = ("`pretrained` model kwarg is not of type", "Passed an already-initialized model")


def check_installed() -> None:
    """Raises ImportError, with the command that installs it, unless a fitting lm-eval is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError(
            f"evaluation needs lm-evaluation-harness, which is not installed here: {PIP}, or "
            "pip install 'minitron-kernels[evaluate]'"
        )
    from lm_eval.tasks import TaskManager

    if not hasattr(TaskManager, "load"):
        raise ImportError(f"lm_eval {version()} is too old for this evaluation: {PIP}")


def version() -> str:
    """The version of lm-eval."""
    return importlib.metadata.version("lm_eval")


def manager_of(folder: Path | None, *, defaults: bool) -> Any:
    """lm-eval's index of tasks: those of a folder and, with `defaults`, its own; the folder's win."""
    from lm_eval.tasks import TaskManager

    with warnings_of_lm_eval():  # one for each of its own tasks that the folder replaces
        return TaskManager(include_path=None if folder is None else str(folder), include_defaults=defaults)


def load_task(manager: Any, choice: Choice, folder: Path | None) -> dict[str, Any]:
    """The tasks of a choice as TaskManager.load() gives them, with their data, shots and options.

    Relative paths of data begin at `folder`, for tasks that come from there.

    Raises:
        ValueError: the data cannot be loaded, or the configuration is wrong; says what to do.
    """
    from lm_eval.api.task import Task

    entry = manager.task_index.get(choice.task)
    mine = folder is not None and entry is not None and is_inside(entry.yaml_path, folder)
    spec = xlsum.config() if entry is None and choice.task == "xlsum_en" else choice.task
    try:
        with _working_in(folder if mine else None), warnings_of_lm_eval():
            loaded = manager.load([spec])
    except Exception as error:  # the library of data sets raises many kinds
        raise ValueError(_why_not(choice, error, mine)) from error
    for task in loaded["tasks"].values():
        if not isinstance(task, Task):
            raise ValueError(f"tasks: {choice.name} has a task of a kind that is not known: {type(task)}")
        if choice.shots is not None:
            task.set_config("num_fewshot", choice.shots)
        for key, value in (choice.benchmark.config if choice.benchmark else {}).items():
            task.set_config(key, value, update=isinstance(value, Mapping))
    return loaded


def is_inside(path: Path | None, folder: Path) -> bool:
    """Whether a file is somewhere in a folder."""
    return path is not None and Path(path).resolve().is_relative_to(folder.resolve())


def runs_code(loaded: Mapping[str, Any]) -> bool:
    """Whether one of the loaded tasks runs code that the model wrote."""
    return any(bool(getattr(task, "UNSAFE_CODE", False)) for task in loaded["tasks"].values())


def wrap(
    model: Any, tokenizer: Any, *, batch_size: int | str, max_length: int | None, bars: bool, count: Any
) -> Any:
    """A model as lm-eval wants it.

    Args:
        model, tokenizer: of transformers.
        batch_size: sequences of a forward pass, or "auto".
        max_length: tokens of a prompt with its answer; None: as many as the model has positions.
        bars: whether lm-eval's bars are shown.
        count: called after each forward pass, with its number of sequences.
    """
    from lm_eval.models.huggingface import HFLM

    class Counted(HFLM):
        """The harness's own, with another way to show progress."""

        def _model_call(self, inps: Any, *args: Any, **options: Any) -> Any:
            result = super()._model_call(inps, *args, **options)
            count(inps.shape[0])
            return result

        def _model_generate(self, context: Any, *args: Any, **options: Any) -> Any:
            result = super()._model_generate(context, *args, **options)
            count(context.shape[0])
            return result

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not bars)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or not bars)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=disable_tqdm or not bars)

    with warnings_of_lm_eval():
        return Counted(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=max_length,
        )


def run(
    lm: Any,
    loaded: Mapping[str, Any],
    *,
    limit: int | None,
    seed: int,
    code: bool,
    chat_template: bool,
    bars: bool,
) -> dict[str, Any]:
    """Runs loaded tasks; returns what lm_eval.evaluate() does. All random number generators are seeded for
    it, and afterwards as they were.
    """
    import lm_eval

    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed)
    with seeded(seed), _bars(bars):
        return lm_eval.evaluate(
            lm=lm,
            task_dict=loaded,
            limit=limit,
            log_samples=False,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
            confirm_run_unsafe_code=code,
        )


def entries_of(
    choice: Choice, loaded: Mapping[str, Any], done: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The entries of Evaluation.tasks that a run gives: one, or one a member of a group without a mean."""
    results = done["results"]
    if choice.task in results and _metrics(results[choice.task]):
        return {choice.name: _entry(choice, choice.task, list(loaded["tasks"]), done)}
    members = [name for name in loaded["tasks"] if _metrics(results[name])]
    if not members:
        raise ValueError(f"tasks: lm-eval gave no number for {choice.name}")
    return {name: _entry(Choice(name, name, choice.shots, None), name, [name], done) for name in members}


def _entry(choice: Choice, key: str, leaves: list[str], done: Mapping[str, Any]) -> dict[str, Any]:
    metrics, benchmark = _metrics(done["results"][key]), choice.benchmark
    if benchmark is not None and benchmark.metric in metrics:
        metric, label, title = benchmark.metric, benchmark.label, benchmark.title
    else:
        ranks = {name: rank for rank, name in enumerate(SHARES)}
        metric = min(metrics, key=lambda name: ranks.get(name.split(",")[0], len(ranks)))
        label, title = metric.split(",")[0], choice.name
    is_share = metric.split(",")[0] in SHARES
    name, kind = metric.split(",", 1)
    # of a task in per cent already, a part or a bound of the metric shows it where the metric itself is small
    like = [value for other, value in metrics.items() if other.split(",")[0].endswith(name)]
    scale = 100.0 if is_share and max(map(abs, like)) <= 1.0 else 1.0
    stderr = done["results"][key].get(f"{name}_stderr,{kind}")
    shots = {int(done["n-shot"].get(leaf) or 0) for leaf in leaves}
    counts = [done["n-samples"][leaf] for leaf in leaves]
    return {
        "value": scale * metrics[metric],
        "stderr": scale * stderr if _is_number(stderr) else None,
        "unit": "%" if is_share else "",
        "metric": label,
        "shots": shots.pop() if len(shots) == 1 else None,
        "title": title,
        "documents": sum(int(each["effective"]) for each in counts),
        "of": sum(int(each["original"]) for each in counts),
        "all": {name: float(value) for name, value in done["results"][key].items() if _is_number(value)},
    }


def _metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a task, "metric,filter": number, without their standard errors."""
    return {
        name: float(value)
        for name, value in found.items()
        if "," in name and "_stderr," not in name and _is_number(value)
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _why_not(choice: Choice, error: Exception, mine: bool) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, KeyError):
        reason = f"its configuration or its data lack {reason}"
    where = (
        "relative paths in its YAML begin at tasks_path"
        if mine
        else "lm-eval takes its data from the Hugging Face hub: without a network, run it where there is one "
        "and bring the cache (HF_HOME) here, or describe the task with data of your own in a folder, as "
        "tasks_path"
    )
    return f"tasks: {choice.name} cannot be loaded: {type(error).__name__}: {reason}; {where}"


@contextlib.contextmanager
def _working_in(folder: Path | None) -> Iterator[None]:
    """The process's working folder, for relative paths in YAML files."""
    if folder is None:
        yield
        return
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def warnings_of_lm_eval() -> Iterator[Counter[str]]:
    """Collects the warnings of lm-eval's loggers, each text once, instead of printing them."""
    found: Counter[str] = Counter()

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = " ".join(record.getMessage().split())
            if not text.startswith(_ALWAYS_SAID):
                found[re.sub(r"\d+", "#", text)] += 1  # of numbers one example is enough

    logger, handler = logging.getLogger("lm_eval"), Collect(logging.WARNING)
    propagates = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds what tasks and generation draw from; afterwards all generators are as they were."""
    import numpy
    import torch

    states = random.getstate(), numpy.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])


@contextlib.contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Leaves out the bar over prompts, for which lm-eval has no option."""
    import lm_eval.api.task as module

    bar: Callable[..., Any] | None = getattr(module, "tqdm", None)
    if shown or bar is None:
        yield
        return
    module.tqdm = lambda items, *args, **options: items
    try:
        yield
    finally:
        module.tqdm = bar
