"""Measures time in turns with a floor, and the peak memory of a call; runs work in a fresh process.

Machines are shared and drift, so an absolute time says little. The figure to trust is the ratio to the floor,
timed in turns with it in one process, in *busy seconds*: on the CPU the user + system seconds of the process,
on CUDA the time between two events on the stream, without the latency of launches (see gpu_clock).
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.gpu_clock import GpuTimer, Sample
from common.scripts import FOLDER

MIB = 2**20


class CpuTimer:
    """Samples of one call by the clocks of this process."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call, self.calls = call, 0

    def sample(self) -> Sample:
        wall, busy = time.perf_counter(), time.process_time()
        self.call()
        self.calls += 1
        return Sample(time.perf_counter() - wall, time.process_time() - busy)


def timer(call: Callable[[], object], device: str) -> CpuTimer | GpuTimer:
    """Takes samples of `call` by its method sample(); its `calls` says how often that called."""
    return GpuTimer(call) if torch.device(device).type == "cuda" else CpuTimer(call)


def sample(call: Callable[[], object], device: str) -> Sample:
    """Times one call: wall seconds and busy seconds."""
    return timer(call, device).sample()


@dataclass
class Pairs:
    """Samples taken in turns: floor, call, floor, call, ...; and how often the call was made for them."""

    floor: list[Sample]
    call: list[Sample]
    calls: int = 0

    @property
    def ratios(self) -> list[float]:
        return [call.busy_s / floor.busy_s for floor, call in zip(self.floor, self.call, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """What a worker answers: lists of [wall, busy], and in how many samples launches are seen."""
        sides = {"floor": self.floor, "call": self.call}
        lists = {name: [[one.wall_s, one.busy_s] for one in samples] for name, samples in sides.items()}
        return lists | {"launches_seen": sum(not one.hidden for one in self.call)}


def interleave(
    floor: Callable[[], object],
    call: Callable[[], object],
    device: str,
    *,
    budget_s: float,
    reps: tuple[int, int],
) -> Pairs:
    """Takes turns until `budget_s` is spent, at least reps[0] and at most reps[1] times."""
    pairs = Pairs([], [])
    timers = timer(floor, device), timer(call, device)
    begin = time.perf_counter()
    while len(pairs.call) < reps[1]:
        pairs.floor.append(timers[0].sample())
        pairs.call.append(timers[1].sample())
        spent = time.perf_counter() - begin
        mean = spent / len(pairs.call)
        if len(pairs.call) >= reps[0] and spent + mean > budget_s:
            break
    pairs.calls = timers[1].calls
    return pairs


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, linear between the order statistics, as NumPy's default."""
    if not values:
        raise ValueError("quantile of no values")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def summarize(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": quantile(values, 0.5),
        "p20": quantile(values, 0.2),
        "p80": quantile(values, 0.8),
        "n": len(values),
    }


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def extra_peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """The most bytes that one call adds to the memory of the process; None where that cannot be measured.

    On the CPU it is the kernel's high-water mark of resident pages, which is reset before the call. Use it
    once in a fresh process, after a warm-up that loads libraries: memory that earlier work kept is not seen.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # returns freed pages, so that using them again is seen
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
        before = status_bytes("VmRSS")
    except (OSError, AttributeError):  # not Linux with glibc, or not permitted
        call()
        return None
    call()
    return max(0, status_bytes("VmHWM") - before)


def write_json(path: Path | None, result: dict[str, Any], *, complete: bool) -> None:
    """Replaces the file `path`, whole or not at all: a run that is cut off leaves what it had measured."""
    if path is None:
        return
    result["complete"] = complete
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(beside, path)


class WorkerError(RuntimeError):
    """A worker ended without a result; the message says why."""


def worker_environment(threads: int) -> dict[str, str]:
    """The environment of a worker: its number of threads, and where it finds what it imports."""
    env = os.environ | {
        name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    }
    env["PYTHONPATH"] = os.pathsep.join([str(FOLDER), *filter(None, [env.get("PYTHONPATH")])])
    return env


def run_worker(
    script: Path, spec: dict[str, Any], *, threads: int, timeout_s: float = 3600
) -> dict[str, Any]:
    """Runs `script` in a fresh process with `spec` as JSON on its standard input; returns its JSON answer."""
    env = worker_environment(threads)
    command = [sys.executable, str(script)]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(spec),
            capture_output=True,
            text=True,
            env=env,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise WorkerError(f"took more than {timeout_s:.0f} s") from None
    if done.returncode == 0:
        return json.loads(done.stdout)
    if done.returncode < 0:
        raise WorkerError(
            f"killed by signal {-done.returncode}" + (" (memory?)" if done.returncode == -9 else "")
        )
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    raise WorkerError(lines[-1].strip() if lines else f"exit status {done.returncode}")


def answer(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The worker's side of run_worker(): only the answer goes to standard output, not libraries' prints."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    json.dump(work(json.load(sys.stdin)), out)
    out.flush()
