"""`minitron-distill train`: a configuration to a distilled model."""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_kernels._command.documents import check_files
from minitron_kernels._command.messages import few, say, show
from minitron_kernels._command.models import check_free, checkpoint_hash, load_config, model_files
from minitron_kernels._command.progress import without_bars
from minitron_kernels._files import full_disk, write_text
from minitron_kernels.distillation.cli import config as configs
from minitron_kernels.distillation.cli import record as records
from minitron_kernels.distillation.cli.arguments import flags_of
from minitron_kernels.distillation.cli.interrupt import Interrupt, Stopped, exit_code
from minitron_kernels.distillation.cli.job import (
    Job,
    check_length,
    check_sharding,
    choose_device,
    job_of,
    rank,
)
from minitron_kernels.distillation.cli.models import (
    Models,
    check_loss,
    check_sources,
    check_tokenizers,
    load_student,
    load_teacher,
    make_loss,
    only_cached,
)

if TYPE_CHECKING:
    from minitron_kernels.distillation.cli.data import Chosen

_PATHS = ("student", "teacher", "cache", "data", "eval_data", "out")
_ABOUT = "of this run; `minitron-distill train --resume` reads it"
# windows and tokens of which all are hashed; of more, evenly spaced ones
_MOST_WINDOWS, _MOST_TOKENS = 1 << 16, 1 << 27


def tell(kind: str, message: object) -> None:
    """A line on standard error, of the first process alone."""
    if rank() == 0:
        say("minitron-distill", kind, message)


def train(args: argparse.Namespace) -> int:
    """Runs train; returns the exit code."""
    config = configs.load("train", args.config, flags_of(args))
    if args.resume:
        config = _of_the_run(config, args)
    if args.print_config:
        if rank() == 0:
            show(configs.to_toml("train", config).rstrip("\n"))
        return 0
    configs.check_required("train", config)
    if config["lr_min"] >= config["lr"] and config["lr_schedule"] != "constant":
        raise ValueError(f"--lr-min must be below --lr {config['lr']:g}, got {config['lr_min']:g}")
    check_sharding(config)
    check_length(config)
    check_sources(config)
    for name in ("data", "eval_data"):
        check_files(config[name] or (), "--" + name.replace("_", "-"))
    config = _absolute(config)
    if not args.dry_run:
        _check_out(config, resume=args.resume, overwrite=args.overwrite)
    check_loss(config)
    device = choose_device(config["device"])
    data = _windows(config, "data", "samples")
    held_out = _windows(config, "eval_data", "eval_samples") if config["eval_data"] else None
    tokenizer = check_tokenizers(config)
    job = job_of(config, len(data))
    if args.dry_run:
        from minitron_kernels.distillation.cli.estimate import of_training

        if rank() == 0:
            show(of_training(config, job, device, len(held_out) if held_out is not None else 0))
        return 0
    return _run(config, job, device, data, held_out, tokenizer, resume=args.resume)


def _run(
    config: dict[str, Any],
    job: Job,
    device: str,
    data: Chosen,
    held_out: Chosen | None,
    tokenizer: Any,
    *,
    resume: bool,
) -> int:
    without_bars(config["quiet"])
    out = Path(config["out"])
    if resume and records.is_finished(out):
        with _alone(out):
            return _say_finished(out, _sources(config, data), config)
    student, student_weights = load_student(config)
    written = _stored_dtype(student, config)
    head = student.get_output_embeddings().weight.shape[0]
    teacher, teacher_weights = load_teacher(config, tokenizer, head)
    loss = make_loss(config, student, teacher)
    about = {"config": config, "job": vars(job), **_sources(config, data)}
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        checkpoint = _last_checkpoint(out, about) if resume else None
        started = records.read_record(out)["started"] if checkpoint is not None else None
        record = records.RunRecord(out, about, writes=rank() == 0, started=started)
        if rank() == 0 and not resume:  # --overwrite
            _clear(out)
        toml = configs.to_toml("train", config, about=_ABOUT)
        record.begin(toml, sum(p.numel() for p in student.parameters()), resumed=resume)
        if not config["quiet"]:
            tell("distilling", f"{job}, on {device}")
        models = Models(student, teacher, loss, student_weights, teacher_weights)
        windows = data, held_out
        return _train(config, job, device, models, windows, record, checkpoint, tokenizer, written)


def _train(
    config: dict[str, Any],
    job: Job,
    device: str,
    models: Models,
    windows: tuple[Chosen, Chosen | None],
    record: records.RunRecord,
    checkpoint: Path | None,
    tokenizer: Any,
    written: Any,
) -> int:
    """Trains, and writes what came out; `written` is the dtype of its weights."""
    from minitron_kernels.distillation.cli import training

    out, interrupt = Path(config["out"]), Interrupt(_say_wait)
    try:
        student, watch = training.run(config, job, device, models, windows, record, interrupt, checkpoint)
        if watch.stopped_by is None:
            training.save(student, tokenizer, config, written)
    except (Stopped, KeyboardInterrupt) as stop:
        record.update(status="stopped")
        tell("stopped", f"at once; {_how_to_go_on(out)}")
        return exit_code(stop.number if isinstance(stop, Stopped) else signal.SIGINT)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the disk may be full, and that was said
            record.update(status="failed")
        if full := full_disk(error, out):
            raise OSError(errno.ENOSPC, f"{full}: free some space; {_how_to_go_on(out)}", str(out)) from error
        raise
    drawn = config["picture"] and rank() == 0
    drawn = drawn and records.draw(record.entries.get("log", ()), out / records.PICTURE, out.name)
    if watch.stopped_by is not None:
        record.update(status="interrupted")
        step = record.entries["step"]
        name = training.name_of(watch.stopped_by)
        tell("interrupted", f"by {name} after step {step} of {job.steps}; {_how_to_go_on(out)}")
        return exit_code(watch.stopped_by)
    record.update(status="done")
    if rank() == 0:
        show(records.summary(out, job.steps, job.tokens, record.entries.get("log", ()), bool(drawn)))
    return 0


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keeps other runs out of a run's folder, by a lock on it that the first process holds until it ends.

    Raises:
        ValueError: another run is in it.
    """
    if rank() > 0:
        yield
        return
    folder = os.open(out, os.O_RDONLY | os.O_CLOEXEC)
    try:
        records.take_lock(folder, out)
        yield
    finally:
        os.close(folder)


def _of_the_run(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The configuration of the run in --out, with what may change and was given.

    Raises:
        ValueError: there is no run; an option differs that must not.
    """
    if config["out"] is None:
        raise ValueError("--resume needs --out, the run's folder")
    out = Path(config["out"])
    if not (out / records.CONFIG).is_file():
        raise FileNotFoundError(2, f"has no {records.CONFIG}: there is no run to resume", str(out))
    before = configs.load("train", out / records.CONFIG, {})
    _check_whole(out, before)
    given = {} if args.config is None else configs.read_toml("train", args.config)
    given = _absolute({**given, **flags_of(args)})
    now = {**before, **given, "out": config["out"]}
    if changed := configs.differences("train", before, now):
        raise ValueError(
            f"{out}: the run to resume has another {few(changed)}; start a new one in another --out"
        )
    return now


def _check_whole(out: Path, config: Mapping[str, Any]) -> None:
    """Checks that the configuration of a run is what its record says: a file that was cut off is TOML too.

    Raises:
        ValueError: it differs in what must not change.
    """
    if not (out / records.RECORD).is_file():  # the run was killed before it wrote the record
        return
    of_record = records.read_record(out)["config"]
    now = {name: of_record.get(name) if name in _PATHS else value for name, value in config.items()}
    if changed := configs.differences("train", of_record, now):
        raise ValueError(
            f"{out / records.CONFIG}: is not as the run wrote it, {few(changed)} differ from its record: "
            "bring it back, or start another run in another --out"
        )


def note_moved(out: Path, config: Mapping[str, Any]) -> None:
    """Notes where models and texts of the run in `out` are now; the caller knows that they are the same."""
    before = configs.load("train", out / records.CONFIG, {})
    now = {**before, **_absolute({name: config[name] for name in _PATHS if name != "out"})}
    if now != before:
        write_text(out / records.CONFIG, configs.to_toml("train", now, about=_ABOUT))


def _absolute(config: dict[str, Any]) -> dict[str, Any]:
    """With paths that hold in another folder too."""

    def full(value: Any) -> Any:
        return [os.path.abspath(one) for one in value] if isinstance(value, list) else os.path.abspath(value)

    return {
        name: full(value) if name in _PATHS and value is not None else value for name, value in config.items()
    }


def _check_out(config: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Checks that the run's folder can be written."""
    out = Path(config["out"])
    for name in ("student", "teacher", "cache"):
        if config[name] is not None and os.path.realpath(config[name]) == os.path.realpath(out):
            raise ValueError(f"--out must be another folder than --{name}, got {out}")
    if resume or rank() > 0:  # the first process may have begun the run already
        return
    if (out / records.RECORD).is_file() and not overwrite:
        raise FileExistsError(17, "has a run already; --resume, --overwrite, or another --out", str(out))
    if out.is_dir() and not any(out.iterdir()):
        return
    if overwrite and out.is_dir() and not (out / records.CONFIG).is_file():
        raise FileExistsError(17, "is not the folder of a run, and is not replaced: another --out", str(out))
    check_free(out, overwrite, folder=True, option="--out")


def _clear(out: Path) -> None:
    """Removes the checkpoints, model, tokenizer and record of a run, and nothing else: a chat template that
    the next student does not have would stay with it."""
    whole, broken = records.checkpoints(out)
    for folder in (*whole, *broken):
        shutil.rmtree(folder)
    for path in (out / records.RECORD, out / records.PICTURE, *model_files(out)):
        path.unlink(missing_ok=True)


def _windows(config: dict[str, Any], key: str, samples: str) -> Chosen:
    """The windows of --data or --eval-data."""
    from minitron_kernels.distillation.cli.data import read_windows  # torch, which is slow

    option = "--" + key.replace("_", "-")
    data = read_windows(
        config[key],
        config["student"],
        seq_len=config["seq_len"],
        samples=config[samples],
        seed=config["seed"],
        option=option,
        text_key=config["text_key"],
    )
    if config[samples] is not None and len(data) < config[samples]:
        tell(
            "warning",
            f"{option} has {len(data)} windows of {config['seq_len']} tokens, not {config[samples]}",
        )
    if absent := only_cached(config, data, option):
        tell(
            "warning",
            f"{absent} of {absent + len(data)} windows of {option} are not in the cache, and left out",
        )
    return data


def _digest(data: Chosen) -> dict[str, Any]:
    """What must be the same where a run is resumed: the number of windows, and the tokens in them.

    All of them up to 65,536 windows and 2^27 tokens; of more, so many that are evenly spaced.
    """
    step = max(1, -(-len(data) // _MOST_WINDOWS), -(-len(data) * data.windows.length // _MOST_TOKENS))
    sums = hashlib.sha256()
    for index in range(0, len(data), step):
        sums.update(data[index]["input_ids"].numpy().tobytes())
    return {"windows": len(data), "sha256": sums.hexdigest()}


def _sources(config: dict[str, Any], data: Chosen) -> dict[str, Any]:
    """What a run learns from, by content."""
    return {"data": _digest(data), "teacher": _teacher_of(config)}


def _teacher_of(config: dict[str, Any]) -> str | None:
    """Who teaches, by content; of the first process alone, since it is read whole."""
    if rank() > 0:
        return None
    if config["cache"] is not None:
        from minitron_kernels.distillation.cache import TeacherCache

        return f"cache {TeacherCache(config['cache']).spec.sha256}"
    return None if config["teacher"] is None else checkpoint_hash(Path(config["teacher"]))


def _stored_dtype(student: Any, config: dict[str, Any]) -> Any:
    """The dtype in which the student is written."""
    import torch

    name = config["save_dtype"]
    if name == "auto":
        found = load_config(Path(config["student"])).dtype
        return found or student.dtype
    return getattr(torch, name)


def _say_finished(out: Path, about: dict[str, Any], config: dict[str, Any]) -> int:
    """Of a run that is done: it stays as it is."""
    record = _check_same(out, about)
    if rank() == 0:
        job, log = record["job"], record.get("log", [])
        tokens = job["steps"] * job["per_step"] * job["seq_len"]
        if not config["quiet"]:
            tell("finished", f"{job['steps']:,} steps are done; the run is left as it is")
        show(records.summary(out, job["steps"], tokens, log, (out / records.PICTURE).is_file()))
    return 0


def _check_same(out: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The record of the run in `out`, which is to be one of the same.

    Raises:
        ValueError: the data or the teacher are others than the run's.
    """
    before = records.read_record(out)
    if before["data"] != about["data"]:
        raise ValueError(f"{out}: the run to resume has other --data: its files have changed since")
    if rank() == 0 and before["teacher"] != about["teacher"]:
        which = "cache" if before["config"]["cache"] else "teacher"
        raise ValueError(f"{out}: the run to resume has another --{which}: its files have changed since")
    return before


def _last_checkpoint(out: Path, about: dict[str, Any]) -> Path | None:
    """The newest complete checkpoint of the run; None: it begins anew.

    Raises ValueError as _check_same(), and for another number of windows in a step."""
    before = _check_same(out, about)
    if before["job"]["per_step"] != about["job"]["per_step"]:
        raise ValueError(
            f"{out}: the run to resume has {before['job']['per_step']} windows in a step, of "
            f"{before['job']['processes']} processes; with {about['job']['processes']} they are "
            f"{about['job']['per_step']}"
        )
    whole, broken = records.checkpoints(out)
    if broken:
        tell("warning", f"{few([path.name for path in broken])}: not complete, and not used")
    if not whole:
        tell("warning", f"{out}: has no complete checkpoint: the run begins anew")
    return whole[-1] if whole else None


def _say_wait(number: int) -> None:
    # a handler runs inside whatever the process is doing, perhaps inside a write to stderr's buffer
    if rank() == 0:
        os.write(2, b"\nminitron-distill: stopping after this step; once more to stop at once\n")


def _how_to_go_on(out: Path) -> str:
    whole, _ = records.checkpoints(out)
    where = f"from {whole[-1].name}" if whole else "from the beginning, there is no checkpoint yet"
    return f"minitron-distill train --resume -o {out} goes on {where}"
