"""The losses as modules: options once, tensors at every call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from minitron_kernels.ops.kl_loss.op import kl_loss, linear_kl_loss


class _Loss(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class KLLoss(_Loss):
    """kl_loss() with options fixed.

    Args:
        **options: any keyword of kl_loss(), such as temperature, reduction, divergence.
    """

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, **options: Any) -> Tensor:
        """The loss; keywords given here (labels, mask, num_items, ...) win over those of the module."""
        return kl_loss(student_logits, teacher_logits, **{**self.options, **options})


class LinearKLLoss(_Loss):
    """linear_kl_loss() with options fixed.

    Args:
        **options: any keyword of linear_kl_loss().
    """

    def forward(
        self,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        **options: Any,
    ) -> Tensor:
        """The loss; keywords given here (labels, mask, num_items, ...) win over those of the module."""
        return linear_kl_loss(
            student_hidden, student_head, teacher_hidden, teacher_head, **{**self.options, **options}
        )
