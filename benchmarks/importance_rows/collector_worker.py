"""Times forward passes and steps of the collector in turns, in a fresh process, for collector.py."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from common.harness import Sample, answer, sample
from common.models import TINY, mlp_scores, reference_text, smollm2_or_tiny, tiny_model, token_windows
from minitron_kernels.pruning import collect_importance


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _twin(model: torch.nn.Module) -> torch.nn.Module:
    """A second model with the same weights, which gets no hooks."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _check(model: Any, ids: torch.Tensor) -> None:
    """Checks the collector's neuron scores against those of a plain hook."""
    got = collect_importance(model, [ids], axes=("mlp",), progress=False).tables()["mlp"]
    for layer, wanted in enumerate(mlp_scores(model, ids)):
        torch.testing.assert_close(got[layer].float(), wanted, rtol=1e-4, atol=1e-6)


def _turns(model: Any, ids: torch.Tensor, reps: int) -> tuple[list, list]:
    """(samples of plain forward passes, of the collector's steps), without two of each as a warm-up."""
    plain: list[Sample] = []
    steps: list[Sample] = []
    twin = _twin(model)

    @torch.no_grad()
    def forward() -> None:
        twin.model(input_ids=ids, use_cache=False)

    def batches() -> Iterator[torch.Tensor]:
        for turn in range(reps + 2):
            if turn % 2:
                plain.append(sample(forward, "cpu"))
            wall, busy = time.perf_counter(), time.process_time()
            yield ids
            steps.append(Sample(time.perf_counter() - wall, time.process_time() - busy))
            if turn % 2 == 0:
                plain.append(sample(forward, "cpu"))

    collect_importance(model, batches(), progress=False)
    return plain[2:], steps[2:]


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Checks the collector, then times it."""
    model, tokenizer, name = (*tiny_model(), TINY) if spec["tiny"] else smollm2_or_tiny(_say)
    ids = token_windows(tokenizer, reference_text(), 1, spec["tokens"])
    _check(model, ids)
    forward, step = _turns(model, ids, spec["pairs"])
    return {
        "model": name,
        "dtype": str(model.dtype).split(".")[1],
        "forward": [[one.wall_s, one.busy_s] for one in forward],
        "step": [[one.wall_s, one.busy_s] for one in step],
    }


if __name__ == "__main__":
    answer(measure)
