"""Processes of this machine, joined by gloo, that run the cases of a vocabulary over several ranks."""

import json
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from kl_loss.sparse_parallel_cases import check_sparse, sparse_cases
from kl_loss.vocab_parallel_calls import CASES
from kl_loss.vocab_parallel_cases import check, value_cases


def cases_of(world):
    """By name functions and their arguments; groups of more than two run what depends on their size."""
    cases = {name: (check, options) for name, options in value_cases(world).items()}
    cases |= {name: (f, {}) for name, f in CASES.items()}
    cases |= {name: (check_sparse, options) for name, options in sparse_cases(world).items()}
    chosen = {
        3: ("uneven", "parts", "gpu_parts_store", "padding_inside", "padding_behind", "bias_jsd",
            "bias_reverse", "what_is_sent", "sparse_store_chunks", "sparse_reverse_double"),
        4: ("padding_only", "padding_only_reverse", "gpu_padding_only", "parts_jsd_none", "double_jsd",
            "recompute", "what_does_not_fit", "sparse_padding_only"),
    }  # fmt: skip
    return {name: cases[name] for name in chosen.get(world, cases)}


def run_all(rank, ranks, folder, names):
    """All cases on groups of each size up to `ranks`; what went wrong on this rank goes into a file."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    reports = {}
    for world in range(2, ranks + 1):
        members = list(range(ranks - world, ranks))  # so that ranks of the group are not those of the world
        group = dist.new_group(members)
        if rank in members:
            for name, (f, options) in cases_of(world).items():
                if names and name not in names:
                    continue
                try:
                    f(group, **options)
                    reports[f"{world}-{name}"] = None
                except Exception:
                    reports[f"{world}-{name}"] = traceback.format_exc()[-3000:]
                dist.barrier(group)
        dist.barrier()
    (Path(folder) / f"report{rank}.json").write_text(json.dumps(reports))
    dist.destroy_process_group()


def start(ranks, folder, names=(), timeout=120):
    """Reports of all ranks: by case, the errors by rank."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    what = (ranks, str(folder), list(names))
    code = f"import kl_loss.ranks as ranks, sys; ranks.run_all(int(sys.argv[1]), *{what})"
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    errors = []
    try:
        for rank, process in enumerate(processes):
            _, text = process.communicate(timeout=timeout)
            if process.returncode:
                errors.append(f"rank {rank}: {text[-3000:]}")
    finally:
        for process in processes:
            process.kill()
    assert not errors, "\n".join(errors)
    found = {}
    for rank in range(ranks):
        for name, error in json.loads((Path(folder) / f"report{rank}.json").read_text()).items():
            found.setdefault(name, {})[rank] = error
    return found


if __name__ == "__main__":
    import shutil
    import tempfile

    folder = tempfile.mkdtemp()
    reports = start(int(sys.argv[1]), folder, sys.argv[2:])
    shutil.rmtree(folder)
    for name, errors in reports.items():
        bad = {rank: error for rank, error in errors.items() if error}
        print(name, "ok" if not bad else next(iter(bad.values()))[-700:])
