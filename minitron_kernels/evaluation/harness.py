"""What is known here of lm-evaluation-harness (lm-eval): loading its tasks, running them, their results."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import math
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_kernels.evaluation import xlsum
from minitron_kernels.evaluation.choice import Choice
from minitron_kernels.evaluation.contexts import bars_shown, seeded, warnings_of_lm_eval
from minitron_kernels.evaluation.local_data import Places, digests

VERSION = "0.4.13"
PIP = f"pip install 'lm_eval[hf]=={VERSION}'"
# metrics that are shares, shown in per cent; an earlier one is rather the headline of a task
# (squadv2's and SCROLLS' f1 are in per cent already: a share is at most 1)
SHARES = ("acc_norm", "acc", "exact_match", "pass@1", "pass_at_1", "f1", "em", "mcc", "rougeL")


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

    if folder is not None:
        _check_files(folder)
    with warnings_of_lm_eval():  # one for each of its own tasks that the folder replaces
        return TaskManager(include_path=None if folder is None else str(folder), include_defaults=defaults)


def _check_files(folder: Path) -> None:
    """Raises ValueError if lm-eval would pass over one of the folder's files: it cannot be read, or
    describes a task of the same name as another."""
    from lm_eval.tasks._yaml_loader import load_yaml

    found: dict[str, Path] = {}
    for path in sorted(folder.glob("**/*.yaml")):
        try:
            config = load_yaml(path, resolve_func=False)
        except Exception as error:  # of YAML, of files that it includes, of lm-eval
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{path}: cannot be read: {type(error).__name__}: {reason}") from error
        name = (config or {}).get("group") or (config or {}).get("task")
        if isinstance(name, str) and found.setdefault(name, path) != path:
            raise ValueError(f"{path}: describes {name}, as {found[name]} does already")


@dataclass
class Loaded:
    """A choice, ready to run.

    Attributes:
        tasks: what TaskManager.load() returns.
        data: {data set: a hash}, of those in the user's folder of data sets.
        said: lm-eval's warnings, and how often.
    """

    tasks: dict[str, Any]
    data: dict[str, str] = field(default_factory=dict)
    said: Counter[str] = field(default_factory=Counter)


class NotLoadedError(ValueError):
    """A task's data cannot be loaded, or its configuration is wrong.

    Attributes:
        choice: which task.
        reason: what was wrong.
        advice: what to do.
    """

    def __init__(self, choice: Choice, reason: str, advice: str) -> None:
        super().__init__(f"tasks: {choice.name} cannot be loaded: {reason}; {advice}")
        self.choice, self.reason, self.advice = choice, reason, advice


def load_task(manager: Any, choice: Choice, places: Places) -> Loaded:
    """The tasks of a choice, with their data, shots and options.

    Raises:
        NotLoadedError: the data cannot be loaded, or the configuration is wrong.
        ValueError: a task is of a kind that is not known, or has too few examples for its shots.
    """
    from lm_eval.api.task import Task

    entry = manager.task_index.get(choice.task)
    mine = entry is not None and is_inside(entry.yaml_path, places.tasks)
    data = {} if mine else digests(choice, manager.task_index, places.datasets)
    try:
        own = entry is None and choice.task == "xlsum_en"
        spec = xlsum.config(places.datasets) if own else choice.task
        with places.reading(mine, data), warnings_of_lm_eval() as said:
            loaded = manager.load([spec])
    except Exception as error:  # the library of data sets raises many kinds
        raise _not_loaded(choice, error, mine) from error
    for task in loaded["tasks"].values():
        if not isinstance(task, Task):
            raise ValueError(f"tasks: {choice.name} has a task of a kind that is not known: {type(task)}")
        if choice.shots is not None:
            task.set_config("num_fewshot", choice.shots)
        for key, value in (choice.benchmark.config if choice.benchmark else {}).items():
            task.set_config(key, value, update=isinstance(value, Mapping))
        _check_examples(choice, task)
    return Loaded(loaded, data, said)


def _check_examples(choice: Choice, task: Any) -> None:
    """Sees to it that no prompt shows its own answer.

    Where there are only the documents that are evaluated, lm-eval draws examples from them. It leaves out the
    one that is asked about if the split of the examples is named, and only then.

    Raises:
        ValueError: there are fewer examples than shots.
    """
    shots, own = int(task.config.num_fewshot or 0), getattr(task, "fewshot_cfg", None)
    if not shots or own is None:
        return
    if (
        own.split is None
        and own.samples is None
        and not (task.has_training_docs() or task.has_validation_docs())
    ):
        own.split = task.config.test_split
    there = len(getattr(getattr(task, "sampler", None), "df", ()))
    needed = shots + (own.split == task.config.test_split)  # one of which may be the document itself
    if there < needed:
        raise ValueError(
            f"tasks: {choice.name} has {there} examples in {task.config.task}, too few for {shots} shots"
        )


def is_inside(path: Path | None, folder: Path | None) -> bool:
    """Whether a file is somewhere in a folder."""
    return path is not None and folder is not None and Path(path).resolve().is_relative_to(folder.resolve())


def runs_code(loaded: Loaded) -> bool:
    """Whether one of the loaded tasks runs code that the model wrote."""
    return any(bool(getattr(task, "UNSAFE_CODE", False)) for task in loaded.tasks["tasks"].values())


def generates(loaded: Loaded) -> bool:
    """Whether one of the loaded tasks lets the model write."""
    kinds = {getattr(task, "OUTPUT_TYPE", None) for task in loaded.tasks["tasks"].values()}
    return "generate_until" in kinds


def shots_of(loaded: Loaded) -> int | None:
    """Examples in a prompt; None: the tasks differ."""
    found = {int(task.config.num_fewshot or 0) for task in loaded.tasks["tasks"].values()}
    return found.pop() if len(found) == 1 else None


def documents_of(loaded: Loaded) -> int:
    """How many documents the loaded tasks have."""
    return sum(len(task.eval_docs) for task in loaded.tasks["tasks"].values())


def wrap(
    model: Any, tokenizer: Any, *, batch_size: int | str, max_length: int | None, bars: bool, count: Any
) -> Any:
    """A model as lm-eval wants it.

    Log-probabilities are of logits in fp32 at least. By itself lm-eval rounds them to the model's dtype, and
    in bf16 (8 bits) answers tie, of which the first then counts.

    Args:
        model, tokenizer: of transformers. The tokenizer is copied, since lm-eval gives it a padding token.
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

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, *args: Any, **options: Any
        ) -> Any:
            # loglikelihood_rolling() shows a bar for each document, whatever it is told
            return super()._loglikelihood_tokens(requests, disable_tqdm or not bars, *args, **options)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or not bars)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=disable_tqdm or not bars)

    with warnings_of_lm_eval():
        return Counted(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            backend="causal",
            softmax_dtype="float32" if model.dtype.itemsize < 4 else None,
            batch_size=batch_size,
            max_length=max_length,
        )


def run(
    lm: Any,
    loaded: Loaded,
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

    for task in loaded.tasks["tasks"].values():
        task.set_fewshot_seed(seed)
    # what is printed is for standard error: the table goes to standard output
    with seeded(seed), bars_shown(bars), contextlib.redirect_stdout(sys.stderr):
        return lm_eval.evaluate(
            lm=lm,
            task_dict=loaded.tasks,
            limit=limit,
            log_samples=False,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
            confirm_run_unsafe_code=code,
        )


def entries_of(choice: Choice, loaded: Loaded, done: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of Evaluation.tasks that a run gives: one, or one a member of a group without a mean."""
    results = done["results"]
    if choice.task in results and _metrics(results[choice.task]):
        return {choice.name: _entry(choice, choice.task, list(loaded.tasks["tasks"]), done)}
    members = [name for name in loaded.tasks["tasks"] if _metrics(results[name])]
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
        # a benchmark's metric behind another filter is another metric
        label, title = metric if benchmark else metric.split(",")[0], choice.name
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


def _not_loaded(choice: Choice, error: Exception, mine: bool) -> NotLoadedError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, KeyError):
        reason = f"its configuration or its data lack {reason}"
    if "BuilderConfig" in reason and not mine:
        reason += " (which files these are is said by the README.md that the data set has on the hub)"
    where = (
        "relative paths in its YAML begin at tasks_path"
        if mine
        else "lm-eval takes its data from the Hugging Face hub: without a network, run it where there is one "
        "and bring the cache (HF_HOME) here, or give a folder of data sets, as datasets, or describe the "
        "task with data of your own in a folder, as tasks_path"
    )
    return NotLoadedError(choice, f"{type(error).__name__}: {reason}", where)
