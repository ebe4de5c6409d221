"""What ranks that share the vocabulary exchange: collectives, bytes a token, memory and time of each rank.

    python benchmarks/vocab_parallel.py                    # TP 1, 2 and 4 by processes of this machine (gloo)
    python benchmarks/vocab_parallel.py --quick            # a tiny shape, as a smoke test
    python benchmarks/vocab_parallel.py --shape S --ranks 1,2,4,8 --json out.json

Rows are the KL, the KL with a cross-entropy and all parts, and the KL of a sparse teacher, forward and
backward. Bytes are counted at each call of torch.distributed, those that a rank contributes: what goes over
the wires is up to the backend, about (R − 1) times as many for an all-gather and 2 (R − 1) / R for an
all-reduce. All ranks run on this machine's cores, so that times say what the work is, and not how fast a
machine with R processors is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.harness import MIB, extra_peak_bytes, write_json
from common.machine import describe, facts
from common.tables import aligned
from kl_loss_rows.cases import SHAPES, Case, Inputs, make_inputs, parse_shape

KINDS = {"kl": "KL", "record": "KL + 0.5 CE, all parts", "sparse": "128 ids and the rest"}
COLLECTIVES = (
    "all_gather_into_tensor",
    "all_gather_single",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "all_reduce",
)


class Counter:
    """Counts the calls of torch.distributed's collectives, and the bytes that this rank brings to each."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.nbytes = 0
        for name in COLLECTIVES:
            if hasattr(dist, name):
                setattr(dist, name, self._counted(name, getattr(dist, name)))

    def _counted(self, name: str, function: Any) -> Any:
        brings = 0 if name == "all_reduce" else 1  # where the tensor stands that a rank contributes

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            self.nbytes += args[brings].nbytes
            return function(*args, **kwargs)

        return counted


def call_of(kind: str, inputs: Inputs, head: torch.Tensor, teacher_head: torch.Tensor, parallel: Any) -> Any:
    """One forward and backward of a rank."""
    from minitron_kernels import linear_kl_loss, linear_sparse_kl_loss

    hidden = inputs.student_hidden

    def call() -> None:
        hidden.grad = head.grad = None
        if kind == "sparse":
            loss = linear_sparse_kl_loss(hidden, head, *inputs.sparse, **parallel)
        elif kind == "record":
            loss = linear_kl_loss(
                hidden,
                head,
                inputs.teacher_hidden,
                teacher_head,
                labels=inputs.labels,
                ce_weight=0.5,
                return_parts=True,
                **parallel,
            ).loss
        else:
            loss = linear_kl_loss(hidden, head, inputs.teacher_hidden, teacher_head, **parallel)
        loss.backward()

    return call


def run_rank(rank: int, ranks: int, folder: str, spec: dict[str, Any]) -> None:
    """One rank: all kinds, into a file of its own."""
    torch.set_num_threads(1)
    case = Case(**spec["case"])
    inputs = make_inputs(case, spec["dtype"])
    if ranks == 1:
        parallel: dict[str, Any] = {}
        rows = slice(0, case.V)
    else:
        store = dist.FileStore(str(Path(folder) / "store"), ranks)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=600)
        )
        parallel = {"tp_group": dist.group.WORLD, "vocab_size": case.V}
        rows = slice(case.V * rank // ranks, case.V * (rank + 1) // ranks)
    head = inputs.student_head.detach()[rows].clone().requires_grad_()
    teacher_head = inputs.teacher_head[rows].clone()
    _ = inputs.sparse
    inputs.student_head = inputs.teacher_head = torch.empty(0)
    counter, found = Counter(), {}
    for kind in spec["kinds"]:
        call = call_of(kind, inputs, head, teacher_head, parallel)
        call()
        before = dict(counter.calls), counter.nbytes
        peak = extra_peak_bytes(call, "cpu")
        calls = {name: count - before[0].get(name, 0) for name, count in counter.calls.items()}
        nbytes, seconds = counter.nbytes - before[1], []
        for _ in range(spec["reps"]):
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
        found[kind] = {"calls": calls, "bytes": nbytes, "peak_bytes": peak, "wall_s": seconds}
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(found))
    if ranks > 1:
        dist.destroy_process_group()


def measure(ranks: int, spec: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank found."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (ranks, folder, spec), nprocs=ranks)
        return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def row_of(kind: str, ranks: int, found: list[dict[str, Any]], case: Case) -> dict[str, Any]:
    """Of all ranks the most."""
    peaks = [rank[kind]["peak_bytes"] for rank in found]
    return {
        "kind": kind,
        "ranks": ranks,
        "collectives": found[0][kind]["calls"],
        "bytes_per_token": max(rank[kind]["bytes"] for rank in found) / case.N,
        "peak_bytes": None if None in peaks else max(peaks),
        "wall_s": statistics.median(found[0][kind]["wall_s"]),
    }


def as_text(rows: list[dict[str, Any]]) -> str:
    header = ["", "ranks", "collectives", "bytes a token", "MiB a rank", "wall s"]
    cells = [
        [
            KINDS[row["kind"]],
            str(row["ranks"]),
            str(sum(row["collectives"].values())),
            f"{row['bytes_per_token']:.0f}",
            "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / MIB:.0f}",
            f"{row['wall_s']:.3g}",
        ]
        for row in rows
    ]
    return aligned(header, cells)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="S", help=f"{', '.join(SHAPES)}, or N,H,Ht,V (default S)")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks (default 1,2,4)")
    parser.add_argument("--reps", type=int, default=3, help="timed calls of each row (default 3)")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, as a smoke test")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    case = parse_shape("XS" if args.quick else args.shape)
    spec = {"case": case.to_dict(), "dtype": args.dtype, "kinds": list(KINDS), "reps": args.reps}
    machine = facts("cpu", ["minitron-kernels"])
    print(describe(machine), file=sys.stderr, flush=True)
    rows = []
    for ranks in map(int, args.ranks.split(",")):
        print(f"  {ranks} rank(s)", file=sys.stderr, flush=True)
        found = measure(ranks, spec)
        rows += [row_of(kind, ranks, found, case) for kind in KINDS]
    rows.sort(key=lambda row: list(KINDS).index(row["kind"]))
    result = {"format": 1, "benchmark": "vocab_parallel", "machine": machine, "dtype": args.dtype}
    write_json(args.json, result | {"case": case.to_dict(), "rows": rows}, complete=True)
    print(f"{case.describe()}, {args.dtype}\n{as_text(rows)}")


if __name__ == "__main__":
    main()
