"""Two processes of this machine, joined by gloo, that run the cases of DistillationTrainer."""

import importlib
import json
import sys
import tempfile
import traceback
from pathlib import Path

import torch.distributed as dist

from distillation.accelerators import forget_accelerator
from tools.ranks import joined, print_reports, run_ranks

RANKS = 2


def run_all(rank, folder, module, names):
    """All cases; what went wrong on this rank goes into a file."""
    CASES = importlib.import_module(f"distillation.{module}").CASES
    reports = {}
    with joined(rank, folder, RANKS):
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


def start(folder, names=(), timeout=600, module="trainer_rank_cases"):
    """Reports of both ranks: by case, the errors by rank."""
    group = {
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29999",  # nothing listens there: the group is joined by a file
    }
    of_rank = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(RANKS)]
    return run_ranks(
        "distillation.trainer_ranks", RANKS, folder, module, list(names), of_rank=of_rank, timeout=timeout
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print_reports(start(place, sys.argv[1:]))
