"""The targets of a batch of transformers: which positions count, and how many they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minitron_kernels.ops.kl_loss.labels import shift_labels


def take_targets(inputs: Mapping[str, Any], ignore_index: int) -> tuple[Tensor, dict[str, Any]]:
    """The targets [B, T] of a batch, and what is left of it.

    `shift_labels`, which some collators make, are targets already; `labels` stand at their own tokens.
    """
    batch = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
    shifted = inputs.get("shift_labels")
    return (_shifted(inputs, ignore_index) if shifted is None else shifted), batch


def _shifted(inputs: Mapping[str, Any], ignore_index: int) -> Tensor:
    labels = inputs.get("labels")
    if labels is None:
        raise ValueError(
            "the batch must have labels, which say which tokens count, got only "
            f"{', '.join(sorted(inputs)) or 'nothing'}: take a collator that makes them, such as "
            "DataCollatorForLanguageModeling(tokenizer, mlm=False) or DataCollatorWithFlattening()"
        )
    return shift_labels(labels, ignore_index)


def count_targets(inputs: Mapping[str, Any], ignore_index: int) -> Tensor:
    """How many positions have a target, 0-dim; a label at the first token is no position's target."""
    targets, _ = take_targets(inputs, ignore_index)
    return (targets != ignore_index).sum()


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
