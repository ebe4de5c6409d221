"""The distillation loss and its alternatives: time, memory and error, compared with the bare GEMMs.

    python benchmarks/kl_loss.py                  # a few minutes: real hidden states, then S and M
    python benchmarks/kl_loss.py --quick          # tens of seconds, a tiny shape
    python benchmarks/kl_loss.py --device cuda    # on a GPU: S, M and XL, with a roofline
    python benchmarks/kl_loss.py --shape S L --threads 1,2 --dtype bf16 fp32 --full --json out.json
    python benchmarks/kl_loss.py --from out.json --plot out.png --markdown out.md     # measures nothing

Measured is forward KL from hidden states and heads, mean over the rows, forward and backward. A few rows are
other losses: the KL with a cross-entropy and all parts of the record, the KL of a sparse teacher (against the
same four GEMMs, so that the two compare), and a cross-entropy alone (against three). Each implementation runs
in a fresh process: memory first, then time in turns with the floor. Errors are against float64 on the same
inputs. A gate comes first: nothing is measured unless the library's results are right at a small shape.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.dtypes import DTYPES
from common.harness import MIB, WorkerError, run_worker, summarize, write_json
from common.machine import cores, describe, facts, fast_dtype
from kl_loss_rows.cases import GATE, SHAPES, Case, error_case, parse_shape
from kl_loss_rows.floor import gemm_flops
from kl_loss_rows.peers import IMPLEMENTATIONS, OURS
from kl_loss_rows.report import as_markdown, as_text
from kl_loss_rows.roofline import RATES, roofline
from kl_loss_rows.worker import FLOOR_FP32

WORKER = Path(__file__).parent / "kl_loss_rows/worker.py"
QUICK = ("naive", "naive-float", "liger", "torchtune", *OURS)
DEFAULT_SHAPES = {"cpu": ["real", "S", "M"], "cuda": ["S", "M", "XL"]}
# rows of the default run at its largest shape, where one call and one floor take half a minute
AT_M = ("naive", *OURS, FLOOR_FP32)
BUDGET_M_S = 30.0
# the gate's bounds on errors of (loss, dX, dW); in 16 bits, dz and the result are rounded once each
BOUNDS = {"fp32": (1e-5, 5e-5, 5e-5), "bf16": (1e-5, 3e-3, 3e-3), "fp16": (1e-5, 2e-3, 2e-3)}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*IMPLEMENTATIONS, FLOOR_FP32]
    parser.add_argument(
        "--shape",
        nargs="+",
        help=f"real, {', '.join(SHAPES)}, or N,H,Ht,V; default: real S M, on a GPU S M XL",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=list(DTYPES),
        help="default: bf16; fp32 on x86 processors without AVX-512, where torch's bf16 GEMMs take minutes",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--impl", nargs="+", help=f"rows, of {', '.join(known)}, or all")
    parser.add_argument(
        "--threads", default=str(cores()), help="numbers of threads, as 1,2; default: all cores"
    )
    parser.add_argument(
        "--reps", type=int, help="repetitions; default: as many as fit into --budget, at most 30"
    )
    parser.add_argument(
        "--budget", type=float, default=4.0, help="seconds of timing for each row (default 4)"
    )
    parser.add_argument(
        "--full", action="store_true", help="every row at every shape, at least 5 repetitions"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny shape, nothing that compiles, as a smoke test"
    )
    parser.add_argument(
        "--row-limit", type=float, default=3600, help="seconds that a row may take in all (default 3600)"
    )
    parser.add_argument("--no-errors", action="store_true", help="time only; the gate still checks results")
    parser.add_argument("--json", type=Path, help="write the result here, after every row")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--plot", type=Path, help="write the picture here (.png or .svg)")
    parser.add_argument("--from", dest="source", type=Path, help="read a result instead of measuring")
    args = parser.parse_args(argv)
    kind = torch.device(args.device).type
    if kind not in DEFAULT_SHAPES:
        parser.error(f"--device: cpu or cuda, got {args.device}")
    if kind == "cuda" and not torch.cuda.is_available() and not args.source:
        parser.error(f"--device {args.device}: this torch, {torch.__version__}, sees no GPU")
    args.dtype = args.dtype or [fast_dtype(kind)]
    args.restrict_m = args.shape is None and args.impl is None and not args.full and kind == "cpu"
    args.shape = args.shape or (["XS"] if args.quick else DEFAULT_SHAPES[kind])
    wanted = [key for part in args.impl or ["all"] for key in part.split(",") if key]
    rows = QUICK if args.quick and not args.impl else known
    here = [key for key in rows if key not in IMPLEMENTATIONS or IMPLEMENTATIONS[key].serves(kind)]
    args.impl = here if "all" in wanted else wanted
    if unknown := [key for key in args.impl if key not in known]:
        parser.error(f"--impl: no {', '.join(unknown)}; there are {', '.join(known)}, all")
    try:
        args.threads = [int(part) for part in args.threads.split(",")]
        for name in args.shape:
            if name != "real":
                parse_shape(name)
    except ValueError as error:
        parser.error(str(error))
    low = args.reps or (5 if args.full else 2)
    args.limits = (low, args.reps or 30)
    return args


def gate(keys: list[str], dtype: str, device: str, threads: int) -> None:
    """Ends the run unless the library agrees with float64, both far from the teacher and close to it."""
    for kind in ("far", "close"):
        spec = {
            "work": "errors",
            "case": GATE.to_dict(),
            "dtype": dtype,
            "kind": kind,
            "device": device,
            "keys": keys,
        }
        try:
            rows = run_worker(WORKER, spec, threads=threads)["rows"]
        except WorkerError as error:
            raise SystemExit(f"correctness gate: {error}") from None
        for key, row in rows.items():
            if "failed" in row:
                raise SystemExit(f"correctness gate: {IMPLEMENTATIONS[key].label}, {dtype}: {row['failed']}")
            for name, bound in zip(("loss", "dX", "dW"), BOUNDS[dtype], strict=True):
                if not row[name] <= bound:  # NaN fails too
                    raise SystemExit(
                        f"correctness gate: {IMPLEMENTATIONS[key].label}, {dtype}, {kind}: relative error of "
                        f"{name} is {row[name]:.2g}, allowed {bound:.0e}. Wrong results are not timed."
                    )
    say(f"correctness gate, {dtype}: passed ({', '.join(IMPLEMENTATIONS[key].label for key in keys)})")


def take_errors(case: Case, dtype: str, device: str, threads: int, keys: list[str]) -> dict[str, Any]:
    """{kind of input: its KL, its size, and each implementation's errors}."""
    small = error_case(case)
    result = {}
    for kind in ("real",) if case.file else ("far", "close"):
        spec = {
            "work": "errors",
            "case": small.to_dict(),
            "dtype": dtype,
            "kind": kind,
            "device": device,
            "keys": keys,
        }
        try:
            result[kind] = {"N": small.N, "V": small.V, **run_worker(WORKER, spec, threads=threads)}
        except WorkerError as error:
            say(f"  no errors {kind}: {error}")
    return result


def time_row(case: Case, dtype: str, threads: int, key: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measures one row in a fresh process."""
    spec = {"work": "measure", "case": case.to_dict(), "dtype": dtype, "device": args.device, "key": key}
    brief = case.name == "M" and args.restrict_m
    spec |= {"budget_s": max(args.budget, BUDGET_M_S) if brief else args.budget}
    spec |= {"reps": (1, args.limits[1]) if brief and not args.reps else args.limits}
    try:
        got = run_worker(WORKER, spec, threads=threads, timeout_s=args.row_limit)
    except WorkerError as error:
        return {"status": "failed", "reason": str(error)}
    ratios = [call[1] / floor[1] for floor, call in zip(got["floor"], got["call"], strict=True)]
    best = {"roofline": roofline(case, dtype, got["rates"])} if "rates" in got else {}
    return best | {
        "status": "ok",
        "launches_seen": got["launches_seen"],
        "wall_s": summarize([wall for wall, _ in got["call"]]),
        "busy_s": summarize([busy for _, busy in got["call"]]),
        "ratio": summarize(ratios),
        "extra_peak_bytes": got["extra_peak_bytes"],
        "gradient_bytes": got["gradient_bytes"],
        "samples": {"floor": got["floor"], "call": got["call"]},
    }


def measure(
    case: Case,
    about: str | None,
    dtype: str,
    threads: int,
    keys: list[str],
    args: Any,
    save: Callable[[dict[str, Any]], None] = lambda run: None,
) -> dict[str, Any]:
    """One table: all rows at one shape, dtype and number of threads. Calls save() with it after every row."""
    run: dict[str, Any] = {**case.to_dict(), "shape": case.name, "dtype": dtype, "device": args.device}
    engine = engine_note(dtype, args.device)
    run |= {"threads": threads, "about": about, "flops": gemm_flops(case), **engine}
    del run["name"], run["file"]
    say(f"{case.describe()}, {dtype}, {threads} thread(s)")
    absent = {
        key: reason
        for key in keys
        if key in IMPLEMENTATIONS and (reason := IMPLEMENTATIONS[key].absent(args.device))
    }
    present = [key for key in keys if key in IMPLEMENTATIONS and key not in absent]
    errors = {} if args.no_errors else take_errors(case, dtype, args.device, threads, present)
    run["errors"] = {kind: {name: got[name] for name in ("kl", "N", "V")} for kind, got in errors.items()}
    run["rows"] = []
    for number, key in enumerate(keys, 1):
        row: dict[str, Any] = {"key": key, "label": "the GEMMs in fp32", "family": "floor"}
        if key in IMPLEMENTATIONS:
            implementation = IMPLEMENTATIONS[key]
            row |= {"label": implementation.label, "family": implementation.family}
            row |= engine if implementation.package == "minitron-kernels" else {}
        if key in absent:
            row |= {"status": "absent", "reason": absent[key]}
        else:
            begin = time.perf_counter()
            row |= time_row(case, dtype, threads, key, args)
            if key in IMPLEMENTATIONS and not IMPLEMENTATIONS[key].target.kl:
                row["flops"] = gemm_flops(case, teacher=False)
                row.pop("roofline", None)  # that of another loss
            took = time.perf_counter() - begin
            done = f"{row['ratio']['median']:.2f} × floor" if row["status"] == "ok" else row["reason"]
            extra = row.get("extra_peak_bytes")
            memory = f", {extra / MIB:.0f} MiB" if extra is not None and row["family"] != "floor" else ""
            say(f"  [{number}/{len(keys)}] {row['label']}: {done}{memory} ({took:.0f} s)")
        row["errors"] = {
            kind: got["rows"][key] for kind, got in errors.items() if "dX" in got["rows"].get(key, {})
        }
        run["rows"].append(row)
        sum_up(run, case)
        save(run)
    return run


def sum_up(run: dict[str, Any], case: Case) -> None:
    """Floor and roofline of the table, from its rows so far."""
    if measured := [row["roofline"] for row in run["rows"] if "roofline" in row]:
        typical = {name: summarize([row[name] for row in measured])["median"] for name in RATES}
        run["roofline"] = roofline(case, run["dtype"], typical)
    same = [row for row in run["rows"] if row["status"] == "ok" and "flops" not in row]
    if floors := [pair for row in same for pair in row["samples"]["floor"]]:
        run["floor"] = {
            "wall_s": summarize([w for w, _ in floors]),
            "busy_s": summarize([b for _, b in floors]),
        }


def backend_note(device: str) -> dict[str, Any]:
    """The backend of the library that serves the loss here, on a CPU its GEMMs too; {} without it."""
    try:
        from minitron_kernels import _backend, _native
    except ImportError:
        return {}
    note = {"backend": _backend.pick("linear_kl_loss", torch.device(device), "auto")}
    gemm = _native.build_info().get("gemm") if torch.device(device).type == "cpu" else None
    return note | ({"gemm": gemm} if gemm else {})


def engine_note(dtype: str, device: str) -> dict[str, str]:
    """The engine of the library's GEMMs on a CPU, as plan_linear_kl_loss() names it; {} elsewhere."""
    try:
        from minitron_kernels import _native, plan_linear_kl_loss
    except ImportError:
        return {}
    if torch.device(device).type != "cpu" or not _native.available():
        return {}
    return {"engine": plan_linear_kl_loss(1, 64, 64, 64, dtype=DTYPES[dtype]).engine}


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    named = [key for key in args.impl if key in OURS]
    ours = [key for key in named if IMPLEMENTATIONS[key].absent(args.device) is None]
    if named and not IMPLEMENTATIONS[named[0]].version():
        raise SystemExit(
            "minitron-kernels is not installed; in the root of the repository: pip install '.[bench]'"
        )
    note = backend_note(args.device)
    packages = [row.package for row in IMPLEMENTATIONS.values() if row.package]
    result = {"format": 1, "benchmark": "kl_loss", "machine": facts(args.device, packages) | note, "runs": []}
    say(describe(result["machine"]))

    def save(run: dict[str, Any]) -> None:
        write_json(args.json, result | {"runs": [*result["runs"], run]}, complete=False)

    for dtype in args.dtype:
        if ours:
            gate(ours, dtype, args.device, args.threads[0])
    for name in args.shape:
        case, about = (parse_shape(name), None) if name != "real" else real_inputs()
        for dtype in args.dtype:
            keys = [key for key in args.impl if not (key == FLOOR_FP32 and dtype == "fp32")]
            if name == "M" and args.restrict_m:
                keys = [key for key in keys if key in AT_M]
            for threads in args.threads:
                run = measure(case, about, dtype, threads, keys, args, save)
                result["runs"].append(run)
                width = shutil.get_terminal_size((200, 50)).columns
                print(f"\n{as_text(run, width)}\n", flush=True)
    return result


def real_inputs() -> tuple[Case, str]:
    try:
        from kl_loss_rows.real_case import real_case
    except ImportError as error:
        raise SystemExit(f"--shape real needs {error.name}: pip install '.[bench]'") from None
    return real_case(say)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.source:
        result = json.loads(args.source.read_text())
        print("\n\n".join(as_text(run) for run in result["runs"]))
    else:
        result = run_all(args)
    write_json(args.json, result, complete=result.get("complete", True))
    if args.markdown:
        args.markdown.write_text(as_markdown(result))
    if args.plot:
        from kl_loss_rows.plot import draw

        draw(result, args.plot)


if __name__ == "__main__":
    main()
