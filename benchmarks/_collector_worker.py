"""A fresh process of _collector.py: forward passes and steps of the collector in turns."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from _harness import Sample, answer
from _models import load_smollm2, mlp_scores, reference_text, tiny_model, token_windows

from minitron_kernels.pruning import collect_importance


def _model(tiny: bool) -> tuple[Any, Any, str]:
    """The model, its tokenizer and its name; a tiny random one where SmolLM2 is not to be had."""
    if not tiny:
        try:
            return *load_smollm2(lambda text: print(text, file=sys.stderr)), "SmolLM2-135M"
        except Exception as error:  # no network, no room, another transformers
            print(f"no SmolLM2-135M: {type(error).__name__}: {error}", file=sys.stderr)
    return *tiny_model(), "a tiny random model"


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


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Checks the collector, then times it."""
    model, tokenizer, name = _model(spec["tiny"])
    ids = token_windows(tokenizer, reference_text(), 1, spec["tokens"])
    _check(model, ids)
    plain, steps = _turns(model, ids, spec["pairs"])
    return {
        "model": name,
        "dtype": str(model.dtype).split(".")[1],
        "forward": [[sample.wall_s, sample.busy_s] for sample in plain],
        "step": [[sample.wall_s, sample.busy_s] for sample in steps],
    }


if __name__ == "__main__":
    answer(measure)
