"""Microseconds of small calls, part by part, beside the plain torch calls that do the same.

    python benchmarks/overhead.py                           # N 1, V 1000, H 64
    python benchmarks/overhead.py --quick
    python benchmarks/overhead.py --op kl_loss gather_channels --json out.json --markdown out.md

Whole calls are timed in turns with the plain ones, on one thread. The parts are timed in calls of their own,
with the library's inner functions replaced by timed ones, which costs 0.1 to 0.3 µs at each: their sum is
above the call's own time. "native" is what runs in C++ behind an op, its arguments' conversion included.
Every result is compared first.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from common import tables
from common.harness import summarize, write_json
from common.machine import describe, facts
from overhead_rows.calls import Row, rows
from overhead_rows.parts import PARTS, watch

SIZES = {"N": 1, "V": 1000, "H": 64, "Ht": 80, "C": 64}
BOUND = 1e-4  # relative, of what both compute in fp32


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--op", nargs="+", help="only these; default: all")
    parser.add_argument("--calls", type=int, default=1000, help="of each row (default 1000)")
    parser.add_argument("--quick", action="store_true", help="few calls, as a smoke test")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    args = parser.parse_args(argv)
    if args.quick:
        args.calls = 5
    return args


def check(row: Row) -> float:
    """The largest relative error of a result; ends the run if it is too large."""
    ours, plain = row.results()
    error = max(
        float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
        for a, b in zip(ours, plain, strict=True)
    )
    if not error <= BOUND:
        raise SystemExit(f"{row.op}, {row.mode}: wrong by {error:.2g}, more than {BOUND:g}: nothing is timed")
    return error


def in_turns(
    first: Callable[[], object], second: Callable[[], object], count: int
) -> tuple[list[float], ...]:
    """Wall seconds of `count` calls of each, in turns."""
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(count):
        for call, samples in zip((first, second), spent, strict=True):
            begin = time.perf_counter_ns()
            call()
            samples.append((time.perf_counter_ns() - begin) / 1e9)
    return spent


def measure(row: Row, count: int) -> dict[str, Any]:
    error = check(row)
    in_turns(row.ours, row.plain, max(2, count // 10))  # warm up
    gc.disable()
    try:
        ours, plain = in_turns(row.ours, row.plain, count)
        with watch() as clock:
            for _ in range(max(2, count // 10)):
                clock.measure(row.ours)
            parts = [clock.measure(row.ours) for _ in range(count)]
    finally:
        gc.enable()
    return {
        "op": row.op,
        "mode": row.mode,
        "plain": row.plain_label,
        "error": error,
        "ours_s": summarize(ours),
        "plain_s": summarize(plain),
        "ratio": summarize([a / b for a, b in zip(ours, plain, strict=True)]),
        "parts_s": {
            name: summarize([one.get(name, 0.0) for one in parts])
            for name in PARTS
            if any(name in one for one in parts)
        },
    }


def _us(summary: dict[str, float]) -> str:
    low, middle, high = (summary[name] * 1e6 for name in ("p20", "median", "p80"))
    return f"{middle:.1f} ({low:.1f}–{high:.1f})"


def table(result: dict[str, Any], draw: Callable[..., str]) -> str:
    """Whole calls: µs, µs of the plain calls, and the ratio."""
    header = ["", "mode", "µs", "plain torch, µs", "÷ plain", "plain is"]
    lines = [
        [
            row["op"],
            row["mode"],
            _us(row["ours_s"]),
            _us(row["plain_s"]),
            tables.ratio(row["ratio"]["median"]),
            row["plain"],
        ]
        for row in result["rows"]
    ]
    return draw(header, lines)


def table_of_parts(result: dict[str, Any], draw: Callable[..., str]) -> str:
    """The median µs of each part, a column a call."""
    shown = [name for name in PARTS if any(name in row["parts_s"] for row in result["rows"])]
    header = ["µs in", *(f"{row['op']}, {row['mode']}" for row in result["rows"])]
    lines = [
        [
            name,
            *(
                f"{row['parts_s'][name]['median'] * 1e6:.1f}" if name in row["parts_s"] else "–"
                for row in result["rows"]
            ),
        ]
        for name in shown
    ]
    return draw(header, lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parses the command line, measures, prints and writes. Returns the result (see results/README.md)."""
    args = parse_args(None if argv is None else list(argv))
    sizes = {name: getattr(args, name) for name in SIZES}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        chosen = [row for row in rows(sizes) if args.op is None or row.op in args.op]
        if not chosen:
            raise SystemExit(f"--op must name some of {', '.join(dict.fromkeys(r.op for r in rows(sizes)))}")
        result: dict[str, Any] = {"format": 1, "benchmark": "overhead"}
        result |= {"machine": facts("cpu", ["minitron-kernels"]), "threads": 1, **sizes, "rows": []}
        print(describe(result["machine"]), file=sys.stderr, flush=True)
        for row in chosen:
            result["rows"].append(measure(row, args.calls))
            print(f"{row.op}, {row.mode}", file=sys.stderr, flush=True)
            write_json(args.json, result, complete=False)
    finally:
        torch.set_num_threads(threads)
    print(table(result, tables.aligned), table_of_parts(result, tables.aligned), sep="\n\n")
    write_json(args.json, result, complete=True)
    if args.markdown:
        shape = ", ".join(f"{name} {value}" for name, value in sizes.items())
        paragraphs = [f"{shape}, fp32, one thread.", table(result, tables.markdown)]
        paragraphs += [table_of_parts(result, tables.markdown), f"Measured on {describe(result['machine'])}."]
        args.markdown.write_text("\n\n".join(paragraphs) + "\n")
    return result


if __name__ == "__main__":
    main()
