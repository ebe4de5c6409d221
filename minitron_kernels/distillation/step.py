"""One step of a loop of one's own: teacher, student and loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from minitron_kernels.distillation.loss import DistillationLoss, DistillationRecord
from minitron_kernels.distillation.signals import DenseSignal, TeacherSignal
from minitron_kernels.distillation.teacher import Teacher
from minitron_kernels.ops.kl_loss.labels import shift_labels


@dataclass(eq=False)
class DistillationCall:
    """What an attached student does with its signal: the loss against this teacher's."""

    loss: DistillationLoss
    teacher: TeacherSignal
    labels: Tensor | None  # the targets of their positions
    token_weights: Tensor | None = None
    num_items: float | Tensor | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of the student whose outputs the loss needs."""
        return self.loss.student_layers

    def __call__(self, student: DenseSignal) -> DistillationRecord:
        """The loss of this batch."""
        return self.loss(
            student, self.teacher, self.labels, token_weights=self.token_weights, num_items=self.num_items
        )


def step(
    student: nn.Module,
    teacher: Teacher,
    batch: Mapping[str, Any],
    loss: DistillationLoss,
    *,
    num_items: float | Tensor | None = None,
) -> DistillationRecord:
    """The loss of a batch, ready for backward(): teacher, student and DistillationLoss in one call.

    `student` was given to attach() before it was wrapped. The batch's `labels`, if any, are aligned with
    `input_ids` as Hugging Face has them; they are shifted here.
    """
    labels = batch.get("labels")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    signal = teacher(inputs, loss.teacher_layers)
    targets = None if labels is None else shift_labels(labels)
    call = DistillationCall(loss, signal, targets, num_items=num_items)
    record: DistillationRecord = student(**inputs, distillation=call)
    return record
