"""The training stages: `minitron-distill train` in this process, or in those that torchrun starts."""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from minitron_kernels.distillation.cli import config as configs
from minitron_kernels.distillation.cli import record as records
from minitron_kernels.distillation.cli.interrupt import SIGNALS
from minitron_kernels.distillation.cli.tables import options_of
from minitron_kernels.distillation.recipe.graph import Node, needs_teacher
from minitron_kernels.distillation.recipe.stages import Context


def train(node: Node, into: Path, context: Context) -> int:
    """Trains, from the beginning or from a checkpoint of the same run; returns an exit code.

    Args:
        node: of correct or distill.
        into: its folder.
        context: see there.
    """
    from minitron_kernels.distillation.cli.train import note_moved, train

    flags = flags_of(node, into, context)
    begun = (into / records.CONFIG).is_file() and (into / records.RECORD).is_file()
    if begun and records.read_record(into).get("status") == "done":  # it was killed before its note
        return 0
    if not begun and into.exists():
        shutil.rmtree(into)
    if begun:  # texts and folders may have moved: their digests say that they are the same
        note_moved(into, flags)
    if node.config["processes"] > 1:
        return _by_torchrun(flags, node.config["processes"], into, begun, context.lock)
    how = {"config": None, "print_config": False, "dry_run": False, "overwrite": False, "debug": True}
    return train(argparse.Namespace(command="train", resume=begun, **how, **flags))


def flags_of(node: Node, into: Path, context: Context) -> dict[str, Any]:
    """The options of `minitron-distill train` for a stage."""
    known = options_of("train")
    flags = {name: value for name, value in node.config.items() if name in known}
    flags |= {"out": str(into), "quiet": context.quiet, "cache": None, "teacher": None}
    if node.stage == "correct":  # the model learns the text
        flags["student"] = str(context.folder(node, "model"))
        flags |= {name: option.default for name, option in known.items() if name not in flags}
        return flags | {"kl_weight": 0.0, "ce_weight": 1.0}
    flags["student"] = str(context.folder(node, "student"))
    if needs_teacher(node.config):
        flags["teacher"] = str(context.folder(node, "teacher"))
    return flags


def command_of(processes: int, file: Path, *, resume: bool, out: Path) -> list[str]:
    """What starts a training stage on several processes."""
    begin = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    end = ["--resume", "-o", str(out)] if resume else ["--config", str(file)]
    return [*begin, "-m", "minitron_kernels.distillation", "train", *end]


def _by_torchrun(
    flags: dict[str, Any], processes: int, into: Path, begun: bool, lock: int | None = None
) -> int:
    """Runs the command; a signal goes on to it, and it is waited for.

    It holds the lock of the recipe's folder too: if the recipe alone is killed, the next one must not train
    beside it.
    """
    file = into.parent / f".{into.name}.toml"
    into.parent.mkdir(parents=True, exist_ok=True)
    records.write_text(file, configs.to_toml("train", flags))
    got: list[int] = []
    # in a session of its own it gets no Ctrl-C from the terminal, but the signal that is passed on
    command = command_of(processes, file, resume=begun, out=into)
    held = () if lock is None else (lock,)
    child = subprocess.Popen(command, start_new_session=True, pass_fds=held)

    def pass_on(number: int, frame: Any) -> None:
        got.append(number)
        child.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if child.poll() is None:
            child.kill()
    file.unlink(missing_ok=True)
    if got:
        return 128 + got[0]
    if code:
        raise RuntimeError(f"{into}: torchrun ended with exit code {code}: its messages are above")
    return 0


def drop_checkpoints(into: Path) -> None:
    """Removes the checkpoints of a finished run, which are three times its weights and more."""
    for folder in into.glob("checkpoint-*"):
        shutil.rmtree(folder)
