"""Kills prune_checkpoint() again and again, in children of this process; prints what was found as JSON.

    python -m pruning.crash_runs SRC PLAN DST KIND RUNS

KIND "steps": a child for each call that changes the disk, killed just before that call. "times": children
that are killed after a random part of the time that a whole run takes, until RUNS of them were; those that
ended before do not count, and end the attempt where they are most. At DST there is nothing before,
or with "overwrite-steps" a copy of SRC. After each, DST must be that or complete; then a second call must
complete it.
"""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from minitron_kernels.pruning.checkpoint import prune as prune_module
from minitron_kernels.pruning.checkpoint.prune import prune_checkpoint
from minitron_kernels.pruning.checkpoint.staging import partial_path
from minitron_kernels.pruning.cut.skeleton import expected_shapes
from minitron_kernels.pruning.plan.make_plan import PruningPlan
from tools.crashes import ended, in_child

# an fsync changes nothing for who is killed and not unplugged; of the writes of blocks each fifth is enough
CHANGES_DISK = ("open", "pwrite", "rename", "replace", "mkdir", "unlink", "posix_fallocate")
EVERY = {"pwrite": 5}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def die_at(step):
    """Makes this process kill itself before the call number `step` that changes the disk."""
    left, os_open = step, os.open

    def wrap(call, every):
        calls = itertools.count(1)

        def counted(*args, **kwargs):
            nonlocal left
            only_reads = call is os_open and not args[1] & (os.O_CREAT | os.O_TRUNC)
            left -= not only_reads and next(calls) % every == 0
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted

    for name in CHANGES_DISK:
        setattr(os, name, wrap(getattr(os, name), EVERY.get(name, 1)))


def main(src, plan, dst, kind, runs):
    torch.set_num_threads(1)  # a fork must not inherit a pool of threads that it does not have
    plan = PruningPlan.load(plan)
    expected_shapes(plan.target_config)  # imports transformers here, and not in each of the children
    prune_module.check_result = lambda *args: None  # changes nothing on the disk
    overwrite = kind.startswith("overwrite")

    def prune(target=dst):
        prune_checkpoint(
            src, target, plan, max_shard_bytes=30_000, threads=2, overwrite=overwrite, progress=False
        )

    whole = dst.with_name("whole")
    begin = time.perf_counter()
    assert ended(in_child(lambda: prune(whole))) == 0
    duration = time.perf_counter() - begin
    want = contents(whole)
    old = contents(src) if overwrite else None
    found = {"killed": 0, "old": 0, "new": 0, "kept": 0, "wrong": []}
    random.seed(0)
    step = 0
    while kind != "times" or (found["killed"] < runs and step < 4 * runs):
        shutil.rmtree(dst, ignore_errors=True)
        if overwrite:
            shutil.copytree(src, dst)
        if kind == "times":
            pid = in_child(prune)
            time.sleep(random.random() * duration)
            os.kill(pid, signal.SIGKILL)
        else:
            pid = in_child(lambda step=step: (die_at(step), prune()))
        end = ended(pid)
        if kind != "times" and end == 0:
            break
        found["killed"] += end == -signal.SIGKILL
        is_old = contents(dst) == old if overwrite else not os.path.lexists(dst)
        is_new = not is_old and contents(dst) == want
        found["old"] += is_old
        found["new"] += is_new
        journal = partial_path(dst) / "journal.jsonl"
        found["kept"] += journal.is_file() and len(journal.read_text().splitlines()) > 1
        if not is_old and not is_new:
            found["wrong"].append(f"step {step}: {sorted(contents(dst)) if dst.exists() else 'nothing'}")
        if is_old and (ended(in_child(prune)) != 0 or contents(dst) != want):
            found["wrong"].append(f"step {step}: the second call")
        shutil.rmtree(partial_path(dst), ignore_errors=True)
        step += 1
    found["steps"] = step
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
