"""Processes of this machine, joined by gloo, that run the cases of a vocabulary over several ranks."""

import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from kl_loss.sparse_parallel_cases import check_sparse, sparse_cases
from kl_loss.vocab_parallel_calls import CASES
from kl_loss.vocab_parallel_cases import check, value_cases
from tools.ranks import joined, print_reports, run_ranks


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


def run_all(rank, folder, ranks, names):
    """All cases on groups of each size up to `ranks`; what went wrong on this rank goes into a file."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    reports = {}
    with joined(rank, folder, ranks):
        for world in range(2, ranks + 1):
            # the last ones, so that ranks of the group are not those of the world
            members = list(range(ranks - world, ranks))
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


def start(ranks, folder, names=()):
    """Reports of all ranks: by case, the errors by rank."""
    return run_ranks("kl_loss.ranks", ranks, folder, ranks, list(names))


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        print_reports(start(int(sys.argv[1]), place, sys.argv[2:]))
