"""What a run leaves beside its model: distillation.toml, distillation.json and distillation.png."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitron_kernels._files import write_text
from minitron_kernels.pruning.checkpoint.safetensors_files import open_folder, read_json

CONFIG, RECORD, PICTURE = "distillation.toml", "distillation.json", "distillation.png"
COMPLETE = "complete"  # a file in a checkpoint's folder, written after all others: their names and sizes
FORMAT, VERSION = "minitron-distillation-run", 1
# what every record has; the rest comes with the run
_ENTRIES = {
    **{"status": str, "started": str, "config": dict, "job": dict, "versions": dict},
    **{"step": int, "parameters": int, "log": list},
}
_SHOWN = {str: "a string", dict: "an object", int: "a whole number", list: "a list"}
_OF_CONFIG = ("student", "teacher", "cache")
_OF_JOB = ("steps", "per_step", "seq_len", "processes")
_PACKAGES = ("torch", "transformers", "accelerate", "triton", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """What the run is made with."""
    import minitron_kernels

    found = {"minitron_kernels": minitron_kernels.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class RunRecord:
    """distillation.json, which is written anew when something has happened.

    Entries: format, version, status (running, interrupted, stopped, failed, done), config, versions, sizes of
    the run, step, log (what was logged, in order: of training and of evaluation), times in UTC.
    """

    def __init__(
        self, folder: Path, about: Mapping[str, Any], *, writes: bool, started: str | None = None
    ) -> None:
        self.path = folder / RECORD
        self._writes = writes
        self.entries: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "status": "running",
            **about,
            "versions": versions(),
            "started": started or now(),
        }

    def begin(self, toml: str, parameters: int, *, resumed: bool) -> None:
        """Writes the configuration and the record; where they cannot be written, a new run leaves nothing."""
        config = self.path.with_name(CONFIG)
        try:
            if self._writes:
                write_text(config, toml)
            self.update(parameters=parameters)
        except OSError:
            if not resumed:
                config.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # it has other files
                    config.parent.rmdir()
            raise

    def update(self, **entries: Any) -> None:
        """Sets entries and writes the file."""
        self.entries |= entries
        self.entries["updated"] = now()
        if self._writes:
            write_text(self.path, json.dumps(self.entries, indent=1, ensure_ascii=False) + "\n")


def take_lock(handle: int, folder: Path) -> None:
    """Takes the lock on an open file, by which runs keep each other out of a folder.

    Raises:
        ValueError: another run has it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: another run is at work in it; wait for it, or end it") from None
    except OSError:  # a file system without locks
        return


def now() -> str:
    """The time in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a run.

    Raises:
        ValueError: it is damaged, or of another format.
    """
    path = folder / RECORD
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is damaged: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("version") != VERSION:
        raise ValueError(f"{path}: is not the record of a run of this release of minitron-distill")
    for name, kind in _ENTRIES.items():
        if not isinstance(found.get(name, [] if name == "log" else 0), kind):
            raise ValueError(f"{path}: is damaged: {name} must be {_SHOWN[kind]}")
    lacking = [f"job.{name}" for name in _OF_JOB if not isinstance(found["job"].get(name), int)]
    lacking += [f"config.{name}" for name in _OF_CONFIG if name not in found["config"]]
    if lacking:
        raise ValueError(f"{path}: is damaged: it lacks {', '.join(lacking)}")
    return found


def model_of(folder: Path) -> tuple[int, int]:
    """(bytes, number) of the files of weights in a folder, which must be as long as their headers say.

    Raises:
        OSError, ValueError: a file is missing or damaged.
    """
    read_json(folder / "config.json")
    with open_folder(folder) as found:
        return sum(file.size for file in found.files), len(found.files)


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder is done, and its model whole."""
    if read_record(folder)["status"] != "done":
        return False
    try:
        model_of(folder)
    except (OSError, ValueError):
        return False
    return True


def mark_complete(checkpoint: Path) -> None:
    """Marks a checkpoint all of whose files are written."""
    files = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in _files_of(checkpoint)}
    write_text(checkpoint / COMPLETE, json.dumps({"files": files}, indent=1) + "\n")


def _files_of(checkpoint: Path) -> list[Path]:
    return [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != COMPLETE]


def _is_whole(checkpoint: Path) -> bool:
    """Whether it has its mark, and all files with the sizes that this names: one that lacks its optimizer's
    state would be gone on with, with another."""
    try:
        files = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def checkpoints(folder: Path) -> tuple[list[Path], list[Path]]:
    """(complete checkpoints, broken ones), each by step."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdecimal()]
    found.sort(key=_step_of)
    whole = [path for path in found if _is_whole(path)]
    return whole, [path for path in found if path not in whole]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def keep_last(folder: Path, keep: int) -> None:
    """Removes all complete checkpoints but the last `keep`, and broken ones of earlier steps."""
    whole, broken = checkpoints(folder)
    last = _step_of(whole[-1]) if whole else -1
    for old in [*whole[: max(len(whole) - keep, 0)], *(one for one in broken if _step_of(one) < last)]:
        (old / COMPLETE).unlink(missing_ok=True)  # first: what is left of it by a kill is not complete
        shutil.rmtree(old, ignore_errors=True)


def curves(log: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """{name: (steps, values)} of the losses in a log; those of evaluation are named "kl, held out"."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for entry in log:
        for key, value in entry.items():
            name = key.removeprefix("eval_")
            if name not in ("loss", "kl", "ce", "hidden") or not isinstance(value, int | float):
                continue
            steps, values = found.setdefault(f"{name}, held out" if name != key else name, ([], []))
            steps.append(entry["step"])
            values.append(value)
    return found


def summary(out: Path, steps: int, tokens: int, log: Any, drawn: bool) -> str:
    """The run in a line or two."""
    last: Any = next((entry for entry in reversed(log) if "loss" in entry), {})
    held_out = [entry for entry in log if "eval_kl" in entry]
    figures = ", ".join(f"{name} {last[name]:.4f}" for name in ("loss", "kl", "ce") if name in last)
    lines = [f"{out}: {steps:,} steps, {tokens:,} tokens; at the end {figures}"]
    if held_out:
        first, final = held_out[0], held_out[-1]
        lines.append(
            f"  held out: kl {first['eval_kl']:.4f} → {final['eval_kl']:.4f}, perplexity "
            f"{first['eval_perplexity']:.4g} → {final['eval_perplexity']:.4g}"
        )
    names = [RECORD, CONFIG] + [PICTURE] * drawn
    lines.append(f"  the model, its tokenizer, {', '.join(names)}")
    return "\n".join(lines)


def draw(log: Sequence[Mapping[str, Any]], path: Path, title: str) -> bool:
    """Draws the curves of a log as PNG; False where there is no matplotlib, or no two points."""
    found = curves(log)
    for end in ("", ", held out"):  # a loss that is the KL alone would hide it
        loss, kl = (found.get(f"{name}{end}", ([], []))[1] for name in ("loss", "kl"))
        if len(loss) == len(kl) and all(abs(a - b) <= 1e-4 * abs(b) for a, b in zip(loss, kl, strict=True)):
            found.pop(f"loss{end}", None)
    if not any(len(steps) > 1 for steps, _ in found.values()):
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    colors = {"loss": "C7", "kl": "C0", "ce": "C1", "hidden": "C2"}
    for name, (steps, values) in found.items():
        held_out = name.endswith("held out")
        style = {"marker": "o", "markersize": 4, "linestyle": "--"} if held_out else {"linestyle": "-"}
        axes.plot(steps, values, label=name, color=colors[name.split(",")[0]], **style)
    axes.set(xlabel="optimizer step", ylabel="nats a token", title=title)
    low = min(min(values) for _, values in found.values())
    if low > 0 and max(max(values) for _, values in found.values()) > 20 * low:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(aside, format="png", dpi=120)
    os.replace(aside, path)
    return True
