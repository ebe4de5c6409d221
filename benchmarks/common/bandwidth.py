"""Benchmarks of ops that are bound by memory. Each row is timed in a fresh process, in turns with a floor
that only reads or copies the bytes that every implementation has to, in the fastest of several ways. A row
that is faster than that shows that the floor is not one, and is marked.

A benchmark is a script that defines a `Bench` named BENCH and calls main(BENCH); workers import the script.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch

from common import tables
from common.harness import WorkerError, run_worker, summarize, write_json
from common.machine import describe, facts
from common.memory_ways import Ways
from common.tables import FAULT, FAULTY, MARK, MARKED, NOISY, VARIED, is_noisy

WORKER = Path(__file__).with_name("bandwidth_worker.py")
Case = Mapping[str, Any]  # of numbers and strings, since it goes to the worker as JSON


@dataclass(frozen=True)
class Row:
    """One implementation. `build(inputs)` imports what it needs and returns the call that is timed."""

    key: str
    label: str
    build: Callable[[Any], Callable[[], Any]]
    package: str | None = None  # the distribution that contains it
    pip: str | None = None  # the command that installs it
    devices: tuple[str, ...] = ("cpu", "cuda")
    ours: bool = False  # whether it is the library's: then a failure ends the run

    def absent(self, device: str) -> str | None:
        """Why it cannot be measured here; None if it can."""
        if torch.device(device).type not in self.devices:
            return f"not on {device}"
        if self.package is None:
            return None
        try:
            metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return self.pip
        return None


class Beside(Protocol):
    """A module that measures something more, after the tables of a benchmark."""

    def measure(self, say: Callable[[str], None], args: argparse.Namespace) -> dict[str, Any]:
        """Measures; returns the entry of the result under the module's name."""

    def lines(self, result: dict[str, Any]) -> list[str]:
        """The entry as text; each line is a paragraph of the Markdown file."""


@dataclass(frozen=True)
class Bench:
    """The description of a benchmark.

    Args:
        name: of the script, without .py.
        rows: the implementations.
        cases: name -> case; the first is that of --quick.
        default: names of the cases of a run without --case.
        make_inputs: (case, device) -> inputs of the rows and of the floor.
        floor: inputs -> the ways to only move the bytes, by name; the fastest is the floor.
        floor_label: what the floor does.
        floor_bytes: inputs -> bytes read plus bytes written by the floor.
        error: (inputs, result of a call) -> relative error against the truth.
        bound: the largest error that is allowed.
        poison: inputs -> None; changes them so that a result of an earlier call would be wrong.
        beside: name -> what else is measured; --only-tables leaves it out.
    """

    name: str
    rows: tuple[Row, ...]
    cases: Mapping[str, Case]
    default: tuple[str, ...]
    make_inputs: Callable[[Case, str], Any]
    floor: Callable[[Any], Ways]
    floor_label: str
    floor_bytes: Callable[[Any], int]
    error: Callable[[Any, Any], float]
    bound: float
    poison: Callable[[Any], None]
    beside: Mapping[str, Beside] = field(default_factory=dict)

    @property
    def quick(self) -> str:
        return next(iter(self.cases))

    def row(self, key: str) -> Row:
        return next(row for row in self.rows if row.key == key)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_args(bench: Bench, argv: list[str] | None, doc: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    keys, default = [row.key for row in bench.rows], " ".join(bench.default)
    parser.add_argument("--case", nargs="+", choices=list(bench.cases), help=f"default: {default}")
    parser.add_argument("--impl", nargs="+", choices=keys, help="rows; default: all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", default="1", help="numbers of threads, as 1,2 (default 1)")
    parser.add_argument(
        "--budget", type=float, default=4.0, help="seconds of timing for each row (default 4)"
    )
    parser.add_argument("--quick", action="store_true", help="a small case, as a smoke test")
    parser.set_defaults(only_tables=False)
    if bench.beside:
        parser.add_argument("--only-tables", action="store_true", help=f"without {', '.join(bench.beside)}")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    args = parser.parse_args(argv)
    args.case = args.case or ([bench.quick] if args.quick else list(bench.default))
    args.impl = args.impl or keys
    args.reps = (3, 5) if args.quick else (5, 60)
    try:
        args.threads = [int(part) for part in args.threads.split(",")]
    except ValueError as error:
        parser.error(f"--threads: {error}")
    return args


def measure(
    bench: Bench, name: str, threads: int, args: argparse.Namespace, runs: list[Any], save: Callable[[], None]
) -> dict[str, Any]:
    """One table, appended to `runs`; calls save() after every row.

    A row whose result is wrong is not timed; if it is the library's, the run ends.
    """
    run: dict[str, Any] = {"case": name, **bench.cases[name], "threads": threads, "device": args.device}
    run |= {"floor_label": bench.floor_label, "rows": []}
    runs.append(run)
    say(f"{bench.name}, {name}, {threads} thread(s)")
    for key in args.impl:
        row = bench.row(key)
        entry: dict[str, Any] = {"key": key, "label": row.label}
        if reason := row.absent(args.device):
            run["rows"].append(entry | {"status": "absent", "reason": reason})
            continue
        spec = {"bench": bench.name, "case": dict(bench.cases[name]), "key": key, "device": args.device}
        spec |= {"budget_s": args.budget, "reps": args.reps}
        try:
            got = run_worker(WORKER, spec, threads=threads)
        except WorkerError as error:
            if row.ours:
                raise SystemExit(f"{row.label}: {error}") from None
            run["rows"].append(entry | {"status": "failed", "reason": str(error)})
            save()
            continue
        pairs = list(zip(got["floor"], got["call"], strict=True))
        run["bytes"], run["floor_ways"] = got["bytes"], got["floor_ways"]
        run["rows"].append(
            entry
            | {
                "status": "ok",
                "error": got["error"],
                "wall_s": summarize([wall for _, (wall, _) in pairs]),
                "busy_s": summarize([busy for _, (_, busy) in pairs]),
                "ratio": summarize([call[1] / floor[1] for floor, call in pairs]),
                "floor_way": got["floor_way"],
                "extra_peak_bytes": got["extra_peak_bytes"],
                "launches_seen": got["launches_seen"],
                "samples": {"floor": got["floor"], "call": got["call"]},
            }
        )
        say(f"  {row.label}: {run['rows'][-1]['ratio']['median']:.2f} × floor ({got['floor_way']})")
        if is_below_floor(run["rows"][-1]):
            say(f"  {FAULTY}")
        measured = [row for row in run["rows"] if row["status"] == "ok"]
        run["floor_busy_s"] = summarize([busy for row in measured for _, busy in row["samples"]["floor"]])
        save()
    return run


def is_below_floor(row: dict[str, Any]) -> bool:
    """Whether a measured row is faster than its floor, of which then the floor is at fault."""
    return row["ratio"]["median"] < 1.0


def _ways(run: dict[str, Any]) -> str:
    """How many ways were tried for the floor, and which won most often; empty where there was one alone."""
    if run.get("floor_ways", 1) == 1:
        return ""
    won = Counter(row["floor_way"] for row in run["rows"] if row["status"] == "ok")
    (way, times), total = won.most_common(1)[0], sum(won.values())
    often = "" if times == total else f", for {times} of {total} rows"
    return f", fastest of {run['floor_ways']} ways ({way}{often})"


def _spread(summary: dict[str, float], show: Callable[[float], str]) -> str:
    return f"{show(summary['median'])} ({show(summary['p20'])}–{show(summary['p80'])})"


def head(run: dict[str, Any]) -> str:
    """The heading of a table."""
    known = {"case", "threads", "device", "rows", "floor_label", "floor_ways", "bytes", "floor_busy_s"}
    shape = ", ".join(f"{key} {value}" for key, value in run.items() if key not in known)
    where = (
        f"{run['threads']} thread" + "s" * (run["threads"] > 1) if run["device"] == "cpu" else run["device"]
    )
    line = f"{run['case']}: {shape}, {where}"
    if "floor_busy_s" not in run:
        return line
    rate = run["bytes"] / run["floor_busy_s"]["median"] / 1e9
    floor = _spread(run["floor_busy_s"], lambda s: f"{s * 1e3:.3g}")
    moved = f"{run['bytes'] / 1e6:.0f} MB in {floor} ms, {rate:.3g} GB/s"
    return f"{line}. Floor: {run['floor_label']}{_ways(run)}, {moved}"


def table(run: dict[str, Any], draw: Callable[..., str]) -> str:
    busy = "CPU ms" if run["device"] == "cpu" else "GPU ms"
    rows = [
        [
            row["label"]
            + MARK * bool(row.get("launches_seen"))
            + FAULT * is_below_floor(row)
            + NOISY * is_noisy(row["ratio"]),
            _spread(row["busy_s"], lambda s: f"{s * 1e3:.3g}"),
            _spread(row["ratio"], tables.ratio),
            f"{run['bytes'] / row['busy_s']['median'] / 1e9:.3g}",
            f"{100 / row['ratio']['median']:.0f} %",
            f"{row['wall_s']['median'] * 1e3:.3g}",
            "–" if row["extra_peak_bytes"] is None else f"{row['extra_peak_bytes'] / 2**20:.1f}",
        ]
        for row in run["rows"]
        if row["status"] == "ok"
    ]
    names = ["", busy, "÷ floor", "GB/s", "of the floor's rate", "wall ms", "extra MiB"]
    lines = [
        f"{row['label']}: {row['status']}, {row['reason']}" for row in run["rows"] if row["status"] != "ok"
    ]
    marked = [MARKED] if any(row.get("launches_seen") for row in run["rows"]) else []
    marked += [FAULTY] if any(is_below_floor(row) for row in run["rows"] if row["status"] == "ok") else []
    marked += [VARIED] if any(is_noisy(row["ratio"]) for row in run["rows"] if row["status"] == "ok") else []
    return "\n\n".join(filter(None, [draw(names, rows) if rows else "", *marked, "; ".join(lines)]))


def as_markdown(bench: Bench, result: dict[str, Any]) -> str:
    parts = [part for run in result["runs"] for part in (f"**{head(run)}**", table(run, tables.markdown))]
    for name, beside in bench.beside.items():
        parts += beside.lines(result[name]) if name in result else []
    return "\n\n".join([*parts, f"Measured on {describe(result['machine'])}."]) + "\n"


def main(bench: Bench, argv: list[str] | None = None, doc: str | None = None) -> dict[str, Any]:
    """Parses the command line, measures, prints and writes. Returns the result (see results/README.md)."""
    args = parse_args(bench, argv, doc)
    packages = ["minitron-kernels", *(row.package for row in bench.rows if row.package)]
    result: dict[str, Any] = {"format": 1, "benchmark": bench.name, "machine": facts(args.device, packages)}
    result["runs"] = []
    say(describe(result["machine"]))

    def save() -> None:
        write_json(args.json, result, complete=False)

    for name in args.case:
        for threads in args.threads:
            run = measure(bench, name, threads, args, result["runs"], save)
            print(f"\n{head(run)}\n\n{table(run, tables.aligned)}\n", flush=True)
    for name, beside in ({} if args.only_tables else bench.beside).items():
        result[name] = beside.measure(say, args)
        print(*beside.lines(result[name]), sep="\n", flush=True)
    write_json(args.json, result, complete=True)
    if args.markdown:
        args.markdown.write_text(as_markdown(bench, result))
    return result
