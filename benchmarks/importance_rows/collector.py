"""What collect_importance() adds to a forward pass of SmolLM2-135M.

Steps of the collector and plain forward passes with the same weights take turns, in alternating order, so
that drift of the machine affects both. A step is all that a batch costs: reading it, the forward pass with
the hooks of all axes, and adding the moments to the states. Both call the decoder without the LM head.

On a shared machine passes take up to 10 % more time than undisturbed, and all those of a process are faster
or slower by a per cent or two, depending on where its memory lies. So in each of several processes the
fastest step is compared with the fastest pass; ratios of neighbouring pairs are reported too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.harness import run_worker, summarize

Say = Callable[[str], None]
WORKER = Path(__file__).with_name("collector_worker.py")
PROCESSES, PAIRS = 6, 10


def measure(say: Say, args: argparse.Namespace) -> dict[str, Any]:
    """Measures what scoring adds to a forward pass, for each number of threads.

    Returns:
        {"model", "tokens", "dtype", "rows": [summary()]}. An overhead is step / forward pass - 1, of
        neighbours or of the fastest of each process.
    """
    if args.device != "cpu":
        say("the collector is measured on the CPU")
    processes, pairs, tokens = (1, 3, 64) if args.quick else (PROCESSES, PAIRS, 512)
    spec = {"tiny": args.quick, "tokens": tokens, "pairs": pairs}
    result: dict[str, Any] = {"tokens": tokens, "rows": []}
    for threads in args.threads:
        say(f"collector, {threads} thread(s)")
        answers = [run_worker(WORKER, spec, threads=threads) for _ in range(processes)]
        result |= {key: answers[0][key] for key in ("model", "dtype")}
        runs = [{key: answer[key] for key in ("forward", "step")} for answer in answers]
        result["rows"].append(summary(threads, runs))
    return result


def summary(threads: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarises `runs`, the samples of each process."""
    turns = [turn for run in runs for turn in zip(run["forward"], run["step"], strict=True)]
    fastest = [min(wall for wall, _ in run["step"]) / min(wall for wall, _ in run["forward"]) for run in runs]
    return {
        "threads": threads,
        "forward_s": summarize([forward[0] for forward, _ in turns]),
        "fastest_overhead": summarize([ratio - 1 for ratio in fastest]),
        "wall_overhead": summarize([step[0] / forward[0] - 1 for forward, step in turns]),
        "busy_overhead": summarize([step[1] / forward[1] - 1 for forward, step in turns]),
        "processes": runs,
    }


def lines(result: dict[str, Any]) -> list[str]:
    """One line for each number of threads."""
    about = f"{result['model']}, {result['tokens']} tokens, {result['dtype']}"
    return [
        f"Collecting all axes of {about}, {row['threads']} thread" + "s" * (row["threads"] > 1) + ", adds "
        f"{_percent(row['fastest_overhead'])} to a forward pass of {row['forward_s']['median']:.2f} s, "
        f"the fastest to the fastest of each process, of {row['fastest_overhead']['n']}; pair by pair "
        f"{_percent(row['wall_overhead'])}, of CPU time {_percent(row['busy_overhead'])}, "
        f"{row['wall_overhead']['n']} pairs"
        for row in result["rows"]
    ]


def _percent(share: dict[str, float]) -> str:
    return f"{share['median']:.1%} ({share['p20']:.1%} to {share['p80']:.1%})"
