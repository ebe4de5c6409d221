"""Kills writers of a cache at a hundred of their system calls, and lets several write at once; prints JSON.

    python -m distillation.cache_crash_runs FOLDER

Children are forks of this process. A child is killed just before one call that changes the disk. What it had
finished must be there and whole; at most one shard is lost; a second writer completes the same set.
"""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch

from distillation.cache_rows import payload_of, same, spec_of, tokens_of
from minitron_kernels.distillation.cache import files
from minitron_kernels.distillation.cache.reader import TeacherCache
from minitron_kernels.distillation.cache.writer import TeacherCacheWriter
from tools.crashes import ended, in_child

CHANGES_DISK = ("open", "pwrite", "rename", "link", "unlink", "mkdir")
SEQUENCES, A_SHARD = 16, 1
TIER = "topk"
ROWS = [(tokens_of(n), payload_of(tokens_of(n), TIER)) for n in range(SEQUENCES)]


def die_at(step):
    """Makes this process kill itself at the call number `step` that changes the disk, before or after it;
    returns a counter."""
    left, os_open = [step], os.open

    def wrap(call):
        def counted(*args, **kwargs):
            left[0] -= not (call is os_open and not args[1] & os.O_CREAT)
            if left[0] >= 0:
                return call(*args, **kwargs)
            if random.Random(step).random() < 0.5:
                call(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        return counted

    for name in CHANGES_DISK:
        setattr(os, name, wrap(getattr(os, name)))
    return left


def fill(folder, order=None):
    """One writer's work: A_SHARD sequences a shard; a mark outside of the folder when one is finished."""
    with TeacherCacheWriter(folder, spec_of(TIER)) as writer:
        for at, n in enumerate(order or range(SEQUENCES)):
            writer.add(*ROWS[n])
            if at % A_SHARD == A_SHARD - 1:
                writer.flush()
                with open(folder.with_name("finished"), "a") as marks:
                    marks.write("x" * A_SHARD)


def contents(folder):
    """{sequence: whether its payload is right} of those that are there; each is read, with its checksum."""
    cache = TeacherCache(folder)
    there = [n for n in range(SEQUENCES) if ROWS[n][0] in cache]
    assert len(cache) == len(there)
    return {n: same(cache.row(ROWS[n][0]), ROWS[n][1]) for n in there}


def kills(base, found):
    marks = base / "finished"

    def steps_of_a_whole_run():
        left = die_at(1 << 40)
        fill(base / "whole")
        (base / "steps").write_text(str((1 << 40) - left[0]))

    assert ended(in_child(steps_of_a_whole_run)) == 0
    steps = int((base / "steps").read_text())
    points = list(range(steps)) if steps <= 100 else sorted(random.sample(range(steps), 100))
    found["steps"] = steps
    for step in points:
        shutil.rmtree(base / "c", ignore_errors=True)
        marks.unlink(missing_ok=True)
        end = ended(in_child(lambda step=step: (die_at(step), fill(base / "c"))))
        found["killed"] += end == -signal.SIGKILL
        finished = len(marks.read_text()) if marks.exists() else 0
        there = contents(base / "c") if (base / "c" / "cache.json").exists() else {}
        found["temporaries"] += (
            any((base / "c").glob(".minitron-cache-*.tmp")) if (base / "c").exists() else 0
        )
        found["at a shard"] += len(there) > finished
        if not all(there.values()) or sorted(there) != list(range(len(there))) or len(there) % A_SHARD:
            found["wrong"].append(f"step {step}: {there}")
        if not finished <= len(there) <= finished + A_SHARD:
            found["wrong"].append(f"step {step}: {finished} finished, {len(there)} there")
        fill(base / "c")
        if contents(base / "c") != dict.fromkeys(range(SEQUENCES), True):
            found["wrong"].append(f"step {step}: the second writer")
        if left := [path.name for path in (base / "c").iterdir() if path.suffix == ".tmp"]:
            found["wrong"].append(f"step {step}: left {left}")


def at_once(base, found):
    """Three writers with overlapping work in one folder, and a reader that looks meanwhile."""
    numbers = list(range(SEQUENCES))
    orders = [numbers[:12], numbers[::-1][:12], numbers[1::2]]
    pids = [in_child(lambda order=order: fill(base / "many", order)) for order in orders]
    alive = set(pids)
    while alive:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            alive.discard(pid)
            found["writers"] += os.waitstatus_to_exitcode(status) == 0
        if (base / "many" / "cache.json").exists():
            found["reads"] += 1
            if not all(contents(base / "many").values()):
                found["wrong"].append("a reader meanwhile")
    if contents(base / "many") != dict.fromkeys(range(SEQUENCES), True):
        found["wrong"].append("several writers")


def main(base):
    torch.set_num_threads(1)  # a fork must not inherit a pool of threads that it does not have
    random.seed(0)
    files.BLOCK_BYTES = 60  # several writes a shard
    found = {"killed": 0, "temporaries": 0, "at a shard": 0, "writers": 0, "reads": 0, "wrong": []}
    at_once(base, found)
    os.fsync = lambda fd: None
    kills(base, found)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
