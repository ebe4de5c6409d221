"""Samples that a distributed sampler repeats: they are not counted twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def without_repeats(
    inputs: dict[str, Any], accelerator: Any, batch_size: int, ignore_index: int
) -> dict[str, Any]:
    """The batch without the labels of samples that fill up the last batch of several processes.

    The last batch of all processes together has `remainder` samples of the dataset, those of the first
    process first; what follows them are samples from the beginning, a second time.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return inputs
    own = state.remainder - accelerator.process_index * batch_size
    if own >= batch_size:
        return inputs
    inputs = dict(inputs)
    for name in ("labels", "shift_labels"):
        if inputs.get(name) is not None:
            repeated = _sample_of_token(inputs, inputs[name]) >= own
            inputs[name] = torch.where(repeated, ignore_index, inputs[name])
    return inputs


def _sample_of_token(inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """[B, T]: the index of each token's sample; of a row that was flattened, by where positions begin."""
    positions = inputs.get("position_ids")
    if labels.shape[0] == 1 and positions is not None:
        return (positions == 0).cumsum(-1) - 1
    return torch.arange(labels.shape[0], device=labels.device)[:, None].expand(labels.shape)
