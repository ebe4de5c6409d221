"""evaluate(): runs benchmarks on a model, task by task, and keeps what is done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minitron_kernels import __version__
from minitron_kernels._command.models import (
    check_free,
    check_model,
    checkpoint_hash,
    device_of,
    load_model,
    load_tokenizer,
)
from minitron_kernels._command.progress import Progress, in_terminal, lines_wanted
from minitron_kernels._files import sha256_of_folder
from minitron_kernels._modules import eval_mode
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
from minitron_kernels.evaluation.results import Evaluation, OtherResultsError

ALLOW_CODE = "HF_ALLOW_CODE_EVAL"  # asked for by the library that runs the code


def evaluate(
    model: Any,
    tasks: Sequence[str] | None = None,
    *,
    tokenizer: Any = None,
    tasks_path: str | os.PathLike[str] | None = None,
    batch_size: int | str = 1,
    device: str = "cpu",
    dtype: str = "auto",
    limit: int | None = None,
    run_code: bool | None = None,
    chat_template: bool = False,
    max_length: int | None = None,
    seed: int = 1234,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Evaluation:
    """Evaluates a model by lm-evaluation-harness, on the benchmarks that Minitron's models were announced by.

    All tasks are loaded, with their data, before the model is: what is missing is an error at once. Random
    number generators and the model's mode are afterwards as they were.

    Args:
        model: the folder of a checkpoint with its tokenizer, or a causal language model of transformers.
        tasks: benchmarks (see BENCHMARKS: winogrande, arc_challenge, mmlu, hellaswag, gsm8k, truthfulqa,
            xlsum_en, mbpp, humaneval), which have the announcement's shots, and tasks or groups of lm-eval or
            of `tasks_path`; "name:5" sets the shots. Default: the nine benchmarks, or with `tasks_path` all
            tasks of that folder.
        tokenizer: of transformers; needed for a model that is not a folder.
        tasks_path: a folder with tasks as lm-eval's YAML files describe them; they replace its own of the
            same name. Relative paths of data begin at this folder. Needs no network where the data do not.
        batch_size: sequences of a forward pass; "auto": as many as fit a GPU.
        device: of a folder's model; "auto" divides it over the GPUs, the CPU and the disk (accelerate).
        dtype: of a folder's model: "auto", "float32", "bfloat16", "float16", "float64".
        limit: how many documents of each task, the first; the results are then not comparable with others.
        run_code: tasks such as MBPP and HumanEval run code that the model wrote, on this machine and with
            your rights. True: run it (in a container without network, say); False: leave such tasks out,
            with a warning; None: an error, if one is among the tasks.
        chat_template: put prompts into the tokenizer's chat template, for instruction-tuned models.
        max_length: tokens of a prompt with its answer; default: the positions of the model.
        seed: of few-shot examples and of sampling; lm-eval's default.
        output: a JSON file, written after each task, with a table beside it (.md). The same call goes on with
            the tasks that it lacks.
        overwrite: replace results that are in `output`.
        progress: bars in a terminal, and elsewhere a line now and then; False: none; None: as True if
            standard error is a terminal.

    Returns:
        The results; `print(result.table())` shows them beside the published ones.

    Raises:
        ImportError: lm-eval is not installed; says how.
        TypeError, ValueError, OSError: an argument is not as above; a task is not known, or its data cannot
            be loaded; the checkpoint lacks weights; `output` holds something else.

    Source: the announcement's table, see evaluation.benchmarks.

    Example:
        >>> result = evaluate("Minitron-8B", device="cuda", run_code=False)            # doctest: +SKIP
        >>> result.tasks["arc_challenge"]["value"]                                     # doctest: +SKIP
        64.42
    """
    harness.check_installed()
    _check_numbers(batch_size=batch_size, limit=limit, max_length=max_length)
    folder = None if tasks_path is None else Path(tasks_path)
    if folder is not None:
        check_folder(folder)
    in_memory = not isinstance(model, str | os.PathLike)
    if in_memory and tokenizer is None:
        raise TypeError(f"tokenizer must be given with a model in memory ({type(model).__name__})")
    settings = {
        "limit": limit,
        "dtype": str(model.dtype).removeprefix("torch.") if in_memory else dtype,
        "chat_template": chat_template,
        "max_length": max_length,
        "seed": seed,
        "tasks_path": None if folder is None else sha256_of_folder(folder)[:16],
        "tokenizer": None if in_memory or tokenizer is None else _hash_of_tokenizer(tokenizer),
    }
    if not in_memory:
        check_model(Path(model))
    result = Evaluation(
        type(model).__name__ if in_memory else Path(model).resolve().name,
        settings=settings,
        versions=_versions(),
        fingerprint=None if in_memory else checkpoint_hash(Path(model))[:16],
    )
    if output is not None:
        result = _resumed(result, Path(output), overwrite)
    manager, choices = _choices(tasks, folder)
    choices = _allowed(choices, manager, run_code, result)
    todo = [choice for choice in choices if not _is_done(choice, result)]
    shown = in_terminal() or lines_wanted() if progress is None else progress
    with harness.seeded(seed), _code_allowed(run_code is True):
        loaded = {choice.name: _load(manager, choice, folder, run_code) for choice in todo}
        if loaded:
            if not in_memory:
                model, tokenizer = _from_folder(Path(model), tokenizer, device, dtype)
            _run_all(result, todo, loaded, model, tokenizer, batch_size, run_code is True, output, shown)
    return result


def _run_all(
    result: Evaluation,
    todo: list[Choice],
    loaded: dict[str, dict[str, Any]],
    model: Any,
    tokenizer: Any,
    batch_size: int | str,
    code: bool,
    output: str | os.PathLike[str] | None,
    shown: bool,
) -> None:
    settings, bars = result.settings, shown and in_terminal()
    rows = Progress("evaluating", None, unit="sequence", quiet=not shown or bars, patience=10.0)
    with eval_mode(model), contextlib.closing(rows):
        lm = harness.wrap(
            model,
            tokenizer,
            batch_size=batch_size,
            max_length=settings["max_length"],
            bars=bars,
            count=rows.advance,
        )
        for number, choice in enumerate(todo, 1):
            begin = time.monotonic()
            rows.what = f"evaluating {choice.name} ({number} of {len(todo)})"
            tasks = loaded.pop(choice.name)
            with harness.warnings_of_lm_eval() as said:
                done = harness.run(
                    lm,
                    tasks,
                    limit=settings["limit"],
                    seed=settings["seed"],
                    code=code,
                    chat_template=settings["chat_template"],
                    bars=bars,
                )
            for name, entry in harness.entries_of(choice, tasks, done).items():
                more = {
                    "seconds": round(time.monotonic() - begin, 3),
                    "warnings": sorted(said),
                    "asked": choice.name,
                    "asked_shots": choice.shots,
                }
                result.tasks[name] = entry | more
            for text, times in said.items():
                warnings.warn(f"{choice.name}: {text} ({times} times)", stacklevel=3)
            if output is not None:
                result.save(output)
            if shown:
                rows.say(_line(choice, result))


def _line(choice: Choice, result: Evaluation) -> str:
    parts = [
        f"{entry['metric']} {entry['value']:.4g}"
        + ("" if entry["stderr"] is None else f" ± {entry['stderr']:.2g}")
        + (f" ({name})" if name != choice.name else "")
        for name, entry in result.tasks.items()
        if entry["asked"] == choice.name
    ]
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    seconds = max(entry["seconds"] for entry in result.tasks.values() if entry["asked"] == choice.name)
    return f"{choice.name}: {', '.join(parts[:3])}{more} in {seconds:.0f} s"


def _choices(tasks: Sequence[str] | None, folder: Path | None) -> tuple[Any, list[Choice]]:
    """(lm-eval's index, the choices). Its own tasks, thousands of files, are read only if one is wanted."""
    own = None if folder is None else harness.manager_of(folder, defaults=False)
    if tasks is None:
        tasks = list(BENCHMARKS) if own is None else of_folder(own.task_index)
        if not tasks:
            raise ValueError(f"{folder}: describes no task: its .yaml files need a key `task` or `group`")
    choices = written(tasks)
    if own is not None and all(choice.task in own.task_index for choice in choices):
        return own, choices
    manager = harness.manager_of(folder, defaults=True)
    where = f"lm_eval {harness.version()}" + ("" if folder is None else f" or {folder}")
    check_known([choice for choice in choices if choice.task != "xlsum_en"], list(manager.task_index), where)
    return manager, choices


def _allowed(choices: list[Choice], manager: Any, run_code: bool | None, result: Evaluation) -> list[Choice]:
    """The choices without those that run code, where that is not wanted.

    Raises:
        ValueError: there are such, and it was not said whether they may.
    """
    running = running_code(choices, manager.task_index)
    if not running or run_code:
        return choices
    if run_code is None:
        raise ValueError(
            f"tasks: {', '.join(running)} run code that the model wrote, on this machine with your rights: "
            "allow it by run_code=True, best in a container without network, or leave them out by "
            "run_code=False"
        )
    warnings.warn(f"tasks: {', '.join(running)} are left out, since they run code", stacklevel=3)
    result.left_out = running
    kept = [choice for choice in choices if choice.name not in running]
    if not kept:
        raise ValueError(f"tasks: all of {', '.join(running)} run code, and run_code=False leaves them out")
    return kept


def _load(manager: Any, choice: Choice, folder: Path | None, run_code: bool | None) -> dict[str, Any]:
    loaded = harness.load_task(manager, choice, folder)
    if harness.runs_code(loaded) and not run_code:
        raise ValueError(f"tasks: {choice.name} runs code that the model wrote: allow it by run_code=True")
    return loaded


def _from_folder(path: Path, tokenizer: Any, device: str, dtype: str) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(path) if tokenizer is None else tokenizer
    if device == "auto":
        return load_model(path, dtype, otherwise="evaluated", with_head=True, device_map="auto"), tokenizer
    place = device_of(device)
    return load_model(path, dtype, otherwise="evaluated", with_head=True).to(place), tokenizer


def _is_done(choice: Choice, result: Evaluation) -> bool:
    """Whether results of this choice are there, with its shots.

    Raises:
        OtherResultsError: they are, with others.
    """
    there = [entry for entry in result.tasks.values() if entry["asked"] == choice.name]
    for entry in there:
        asked = entry.get("asked_shots")
        if choice.shots is None and asked is not None:
            raise OtherResultsError(
                f"output holds {choice.name} with {asked} shots, as was asked for, not with its own: take "
                "another output, or overwrite it"
            )
        if choice.shots is not None and entry["shots"] != choice.shots:
            raise OtherResultsError(
                f"output holds {choice.name} with {entry['shots']} shots, not {choice.shots}: take another "
                "output, or overwrite it"
            )
    return bool(there)


def _resumed(new: Evaluation, output: Path, overwrite: bool) -> Evaluation:
    """The results in `output`, if they are of the same model and settings.

    Raises:
        OtherResultsError: they are of others.
        ValueError, OSError: it is something else; it cannot be written.
    """
    if output.suffix != ".json":
        raise ValueError(f"output must be a .json file (the table goes into a .md beside it), got {output}")
    check_free(output, True, folder=False, option="output")
    if overwrite or not output.exists():
        return new
    old = Evaluation.load(output)
    again = "take another output, or overwrite it"
    if new.fingerprint is None:
        raise OtherResultsError(f"{output}: holds results, perhaps not of this model in memory: {again}")
    for name in ("model", "fingerprint", "settings", "versions"):
        mine, theirs = getattr(new, name), getattr(old, name)
        if mine != theirs:
            raise OtherResultsError(f"{output}: holds results with {name} {theirs!r}, not {mine!r}: {again}")
    old.left_out = []
    return old


def _hash_of_tokenizer(tokenizer: Any) -> str:
    """Of what a tokenizer in memory makes of text: all of a fast one, the vocabulary of another; and the
    special tokens and the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    more = [str(getattr(tokenizer, name, None)) for name in ("special_tokens_map", "chat_template")]
    return hashlib.sha256(json.dumps([body, more]).encode()).hexdigest()[:16]


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {
        "lm_eval": harness.version(),
        "transformers": transformers.__version__,
        "torch": str(torch.__version__),
        "minitron_kernels": __version__,
    }


def _check_numbers(*, batch_size: int | str, limit: int | None, max_length: int | None) -> None:
    if batch_size != "auto" and not _is_positive(batch_size):
        raise ValueError(f'batch_size must be a whole number from 1 on or "auto", got {batch_size!r}')
    for name, value in (("limit", limit), ("max_length", max_length)):
        if value is not None and not _is_positive(value):
            raise ValueError(f"{name} must be a whole number from 1 on or None, got {value!r}")


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@contextlib.contextmanager
def _code_allowed(allowed: bool) -> Iterator[None]:
    """Sets what the library that runs code asks for; afterwards it is as before."""
    before = os.environ.get(ALLOW_CODE)
    if allowed:
        os.environ[ALLOW_CODE] = "1"
    try:
        yield
    finally:
        if allowed:
            os.environ.pop(ALLOW_CODE)
            if before is not None:
                os.environ[ALLOW_CODE] = before
