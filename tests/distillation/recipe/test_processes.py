"""A recipe that trains on two processes, by torchrun: stopped and gone on with, it learns as one does."""

import json
import os
import signal
import threading
import time

import pytest

pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from distillation.recipe.tomls import models, run, tables, write
from minitron_kernels.distillation.cli.record import checkpoints, read_record

STEPS = 20


def stop_at(out, step):
    """Ctrl-C, when the run in `out` has logged a step."""

    def watch():
        for _ in range(3000):
            time.sleep(0.02)
            try:
                if json.loads((out / "distillation.json").read_text()).get("step", 0) >= step:
                    break
            except (OSError, ValueError):
                continue
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def steps_of(out):
    return [entry["step"] for entry in read_record(out)["log"] if "loss" in entry]


def test_two_processes_are_one_batch_and_go_on(tmp_path):
    models(tmp_path)
    found = {}
    for name, processes, accumulation in (("one", 1, 2), ("two", 2, 1)):
        # a checkpoint after each step makes steps last longer than a signal takes to arrive
        length = {"steps": STEPS, "batch_size": 2, "accumulation": accumulation, "save_every": 1, "keep": 1}
        changes = {"distill": length, "evaluate": {"enabled": False}, "recipe": {"processes": processes}}
        found[name] = write(tmp_path / f"{name}.toml", tables(tmp_path, tmp_path / name, **changes))
    assert run("run", found["one"], "--quiet") == 0
    out = tmp_path / "two/distill"
    thread = stop_at(out, 2)
    code = run("run", found["two"], "--quiet")
    thread.join()
    assert code == 130
    stopped = steps_of(out)
    assert stopped == list(range(1, len(stopped) + 1)) and 2 <= len(stopped) < STEPS
    assert [path.name for path in checkpoints(out)[0]] == [f"checkpoint-{len(stopped)}"]
    assert run("run", found["two"], "--quiet") == 0
    assert steps_of(out) == list(range(1, STEPS + 1))
    assert read_record(out)["job"]["processes"] == 2 and not checkpoints(out)[0]
    one, two = (
        [entry["loss"] for entry in read_record(tmp_path / name / "distill")["log"] if "loss" in entry]
        for name in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-3)
