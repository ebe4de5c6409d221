"""Teachers: a batch to what the student is to learn from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from minitron_kernels.distillation.causal_lm import CausalLM
from minitron_kernels.distillation.signals import DenseSignal, TeacherSignal


class Teacher(Protocol):
    """What step() and the trainers ask of a teacher; ModelTeacher and CachedTeacher are two."""

    def __call__(self, batch: Mapping[str, Any], layers: Iterable[int] = ()) -> TeacherSignal:
        """The signal for a batch (`input_ids` [B, T] and what else the model takes), without a gradient."""


class ModelTeacher:
    """A model that is run at every step, without gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self._lm = CausalLM(model)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any], layers: Iterable[int] = ()) -> DenseSignal:
        """The model's hidden states for the batch, and its head."""
        return self._lm.signal(dict(batch), layers)
