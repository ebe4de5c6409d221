"""evaluate(): runs benchmarks on a model, task by task, and keeps what is done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections.abc import Sequence
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
from minitron_kernels._modules import eval_mode
from minitron_kernels.evaluation import harness
from minitron_kernels.evaluation.choice import Choice
from minitron_kernels.evaluation.contexts import (
    code_allowed,
    plain_generation,
    seeded,
    warnings_of_lm_eval,
)
from minitron_kernels.evaluation.loading import allowed, choices_of, load_all, places_of
from minitron_kernels.evaluation.local_data import Places, digests
from minitron_kernels.evaluation.results import Evaluation, OtherResultsError


def evaluate(
    model: Any,
    tasks: Sequence[str] | None = None,
    *,
    tokenizer: Any = None,
    tasks_path: str | os.PathLike[str] | None = None,
    datasets: str | os.PathLike[str] | None = None,
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
        datasets: a folder of data sets, each as OWNER/NAME as the hub calls it, which are taken instead of
            the hub's; check_tasks() says which are lacking and how to get them.
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
    places = places_of(tasks_path, datasets)
    in_memory = not isinstance(model, str | os.PathLike)
    if in_memory and tokenizer is None:
        raise TypeError(f"tokenizer must be given with a model in memory ({type(model).__name__})")
    settings = {
        "limit": limit,
        "dtype": str(model.dtype).removeprefix("torch.") if in_memory else dtype,
        "chat_template": chat_template,
        "max_length": max_length,
        "seed": seed,
        "tasks_path": places.key,
        "tokenizer": None if in_memory or tokenizer is None else _hash_of_tokenizer(tokenizer),
    }
    if output is not None:
        _check_output(Path(output))
    if not in_memory:
        check_model(Path(model))  # and only then read it whole
    result = Evaluation(
        type(model).__name__ if in_memory else Path(model).resolve().name,
        settings=settings,
        versions=_versions(),
        fingerprint=None if in_memory else checkpoint_hash(Path(model))[:16],
    )
    if output is not None:
        result = _resumed(result, Path(output), overwrite)
    manager, choices = choices_of(tasks, places.tasks)
    choices, result.left_out = allowed(choices, manager, run_code)
    todo = [choice for choice in choices if not _is_done(choice, result, manager.task_index, places)]
    if batch_size == "auto" and todo:
        _check_auto(str(model.device) if in_memory else device)
    shown = in_terminal() or lines_wanted() if progress is None else progress
    with seeded(seed), code_allowed(run_code is True):
        loaded = load_all(manager, todo, places, run_code)
        if loaded:
            if not in_memory:
                model, tokenizer = _from_folder(Path(model), tokenizer, device, dtype)
            _run_all(result, todo, loaded, model, tokenizer, batch_size, run_code is True, output, shown)
    return result


def _run_all(
    result: Evaluation,
    todo: list[Choice],
    loaded: dict[str, harness.Loaded],
    model: Any,
    tokenizer: Any,
    batch_size: int | str,
    code: bool,
    output: str | os.PathLike[str] | None,
    shown: bool,
) -> None:
    settings, bars = result.settings, shown and in_terminal()
    rows = Progress("evaluating", None, unit="sequence", quiet=not shown or bars, patience=10.0)
    with eval_mode(model), contextlib.closing(rows), plain_generation(model) as ignored:
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
            with warnings_of_lm_eval() as said:
                done = harness.run(
                    lm,
                    tasks,
                    limit=settings["limit"],
                    seed=settings["seed"],
                    code=code,
                    chat_template=settings["chat_template"],
                    bars=bars,
                )
            said.update(tasks.said)
            if ignored and harness.generates(tasks):
                said[f"generation_config.json is not followed: {ignored}"] += 1
            for name, entry in harness.entries_of(choice, tasks, done).items():
                more = {
                    "data": tasks.data,
                    "batch_size": batch_size,
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


def _from_folder(path: Path, tokenizer: Any, device: str, dtype: str) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(path) if tokenizer is None else tokenizer
    if device == "auto":
        return load_model(path, dtype, otherwise="evaluated", with_head=True, device_map="auto"), tokenizer
    place = device_of(device)
    return load_model(path, dtype, otherwise="evaluated", with_head=True).to(place), tokenizer


def _is_done(choice: Choice, result: Evaluation, index: Any, places: Places) -> bool:
    """Whether results of this choice are there, with its shots and its data.

    Raises:
        OtherResultsError: they are, with others.
    """
    there = [entry for entry in result.tasks.values() if entry["asked"] == choice.name]
    then = {name: digest for entry in there for name, digest in entry.get("data", {}).items()}
    now = digests(choice, index, places.datasets) if then else {}
    if other := [name for name, digest in now.items() if then.get(name, digest) != digest]:
        raise OtherResultsError(
            f"output holds {choice.name} with other files in {', '.join(other)}: take another output, or "
            "overwrite it"
        )
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


def _check_output(output: Path) -> None:
    """Checks that results and the table beside them can be written.

    Raises:
        ValueError, OSError: they cannot.
    """
    if output.suffix != ".json":
        raise ValueError(f"output must be a .json file (the table goes into a .md beside it), got {output}")
    for path in (output, output.with_suffix(".md")):
        check_free(path, True, folder=False, option="output")


def _resumed(new: Evaluation, output: Path, overwrite: bool) -> Evaluation:
    """The results in `output`, if they are of the same model and settings.

    Raises:
        OtherResultsError: they are of others.
        ValueError, OSError: it is something else.
    """
    if overwrite or not output.exists():
        return new
    old = Evaluation.load(output)
    again = "take another output, or overwrite it"
    if new.fingerprint is None:
        raise OtherResultsError(f"{output}: holds results, perhaps not of this model in memory: {again}")
    for name in ("model", "fingerprint", "settings", "versions"):
        mine, theirs = getattr(new, name), getattr(old, name)
        if mine != theirs:
            if isinstance(mine, dict):  # those that differ alone
                both = sorted({*mine, *theirs})
                keys = [key for key in both if mine.get(key) != theirs.get(key)] or both
                mine, theirs = ({key: them.get(key) for key in keys} for them in (mine, theirs))
            raise OtherResultsError(f"{output}: holds results with {name} {theirs!r}, not {mine!r}: {again}")
    old.left_out = []
    return old


def _check_auto(device: str) -> None:
    """Raises ValueError where there is no limit of memory by which sequences could be counted."""
    import torch

    if device.startswith("cpu") or (device == "auto" and not torch.accelerator.is_available()):
        raise ValueError(f'batch_size must be a number on {device}: "auto" fills the memory of a GPU')


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
