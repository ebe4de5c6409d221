"""Warnings of a map of hidden states that is left out: by the optimizer, or by what averages gradients."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minitron_kernels._tensors import is_dtensor

_REMEDY = "loss.attach_map(student), before the student is wrapped and before the optimizer is made"


class MapWatch:
    """What DistillationLoss looks at in every call that makes gradients; it warns once, and never waits."""

    def __init__(self) -> None:
        self.attached = False
        self._done = False
        self._versions: tuple[int, int] | None = None
        self._idle_steps = 0

    def look(self, weight: Tensor, head: Tensor) -> None:
        """Warns where ranks train the map alone, or the head was stepped twice and the map never."""
        if torch.compiler.is_compiling() or self._done:
            return
        if not (torch.is_grad_enabled() and weight.requires_grad) or is_dtensor(weight):
            return
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            if not self.attached:
                self._warn(
                    "the map of the hidden states is not a part of the student: its gradients stay those of "
                    f"this rank unless you average them. {_REMEDY}, lets DDP and FSDP do it"
                )
            return
        if not isinstance(head, nn.Parameter) or is_dtensor(head) or head.is_inference():
            return
        versions = weight._version, head._version  # an optimizer's step changes them in place
        before, self._versions = self._versions, versions
        if before is None or before[1] == versions[1]:
            return
        if before[0] != versions[0]:
            self._done = True
            return
        self._idle_steps += 1
        if self._idle_steps == 2:
            self._warn(
                "the student's head was changed twice and the map of the hidden states was not: the "
                f"optimizer does not have the map. {_REMEDY}, gives it to student.parameters()"
            )

    def _warn(self, text: str) -> None:
        self._done = True
        warnings.warn(text, stacklevel=5)
