"""Pruning a checkpoint on disk, compared with copying the kept bytes: time, MB/s, peak memory.

    python benchmarks/checkpoint.py                    # a 4 GB checkpoint; needs 11 GB of disk
    python benchmarks/checkpoint.py --quick            # 0.1 GB, seconds
    python benchmarks/checkpoint.py --folder /mnt/x --cache warm cold --threads 1,2 --json out.json
    python benchmarks/checkpoint.py --from out.json --markdown out.md           # measures nothing

Makes a Mistral-shaped bf16 checkpoint of random numbers (hidden 5120, MLP 14336, fewer layers, a smaller
vocabulary) in a temporary folder and prunes it to hidden 4096, MLP 11520 with random sorted channels. The
floor is `cp` of the pruned weights, file by file, each followed by fsync: it also leaves the same bytes on
the disk. Beside it stands a plain loop of reads and writes, with fsync and without. All take turns, each row
in a process of its own, which has imported what it needs before the clock runs. "warm": the files that are
read are in the page cache; "cold": they were dropped from it. A row that is faster than its floor is marked.
A gate comes first: the result must be what plain indexing gives.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint_rows.processes import run_worker
from checkpoint_rows.worker import (
    FLOORS,
    LABELS,
    ROWS,
    WORK,
    make_checkpoint,
    make_random_plan,
    right_tensors,
)
from common import tables
from common.harness import WorkerError, summarize, write_json
from common.machine import cores, describe, facts
from minitron_kernels.pruning import PruningPlan

WORKER = Path(__file__).parent / "checkpoint_rows/worker.py"
FULL = {"hidden": 5120, "mlp": 14336, "heads": 32, "kv_heads": 8, "head_dim": 128, "vocab": 32768}
QUICK = {"hidden": 640, "mlp": 1792, "heads": 4, "kv_heads": 1, "head_dim": 128, "vocab": 32768}
TARGETS = {5120: (4096, 11520), 640: (512, 1440)}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where the files go; default: the system's temporary one")
    parser.add_argument("--gb", type=float, default=4.0, help="size of the source (default 4)")
    parser.add_argument("--row", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--cache", nargs="+", default=["warm"], choices=["warm", "cold"])
    parser.add_argument("--threads", default=str(cores()), help="as 1,2; default: all cores")
    parser.add_argument("--reps", type=int, default=5, help="repetitions of each (default 5)")
    parser.add_argument("--quick", action="store_true", help="0.1 GB, 2 repetitions, as a smoke test")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--from", dest="source", type=Path, help="read a result instead of measuring")
    args = parser.parse_args(argv)
    if args.quick:
        args.gb, args.reps = 0.1, 2
    try:
        args.threads = [int(part) for part in args.threads.split(",")]
    except ValueError as error:
        parser.error(str(error))
    return args


def run_row(spec: dict[str, Any]) -> dict[str, Any]:
    try:
        return run_worker(WORKER, spec, threads=spec["threads"])
    except WorkerError as error:
        raise SystemExit(f"{LABELS[spec['work']]}: {error}") from None


def gate(work: Path, row: str, plan: PruningPlan) -> int:
    """Checks a row's result against plain indexing; returns the bytes written. Keeps prune's, for cp."""
    got = run_row({"work": row, "folder": str(work), "threads": 1})
    target = work / WORK[row][2]
    if wrong := right_tensors(work / "src", target, plan):
        raise SystemExit(f"correctness gate: {LABELS[row]}: {wrong}. Wrong results are not timed.")
    if row == "prune":
        target.rename(work / "kept")
    else:
        shutil.rmtree(target)
    return got["bytes"]


def measure(
    work: Path, args: argparse.Namespace, save: Callable[[dict[str, Any]], None] = lambda result: None
) -> dict[str, Any]:
    """All tables; calls save() with what there is after every repetition."""
    shape = QUICK if args.quick else FULL
    config, size = make_checkpoint(work / "src", shape, args.gb)
    hidden, mlp = TARGETS[shape["hidden"]]
    plan = make_random_plan(config, hidden, mlp)
    plan.save(work / "plan.json")
    say(f"source: {size / 1e9:.2f} GB, {config['num_hidden_layers']} layers")
    written = {row: gate(work, row, plan) for row in dict.fromkeys(("prune", *args.row))}
    kept = written["prune"]
    written |= dict.fromkeys(FLOORS, kept)
    say(f"correctness gate: passed; {kept / 1e9:.2f} GB stay")
    result: dict[str, Any] = {"source_bytes": size, "kept_bytes": kept, "shape": shape, "runs": []}
    result |= {"layers": config["num_hidden_layers"], "hidden": hidden, "mlp": mlp}
    for cache in args.cache:
        for threads in args.threads:
            samples: dict[str, list[dict[str, float]]] = {row: [] for row in (*FLOORS, *args.row)}
            for _ in range(args.reps):
                for row in samples:
                    spec = {"work": row, "folder": str(work), "threads": threads, "cache": cache}
                    samples[row].append(run_row(spec))
                    if samples[row][-1]["bytes"] != written[row]:
                        raise SystemExit(
                            f"{LABELS[row]}: wrote {samples[row][-1]['bytes']} bytes in a timed call, and "
                            f"{written[row]} where its result was right"
                        )
                run = {"cache": cache, "threads": threads, "samples": samples, "rows": summaries(samples)}
                save(result | {"runs": [*result["runs"], run]})
            result["runs"].append(run)
            print(f"\n{table(result, run, tables.aligned)}\n", flush=True)
    return result


def summaries(samples: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    floor = [sample["wall_s"] for sample in samples["cp"]]
    return {
        row: {
            "wall_s": summarize([sample["wall_s"] for sample in got]),
            "busy_s": summarize([sample["busy_s"] for sample in got]),
            "ratio": summarize([s["wall_s"] / f for s, f in zip(got, floor, strict=True)]),
            "peak_bytes": max(sample["peak_bytes"] for sample in got),
            "extra_bytes": max(sample.get("extra_bytes", 0) for sample in got),
        }
        for row, got in samples.items()
    }


def table(result: dict[str, Any], run: dict[str, Any], draw: Any) -> str:
    header = ["", "wall s", "p20–p80", "÷ cp", "p20–p80", "CPU s", "MB/s", "peak MiB", "of it own"]
    lines, faulty = [], False
    for row, got in run["rows"].items():
        wall, ratio = got["wall_s"], got["ratio"]
        below = row in ROWS and ratio["median"] < 1
        faulty |= below
        lines.append(
            [
                LABELS[row],
                tables.seconds(wall["median"]),
                f"{tables.seconds(wall['p20'])}–{tables.seconds(wall['p80'])}",
                tables.ratio(ratio["median"]) + tables.FAULT * below,
                f"{tables.ratio(ratio['p20'])}–{tables.ratio(ratio['p80'])}",
                tables.seconds(got["busy_s"]["median"]),
                f"{result['kept_bytes'] / 1e6 / wall['median']:.0f}",
                tables.mebibytes(got["peak_bytes"]),
                tables.mebibytes(got.get("extra_bytes")),
            ]
        )
    threads = f"{run['threads']} thread" + ("s" if run["threads"] > 1 else "")
    title = (
        f"{result['source_bytes'] / 1e9:.2f} GB → {result['kept_bytes'] / 1e9:.2f} GB, bf16, hidden "
        f"{result['shape']['hidden']} → {result['hidden']}, MLP {result['shape']['mlp']} → {result['mlp']}, "
        f"{result['layers']} layers, page cache {run['cache']}, {threads}, "
        f"{run['rows']['cp']['wall_s']['n']} repetitions; MB/s of what is written"
    )
    return f"{title}\n\n{draw(header, lines)}" + (f"\n\n{tables.FAULTY}" if faulty else "")


def check_disk(folder: Path, gb: float) -> None:
    needed = int(gb * 1e9 * 2.8)  # the source, the kept weights and one row's result
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(
            f"{folder} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are needed: take another "
            "--folder, or a smaller --gb"
        )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.source:
        result = json.loads(args.source.read_text())
        for run in result["runs"]:
            print(f"{table(result, run, tables.aligned)}\n")
    else:
        machine = facts("cpu", ["minitron-kernels", "safetensors"])
        say(describe(machine))
        check_disk(args.folder or Path(tempfile.gettempdir()), args.gb)
        with tempfile.TemporaryDirectory(prefix="minitron_checkpoint_", dir=args.folder) as work:
            about = {"format": 1, "benchmark": "checkpoint", "machine": machine}

            def save(part: dict[str, Any]) -> None:
                write_json(args.json, about | part, complete=False)

            result = about | measure(Path(work), args, save)
    write_json(args.json, result, complete=result.get("complete", True))
    if args.markdown:
        drawn = [table(result, run, tables.markdown) for run in result["runs"]]
        args.markdown.write_text("\n\n".join([*drawn, f"Measured on {describe(result['machine'])}."]) + "\n")


if __name__ == "__main__":
    main()
