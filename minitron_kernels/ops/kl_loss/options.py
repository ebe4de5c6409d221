"""The options of a row's loss, which kl_loss and linear_kl_loss have in common, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minitron_kernels.ops.kl_loss.checks import integer, number, positive, refuse
from minitron_kernels.ops.kl_loss.divergence import Divergence

_DIVERGENCES = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


class LossOptions(NamedTuple):
    """The options of the row divergence: `float[] options` of the ops, LossOptions in csrc."""

    beta: float
    inv_tau: float
    student_scale: float
    student_softcap: float  # 0.0 = none
    teacher_scale: float
    teacher_softcap: float
    label_smoothing: float  # of the cross-entropy

    @property
    def divergence(self) -> Divergence:
        """Which of the divergences beta names."""
        return Divergence.of(self.beta)

    def as_arguments(self) -> tuple[list[float], Tensor | None]:
        """For an op: the numbers; or, inside torch.compile, none, and a tensor [7] of them.

        The numbers of an op's call are written into a compiled graph, so that another temperature would
        compile anew. In a tensor they are data.
        """
        if not torch.compiler.is_compiling():
            return list(self), None
        return [], torch.stack([as_scalar(value, torch.device("cpu")) for value in self])

    @staticmethod
    def from_arguments(numbers: Sequence[float], values: Tensor | None) -> LossOptions:
        """What as_arguments() made, inside the op."""
        return LossOptions(*(numbers if values is None else values.tolist()))


def as_scalar(value: float, device: torch.device) -> Tensor:
    """0-dim float64; made so that torch.compile does not write the number into the graph."""
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=torch.float64, device=device) * value
    return torch.full((), value, dtype=torch.float64, device=device)


def loss_options(
    *,
    divergence: str | float,
    temperature: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    student_logit_scale: float,
    teacher_logit_scale: float,
    label_smoothing: float = 0.0,
) -> LossOptions:
    """Checks the options of both losses and turns them into numbers for the kernels."""
    if isinstance(divergence, str):
        if divergence not in _DIVERGENCES:
            raise ValueError(
                f"divergence must be one of {', '.join(_DIVERGENCES)} or a number beta in [0, 1], got "
                f"{divergence!r}"
            )
        beta = _DIVERGENCES[divergence]
    else:
        beta = number("divergence", divergence, "a name or a number")
        if not 0 <= beta <= 1:
            refuse("divergence as a number", "the beta of JSD, in [0, 1]", beta)

    label_smoothing = number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        refuse("label_smoothing", "in [0, 1]", label_smoothing)

    def cap(name: str, value: float | None) -> float:
        return 0.0 if value is None else positive(name, value)

    return LossOptions(
        beta,
        1.0 / positive("temperature", temperature),
        positive("student_logit_scale", student_logit_scale),
        cap("student_softcap", student_softcap),
        positive("teacher_logit_scale", teacher_logit_scale),
        cap("teacher_softcap", teacher_softcap),
        label_smoothing,
    )


def check_vocab_size(vocab_size: int | None, student: int, teacher: int) -> int:
    """The number of real tokens: columns beyond it are padding in both."""
    if vocab_size is None:
        if student != teacher:
            raise ValueError(
                f"student and teacher have vocabularies of {student} and {teacher} tokens: pass vocab_size=, "
                "the number of tokens that both share (columns beyond it count as padding)"
            )
        return student
    vocab_size = integer("vocab_size", vocab_size)
    if not 1 <= vocab_size <= min(student, teacher):
        raise ValueError(
            f"vocab_size must be from 1 to {min(student, teacher)}, which student and teacher have; got "
            f"{vocab_size}"
        )
    return vocab_size
