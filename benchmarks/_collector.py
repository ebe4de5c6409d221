"""What collect_importance() adds to a forward pass of SmolLM2-135M.

Steps of the collector and plain forward passes of the same weights take turns, now one first, now the other,
so that the drift of the machine falls on both. A step is all that a batch costs: reading it, the forward pass
with all axes' hooks, and putting the moments into the states. Both call the decoder without the LM head.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _harness import Sample, summarize
from _models import load_smollm2, mlp_scores, reference_text, tiny_model, token_windows

from minitron_kernels.pruning import collect_importance

Say = Callable[[str], None]
PAIRS = 40  # a pair differs by several per cent from the next on a shared machine


def _model(say: Say, tokens: int, tiny: bool) -> tuple[Any, torch.Tensor, str]:
    """The model, or a tiny random one where it is not to be had; [1, tokens] of text; the model's name."""
    model = None
    if not tiny:
        try:
            model, tokenizer = load_smollm2(say)
            name = "SmolLM2-135M"
        except Exception as error:  # no network, no room, another transformers
            say(
                f"no SmolLM2-135M ({type(error).__name__}: {error}); a tiny model of random weights stands in"
            )
    if model is None:
        model, tokenizer = tiny_model()
        name = "a tiny random model"
    return model, token_windows(tokenizer, reference_text(), 1, tokens), name


def _twin(model: torch.nn.Module) -> torch.nn.Module:
    """A second model of the same weights, on which nobody hangs hooks."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _check(model: Any, ids: torch.Tensor) -> None:
    """The collector's neuron scores against those of a plain hook."""
    got = collect_importance(model, [ids], axes=("mlp",), progress=False).tables()["mlp"]
    for layer, wanted in enumerate(mlp_scores(model, ids)):
        torch.testing.assert_close(got[layer].float(), wanted, rtol=1e-4, atol=1e-6)


def _now() -> Sample:
    return Sample(time.perf_counter(), time.process_time())


def _since(begin: Sample) -> Sample:
    return Sample(time.perf_counter() - begin.wall_s, time.process_time() - begin.busy_s)


def _turns(model: Any, ids: torch.Tensor, reps: int) -> tuple[list, list]:
    """Samples (plain forward passes, the collector's steps), two of each less, for warming up."""
    plain: list[Sample] = []
    steps: list[Sample] = []
    twin = _twin(model)

    def pass_by() -> None:
        begin = _now()
        with torch.no_grad():
            twin.model(input_ids=ids, use_cache=False)
        plain.append(_since(begin))

    def batches() -> Iterator[torch.Tensor]:
        for turn in range(reps + 2):
            if turn % 2:
                pass_by()
            begin = _now()
            yield ids
            steps.append(_since(begin))
            if turn % 2 == 0:
                pass_by()

    collect_importance(model, batches(), progress=False)
    return plain[2:], steps[2:]


def measure(say: Say, args: argparse.Namespace) -> dict[str, Any]:
    """What scoring costs beside the forward pass, for some numbers of threads.

    Returns:
        {"model", "tokens", "dtype", "rows": [{"threads", "forward_s", "busy_overhead", "wall_overhead",
        "samples"}]}; an overhead is step / forward pass - 1 of neighbours.
    """
    if args.device != "cpu":
        say("the collector is measured on the CPU")
    model, ids, name = _model(say, 64 if args.quick else 512, args.quick)
    _check(model, ids)
    before = torch.get_num_threads()
    rows = []
    try:
        for count in args.threads:
            say(f"collector, {count} thread(s)")
            torch.set_num_threads(count)
            plain, steps = _turns(model, ids, 3 if args.quick else PAIRS)
            pairs = list(zip(plain, steps, strict=True))
            rows.append(
                {
                    "threads": count,
                    "forward_s": summarize([sample.wall_s for sample in plain]),
                    "busy_overhead": summarize([step.busy_s / base.busy_s - 1 for base, step in pairs]),
                    "wall_overhead": summarize([step.wall_s / base.wall_s - 1 for base, step in pairs]),
                    "samples": {
                        "forward": [[sample.wall_s, sample.busy_s] for sample in plain],
                        "step": [[sample.wall_s, sample.busy_s] for sample in steps],
                    },
                }
            )
    finally:
        torch.set_num_threads(before)
    return {"model": name, "tokens": ids.shape[1], "dtype": str(model.dtype).split(".")[1], "rows": rows}


def lines(result: dict[str, Any]) -> list[str]:
    """One line for each number of threads."""
    about = f"{result['model']}, {result['tokens']} tokens, {result['dtype']}"
    return [
        f"Collecting all axes of {about}, {row['threads']} thread" + "s" * (row["threads"] > 1) + ": "
        f"{_percent(row['wall_overhead'])} of the forward pass ({row['forward_s']['median'] * 1e3:.0f} ms), "
        f"{_percent(row['busy_overhead'])} of its CPU time; {row['wall_overhead']['n']} pairs"
        for row in result["rows"]
    ]


def _percent(share: dict[str, float]) -> str:
    return f"{share['median']:.1%} ({share['p20']:.1%} to {share['p80']:.1%})"
