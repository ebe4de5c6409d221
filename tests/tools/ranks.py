"""Processes of this machine that run the same cases, and what each of them found.

A module with cases has run_all(rank, folder, *arguments), which joins the group by a file in `folder` and
writes {case: None or what went wrong} to report{rank}.json there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

Reports = dict[str, dict[int, str | None]]  # case: what went wrong, by rank


def environment(**more: str) -> dict[str, str]:
    """One thread a process, and what this one can import."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **more}


@contextmanager
def joined(rank: int, folder: Path | str, ranks: int) -> Iterator[None]:
    """One thread, in a group that meets by a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    yield
    dist.destroy_process_group()


def run_cases(cases: Mapping[str, Callable[[], None]], rank: int, folder: Path | str, ranks: int) -> None:
    """Runs the cases one after the other on this rank; what went wrong goes into its report."""
    reports: dict[str, str | None] = {}
    with joined(rank, folder, ranks):
        for name, case in cases.items():
            try:
                case()
                reports[name] = None
            except Exception:
                reports[name] = traceback.format_exc()[-3000:]
            dist.barrier()
    (Path(folder) / f"report{rank}.json").write_text(json.dumps(reports))


def run_ranks(
    module: str,
    ranks: int,
    folder: Path | str,
    *arguments: object,
    of_rank: Sequence[Mapping[str, str]] = (),
    timeout: float = 120,
) -> Reports:
    """Starts module.run_all(rank, folder, *arguments) for each rank; `of_rank` adds to their environments."""
    code = f"import sys, {module} as cases; cases.run_all(int(sys.argv[1]), *{(str(folder), *arguments)!r})"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank)],
            env=environment(**(of_rank[rank] if of_rank else {})),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    errors = []
    try:
        for rank, process in enumerate(processes):
            _, text = process.communicate(timeout=timeout)
            if process.returncode:
                report = Path(folder) / f"report{rank}.json"
                said = report.read_text() if report.exists() else text
                errors.append(f"rank {rank}: {said[-6000:]}")
    finally:
        for process in processes:
            process.kill()
    assert not errors, "\n".join(errors)
    return read_reports(folder, ranks)


def run_forked(module: str, folder: Path | str, *arguments: object, timeout: float = 300) -> None:
    """module.fork_all(folder, *arguments) in a process of its own, which calls fork_ranks()."""
    code = f"import {module} as cases; cases.fork_all(*{(str(folder), *arguments)!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=timeout)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the ranks too
    assert process.returncode == 0, errors[-6000:]


def fork_ranks(run: Callable[[int], None], ranks: int) -> None:
    """run(rank) in copies of this process, which has imported everything once for all of them."""
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run(rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit("a rank failed")


def read_reports(folder: Path | str, ranks: int) -> Reports:
    found: Reports = {}
    for rank in range(ranks):
        for name, error in json.loads((Path(folder) / f"report{rank}.json").read_text()).items():
            found.setdefault(name, {})[rank] = error
    return found


def errors_of(reports: Reports, name: str) -> str:
    """What went wrong in a case, rank by rank; empty: nothing."""
    return "\n".join(f"rank {rank}: {error}" for rank, error in reports[name].items() if error)


def print_reports(reports: Reports) -> None:
    """A line a case, for a module that is started by hand."""
    for name in reports:
        print(name, errors_of(reports, name)[-2500:] or "ok")
