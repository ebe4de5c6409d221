"""DistillationLoss: a student's and a teacher's signals to one loss with its parts."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from minitron_kernels.distillation.signals import DenseSignal, SparseSignal, TeacherSignal
from minitron_kernels.ops.kl_loss.op import linear_kl_loss
from minitron_kernels.ops.kl_loss.sparse import linear_sparse_kl_loss


class DistillationRecord(NamedTuple):
    """A loss and its parts; all but `loss` are detached. The first six are those of LossRecord."""

    loss: Tensor
    kl: Tensor
    ce: Tensor | None
    entropy: Tensor
    label_logprob: Tensor | None
    num_tokens: Tensor
    hidden: Tensor | None = None  # the hidden-state term, before its weight
    hidden_weight: Tensor | None = None  # the weight that it had (dynamic or fixed)


class DistillationLoss(nn.Module):
    """KL between a teacher's and a student's next tokens, cross-entropy, and terms of their hidden states."""

    def __init__(
        self,
        *,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
        divergence: str | float = "forward_kl",
        temperature: float = 1.0,
        temperature_squared: bool = False,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        vocab_size: int | None = None,
        schedule: str = "auto",
        workspace_bytes: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "kl_weight": kl_weight,
            "ce_weight": ce_weight,
            "divergence": divergence,
            "temperature": temperature,
            "temperature_squared": temperature_squared,
            "label_smoothing": label_smoothing,
            "ignore_index": ignore_index,
            "vocab_size": vocab_size,
            "schedule": schedule,
            "workspace_bytes": workspace_bytes,
            "backend": backend,
        }

    @property
    def student_layers(self) -> tuple[int, ...]:
        """Layers of the student whose outputs forward() needs."""
        return ()

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """Layers of the teacher whose outputs forward() needs."""
        return ()

    def forward(
        self,
        student: DenseSignal,
        teacher: TeacherSignal,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> DistillationRecord:
        """The loss of a batch; `labels` [...] are the targets of their positions (shift_labels())."""
        common = {
            **self.options,
            "labels": labels,
            "mask": mask,
            "token_weights": token_weights,
            "num_items": num_items,
            "student_bias": student.bias,
            "student_logit_scale": student.logit_scale,
            "student_softcap": student.softcap,
            "return_parts": True,
        }
        if isinstance(teacher, SparseSignal):
            operands = teacher.ids, teacher.logprobs, teacher.log_tail
            record = linear_sparse_kl_loss(student.hidden, student.head, *operands, **common)
        else:
            record = linear_kl_loss(
                student.hidden,
                student.head,
                teacher.hidden,
                teacher.head,
                teacher_bias=teacher.bias,
                teacher_logit_scale=teacher.logit_scale,
                teacher_softcap=teacher.softcap,
                **common,
            )
        return DistillationRecord(*record)
