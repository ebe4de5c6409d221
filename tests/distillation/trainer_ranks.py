"""Two processes of this machine, joined by gloo, that run the cases of DistillationTrainer."""

import importlib
import json
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from distillation.accelerators import forget_accelerator

RANKS = 2


def run_all(rank, folder, module, names):
    """All cases; what went wrong on this rank goes into a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=120))
    CASES = importlib.import_module(f"distillation.{module}").CASES
    reports = {}
    for name in names or CASES:
        place = Path(folder) / name
        place.mkdir(exist_ok=True)
        try:
            with forget_accelerator():
                CASES[name](place)
            reports[name] = None
        except Exception:
            reports[name] = traceback.format_exc()[-6000:]
            if "Timed out" in reports[name] or "Connection closed" in reports[name]:
                raise  # the other rank has left this one alone
        (Path(folder) / f"report{rank}.json").write_text(json.dumps(reports))
        dist.barrier()
    dist.destroy_process_group()


def start(folder, names=(), timeout=600, module="trainer_rank_cases"):
    """Reports of both ranks: by case, the errors by rank."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29999",  # nothing listens there: the group is joined by a file
    }
    code = "import sys; from distillation.trainer_ranks import run_all"
    code += "; run_all(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(folder), module, *names],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    errors = []
    try:
        for rank, process in enumerate(processes):
            _, text = process.communicate(timeout=timeout)
            if process.returncode:
                report = Path(folder) / f"report{rank}.json"
                errors.append(
                    f"rank {rank}: {report.read_text()[-6000:] if report.exists() else text[-6000:]}"
                )
    finally:
        for process in processes:
            process.kill()
    assert not errors, "\n".join(errors)
    found = {}
    for rank in range(RANKS):
        for name, error in json.loads((Path(folder) / f"report{rank}.json").read_text()).items():
            found.setdefault(name, {})[rank] = error
    return found


if __name__ == "__main__":
    import shutil
    import tempfile

    folder = tempfile.mkdtemp()
    try:
        reports = start(folder, sys.argv[1:])
    finally:
        shutil.rmtree(folder)
    for name, errors in reports.items():
        bad = {rank: error for rank, error in errors.items() if error}
        print(name, "ok" if not bad else "\n".join(f"{r}: {e[-1200:]}" for r, e in bad.items()))
