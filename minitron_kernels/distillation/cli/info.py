"""Describes the run or the cache in a folder, for `minitron-distill info`. Only --verify loads torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitron_kernels._command.messages import message_of
from minitron_kernels.distillation.cache.spec import SPEC_FILE
from minitron_kernels.distillation.cache.summary import summarise
from minitron_kernels.distillation.cli import record as records


def describe(path: Path, *, verify: bool = False) -> str:
    """A few lines about the run or the cache in `path`.

    Args:
        path: the folder.
        verify: read all files of a cache and check their sums; of a run, that its checkpoints and, where it
            is done, the model's files are complete.

    Raises:
        FileNotFoundError, ValueError: there is nothing, something else, or a damaged file; without `verify`
            an incomplete model or checkpoint is a line.
    """
    if not path.exists():
        raise FileNotFoundError(2, "No such file or folder", str(path))
    if (path / records.RECORD).is_file():
        return _about_run(path, verify)
    if (path / SPEC_FILE).is_file():
        return _about_cache(path, verify)
    hint = "; for a checkpoint: minitron-prune info" if (path / "config.json").is_file() else ""
    raise ValueError(
        f"{path}: has neither {records.RECORD} nor {SPEC_FILE}: it is not a run, nor a teacher's cache{hint}"
    )


def _about_cache(path: Path, verify: bool) -> str:
    if not verify:
        return str(summarise(path))
    from minitron_kernels.distillation.cache import TeacherCache  # torch, which is slow

    summary = TeacherCache(path).verify()
    if not summary.sequences:
        raise ValueError(f"{path}: holds no sequence to verify; minitron-distill cache puts some in")
    return f"{summary}\n  verified: every checksum and every sequence's tokens are right"


def _about_run(path: Path, verify: bool) -> str:
    record = records.read_record(path)
    try:
        return _described(path, record, verify)
    except (KeyError, TypeError, AttributeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path / records.RECORD}: is damaged: {what}") from None


def _described(path: Path, record: dict[str, Any], verify: bool) -> str:
    config, job, log = record["config"], record["job"], record.get("log", [])
    step = record.get("step", 0)
    teacher = config["cache"] or config["teacher"] or "the text alone"
    lines = [
        f"{path}: distillation run, {record['status']}, step {step:,} of {job['steps']:,}",
        f"  {config['student']} from {teacher}",
        f"  {record.get('parameters', 0):,} parameters; "
        f"{step * job['per_step'] * job['seq_len']:,} tokens of "
        f"{job['steps'] * job['per_step'] * job['seq_len']:,}, {job['per_step']:,} windows of "
        f"{job['seq_len']:,} in a step",
        f"  started {record['started']}, last written {record.get('updated', 'never')}",
        "  " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    ]
    lines += _losses(log)
    whole, broken = records.checkpoints(path)
    names = ", ".join(checkpoint.name for checkpoint in whole) or "none"
    lines.append(f"  checkpoints: {names}" + (f"; not complete: {len(broken)}" if broken else ""))
    if record["status"] not in ("done", "running") and whole:
        lines.append(f"  minitron-distill train --resume -o {path} goes on")
    has_model = record["status"] == "done"
    if verify and broken:
        rest = f"the run goes on from {whole[-1].name}" if whole else "there is no other to go on from"
        rest = "the run is done, and does not need it" if has_model else rest
        raise ValueError(f"{broken[0]}: is not complete: delete it; {rest}")
    if has_model:
        try:
            lines.append(f"  model: {_about_model(path)}")
        except (OSError, ValueError) as error:
            again = f"; minitron-distill train --resume -o {path} writes it again" if whole else ""
            reason = f"{message_of(error)}{again}"
            if verify:
                raise ValueError(reason) from None
            lines.append(f"  model: not complete: {reason}")
    if verify:
        what = ["the model's files"] if has_model else []
        what += [names] if whole else []
        lines.append(f"  verified: complete: {', '.join(what)}" if what else "  nothing to verify yet")
    return "\n".join(lines)


def _about_model(path: Path) -> str:
    """How large the weights in a folder are; raises as records.model_of() does."""
    size, files = records.model_of(path)
    return f"{size / 1e9:.3g} GB in {files} file{'s' if files > 1 else ''}"


def _losses(log: list[dict[str, Any]]) -> list[str]:
    """First and last value of each curve."""
    lines = []
    for name, (steps, values) in records.curves(log).items():
        lines.append(
            f"  {name:<14}{values[0]:>10.4f} at step {steps[0]:,} → {values[-1]:.4f} at {steps[-1]:,}"
        )
    return lines
