"""Each kernel and each GEMM for itself: GB/s next to a copy, TFLOP/s next to one large matrix product.

    python benchmarks/parts.py --device cuda --json parts.json
    python benchmarks/parts.py --device cuda --only kl          # gemm, kl, memory
    python benchmarks/parts.py --device cpu --quick             # tiny sizes: that everything starts
    python benchmarks/parts.py --device cuda --quick --once --match forward    # for a profiler or sanitizer

A part is timed in turns with its yardstick in the same run; what it computes is checked first. A part that
fails does not stop the next.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import tables
from common.harness import interleave, quantile, summarize, write_json
from common.machine import describe, facts
from parts_rows import gemms, kl_loss, memory
from parts_rows.part import FULL, QUICK, Absent, Part, Sizes, Work

GROUPS = {"gemm": gemms.parts, "kl": kl_loss.parts, "memory": memory.parts}
MOST_ERRORS = 3  # in a row, after which a GPU that has failed is believed to fail for good


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--match", default="", help="only parts whose name has this")
    parser.add_argument("--budget", type=float, default=0.8, help="seconds of timing for each part")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--once", action="store_true", help="check and call each part once, time nothing")
    parser.add_argument("--json", type=Path, help="write the result here, after every part")
    args = parser.parse_args(argv)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: this torch, {torch.__version__}, sees no GPU")
    return args


class Yardsticks:
    """A copy, and a product of square matrices in bf16."""

    def __init__(self, device: str, sizes: Sizes) -> None:
        source, target = (torch.ones(sizes.copy_bytes, dtype=torch.uint8, device=device) for _ in range(2))
        a, b, out = (
            torch.randn(sizes.square, sizes.square, device=device, dtype=torch.bfloat16) for _ in range(3)
        )
        self.copy: Callable[[], object] = lambda: target.copy_(source)
        self.product: Callable[[], object] = lambda: torch.mm(a, b, out=out)
        self.bytes, self.flops = 2 * sizes.copy_bytes, 2 * sizes.square**3

    def beside(self, work: Work) -> tuple[Callable[[], object], int, int]:
        """What the part is timed in turns with, how much that does, and how much the part does."""
        if work.flops:
            return self.product, self.flops, work.flops
        return self.copy, self.bytes, work.bytes


def measure(work: Work, yardsticks: Yardsticks, args: argparse.Namespace) -> dict[str, Any]:
    yardstick, unit, amount = yardsticks.beside(work)
    work.call()
    reps = (3, 5) if args.quick else (5, 50)
    pairs = interleave(yardstick, work.call, args.device, budget_s=args.budget, reps=reps)
    shares = [
        amount / call.busy_s / (unit / side.busy_s)
        for side, call in zip(pairs.floor, pairs.call, strict=True)
    ]
    busy = summarize([call.busy_s for call in pairs.call])
    return {
        "busy_s": busy,
        "wall_s": summarize([call.wall_s for call in pairs.call]),
        "per_s": amount / busy["median"],
        "yardstick_per_s": unit / quantile([side.busy_s for side in pairs.floor], 0.5),
        "share": summarize(shares),
        "samples": pairs.to_dict(),
    }


def run_part(part: Part, yardsticks: Yardsticks, args: argparse.Namespace) -> dict[str, Any]:
    try:
        work = part.build()
        work.check()
        about = {"status": "ok", "bytes": work.bytes, "flops": work.flops}
        if args.once:
            work.call()
            return about
        return about | measure(work, yardsticks, args)
    except (Absent, NotImplementedError, ImportError) as reason:
        return {"status": "absent", "reason": str(reason).splitlines()[0]}
    except Exception as error:  # of any kernel, GEMM or compiler: the next part is to be measured too
        first = (str(error).splitlines() or [""])[0]
        return {"status": "failed", "reason": f"{type(error).__name__}: {first}"}


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    rate, unit = (row["flops"], "TFLOP/s") if row["flops"] else (row["bytes"], "GB/s")
    by = 1e12 if row["flops"] else 1e9
    mark = tables.MARK * bool(row["samples"]["launches_seen"])
    time = row["busy_s"]
    return [
        f"{row['group']}, {row['part']}{mark}",
        f"{time['median'] * 1e6:.4g}",
        f"{time['p20'] * 1e6:.4g}–{time['p80'] * 1e6:.4g}",
        f"{row['per_s'] / by:.4g} {unit}" if rate else "",
        f"{100 * row['share']['median']:.0f} %" if rate else "",
        f"{row['wall_s']['median'] * 1e6:.4g}",
    ]


def table(rows: list[dict[str, Any]]) -> str:
    header = ["", "µs", "p20–p80", "rate", "of yardstick", "wall µs of a call"]
    timed = [cells(row) for row in rows if "busy_s" in row]
    rest = [
        f"{row['group']}, {row['part']}: {row['status']}, {row['reason']}" for row in rows if "reason" in row
    ]
    marked = [tables.MARKED] if any(tables.MARK in line[0] for line in timed) else []
    return "\n".join([tables.aligned(header, timed) if timed else "nothing was timed", *marked, *rest])


def main(argv: list[str] | None = None) -> int:
    """Returns the number of parts that failed."""
    args = parse_args(argv)
    sizes = QUICK if args.quick else FULL
    result: dict[str, Any] = {"format": 1, "benchmark": "parts", "sizes": sizes._asdict(), "rows": []}
    result["machine"] = facts(args.device, ["minitron-kernels"])
    print(describe(result["machine"]), flush=True)
    yardsticks = Yardsticks(args.device, sizes)
    in_a_row = 0
    for group in args.only:
        for part in GROUPS[group](args.device, sizes):
            if args.match not in part.key:
                continue
            begin = time.perf_counter()
            row = {"group": group, "part": part.key} | run_part(part, yardsticks, args)
            if args.device != "cpu":
                gc.collect()  # a failure's traceback may hold gigabytes of the GPU's memory
            result["rows"].append(row)
            write_json(args.json, result, complete=False)
            said = row.get("reason") or (", ".join(cells(row)[1:]) if "busy_s" in row else "ok")
            print(f"  {group}, {part.key}: {said} ({time.perf_counter() - begin:.1f} s)", flush=True)
            in_a_row = in_a_row + 1 if row["status"] == "failed" else 0
            if in_a_row == MOST_ERRORS and args.device != "cpu":
                print("several in a row failed: what is left of this group is left out", flush=True)
                break
    write_json(args.json, result, complete=True)
    print(f"\n{table(result['rows'])}")
    return sum(row["status"] == "failed" for row in result["rows"])


if __name__ == "__main__":
    sys.exit(min(main(), 100))
