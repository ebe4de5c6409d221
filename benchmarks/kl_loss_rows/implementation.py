"""What a row of the table is: a function from inputs to a loss, and what there is to know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch

from kl_loss_rows.cases import KL, Inputs, Target

Loss = Callable[[Inputs], torch.Tensor]


@dataclass(frozen=True)
class Implementation:
    """A row of the table. `build` imports what it needs and returns the loss."""

    key: str
    label: str
    family: str  # implementations of a family have one colour in the picture
    build: Callable[[], Loss]
    package: str | None = None  # the distribution that contains it
    pip: str | None = None  # the command that installs it
    gives_loss: bool = True  # False: the value differs from the KL by a constant; the gradient is the same
    compiles: bool = False  # whether it is compiled for each shape: then the warm-up has the same shape
    devices: tuple[str, ...] = ("cpu", "cuda")
    backend: str | None = None  # of the library's own rows
    op: str = "linear_kl_loss"  # likewise
    lacks: Callable[[], str | None] = lambda: None  # why its package, though installed, does not have it
    target: Target = KL  # what it computes

    @property
    def has_teacher(self) -> bool:
        """Whether it makes a teacher's logits: then four GEMMs are its floor, else three."""
        return bool(self.target.kl) and not self.target.sparse

    def serves(self, device: str) -> bool:
        """Whether this row exists for the kind of device."""
        return torch.device(device).type in self.devices

    def absent(self, device: str) -> str | None:
        """Why it cannot be measured here; None if it can."""
        if not self.serves(device):
            return f"not on {torch.device(device).type}"
        if self.version() is None:
            return self.pip
        if self.backend is None:
            return self.lacks()
        from minitron_kernels import _backend

        return _backend.why_not(self.op, self.backend, torch.device(device))

    def version(self) -> str | None:
        """The version of its package, or of torch if it needs none; None if the package is absent."""
        if self.package is None:
            return torch.__version__
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None


def step(loss: Loss, inputs: Inputs) -> torch.Tensor:
    """Forward and backward; the gradients are in `.grad` of the student's operands. Returns the loss."""
    inputs.student_hidden.grad = inputs.student_head.grad = None
    value = loss(inputs)
    value.backward()
    return value.detach()
