"""Measures one row of a benchmark of common/bandwidth.py, in a fresh process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common.bandwidth import Bench
from common.harness import answer, extra_peak_bytes, interleave
from common.memory_ways import fastest
from common.scripts import script


def gate(bench: Bench, inputs: Any, call: Callable[[], Any]) -> float:
    """The relative error of a call on poisoned inputs; ends the process if it is too large."""
    bench.poison(inputs)
    error = bench.error(inputs, call())
    if not error <= bench.bound:  # NaN too
        raise SystemExit(f"wrong: relative error {error:.2g}, allowed {bench.bound:.0e}; not timed")
    return error


def bench_of(name: str) -> Bench:
    """BENCH of the script benchmarks/<name>.py."""
    return script(name).BENCH


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Checks the result, chooses the fastest floor, measures the memory of a call and its time in turns with
    the floor, checks again.
    """
    bench, device = bench_of(spec["bench"]), spec["device"]
    inputs = bench.make_inputs(spec["case"], device)
    call, ways = bench.row(spec["key"]).build(inputs), bench.floor(inputs)
    error = gate(bench, inputs, call)
    way = fastest(ways, device)
    floor = ways[way]
    floor()
    result: dict[str, Any] = {"error": error, "bytes": bench.floor_bytes(inputs)}
    result |= {"floor_way": way, "floor_ways": len(ways)}
    result["extra_peak_bytes"] = extra_peak_bytes(call, device)
    pairs = interleave(floor, call, device, budget_s=spec["budget_s"], reps=tuple(spec["reps"]))
    result |= pairs.to_dict()
    gate(bench, inputs, call)  # the timed call must still do the work
    return result


if __name__ == "__main__":
    answer(measure)
