"""One step of a loop of one's own: teacher, student and loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from minitron_kernels.distillation.causal_lm import is_attached, prepare_layers
from minitron_kernels.distillation.loss import DistillationLoss, DistillationRecord
from minitron_kernels.distillation.signals import DenseSignal, TeacherSignal
from minitron_kernels.distillation.targets import targets_of
from minitron_kernels.distillation.teacher import Teacher

_NOT_FOR_MODELS = ("labels", "shift_labels", "num_items_in_batch")


class DistillationCall:
    """What an attached student does with its signal: the loss against this teacher's.

    No dataclass and no tuple: wrappers look into those for tensors to cast and move, and this is not theirs.

    Args:
        loss: what is made of both signals.
        teacher: the teacher's signal for the batch.
        labels: [B, T] int64, the targets of their positions, or None.
        token_weights: [B, T] float.
        num_items: divides the sum over tokens, in place of the number of valid ones.
        mask: [B, T] bool, True where a position counts.
    """

    def __init__(
        self,
        loss: DistillationLoss,
        teacher: TeacherSignal,
        labels: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self.loss, self.teacher = loss, teacher
        self.labels, self.mask, self.token_weights = labels, mask, token_weights
        self.num_items = num_items

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of the student whose outputs the loss needs."""
        return self.loss.student_layers

    def __call__(self, student: DenseSignal) -> DistillationRecord:
        """The loss of this batch."""
        return self.loss(
            student,
            self.teacher,
            self.labels,
            mask=self.mask,
            token_weights=self.token_weights,
            num_items=self.num_items,
        )


def step(
    student: nn.Module,
    teacher: Teacher,
    batch: Mapping[str, Any],
    loss: DistillationLoss,
    *,
    num_items: float | Tensor | None = None,
    token_weights: Tensor | None = None,
) -> DistillationRecord:
    """The loss of a batch, ready for backward(): teacher, student and DistillationLoss in one call.

        student = DistributedDataParallel(attach(student))
        record = step(student, ModelTeacher(teacher), batch, DistillationLoss())
        record.loss.backward()

    Which positions count: those with a label, aligned with `input_ids` as Hugging Face has them (shifted
    here); without labels all whose token and next token are real by `attention_mask`. In either case not
    those in the padding, nor the last one of each sequence packed into a row: see targets_of().

    Args:
        student: given to attach() before it was wrapped; called through its wrapper (DDP, FSDP2, compiled,
            ...).
        teacher: ModelTeacher, CachedTeacher, or any callable like them; gets the batch without its labels.
        batch: the student's arguments by name, [B, T] tensors on its device.
        loss: what is made of both signals.
        num_items: divides the sum over tokens, in place of this batch's valid tokens: count_targets() of all
            micro-batches of an optimizer step. Where DDP or FSDP average over ranks, those of all ranks
            divided by the number of ranks.
        token_weights: [B, T] float, multiplies each position's loss.

    Returns:
        The record; `record.loss` has the gradient.

    Raises:
        TypeError: a student that was not attached.
        ValueError: from the models, targets_of() or the loss.
    """
    check_student(student)
    inputs = {name: value for name, value in batch.items() if name not in _NOT_FOR_MODELS}
    labels, mask = targets_of(batch, loss.options["ignore_index"])
    check_apart = getattr(teacher, "check_apart", None)
    if check_apart is not None:
        check_apart(student)
    if loss.student_layers:
        prepare_layers(student)
    signal = teacher(inputs, loss.teacher_layers)
    call = DistillationCall(loss, signal, labels, token_weights, num_items, mask)
    record: Any = student(**inputs, distillation=call)
    if not isinstance(record, DistillationRecord):
        raise TypeError(
            f"{type(student).__name__}(**batch, distillation=call) returned a {type(record).__name__} and "
            "not what call(signal) returns: give the model to attach() before it is wrapped"
        )
    return record


def check_student(student: nn.Module) -> None:
    """Checks that a call of the student understands `distillation`.

    Raises:
        TypeError: it would be ignored, or handed on to something that ignores it.
    """
    if is_attached(student):
        return
    if "distillation" not in inspect.signature(student.forward).parameters:
        raise TypeError(
            f"this {type(student).__name__} was not attached: call attach(model) on the language model, "
            "before DDP, FSDP or torch.compile wrap it"
        )
