"""The losses as modules: options once, tensors at every call."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from minitron_kernels.ops.kl_loss.op import kl_loss, linear_kl_loss
from minitron_kernels.ops.kl_loss.record import LossRecord
from minitron_kernels.ops.kl_loss.sparse import linear_sparse_kl_loss
from minitron_kernels.ops.kl_loss.sparse_teacher import LogTail


def _keywords(loss: Callable[..., Any]) -> list[str]:
    """Names of a function's keyword-only arguments: its options."""
    parameters = inspect.signature(loss).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


class _Loss(nn.Module):
    _name: ClassVar[str]
    _known: ClassVar[list[str]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for option in options:
            if option not in self._known:
                close = difflib.get_close_matches(option, self._known, n=1)
                hint = f": did you mean {close[0]}?" if close else ""
                raise TypeError(f"{type(self).__name__} has no option {option!r} of {self._name}(){hint}")
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class KLLoss(_Loss):
    """kl_loss() with options fixed.

    Args:
        **options: any keyword of kl_loss(), such as temperature, reduction, divergence.

    Raises:
        TypeError: kl_loss() has no such keyword.
    """

    _name, _known = "kl_loss", _keywords(kl_loss)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, **options: Any) -> Tensor | LossRecord:
        """The loss; keywords given here (labels, mask, num_items, ...) win over those of the module."""
        return kl_loss(student_logits, teacher_logits, **{**self.options, **options})


class LinearKLLoss(_Loss):
    """linear_kl_loss() with options fixed.

    Args:
        **options: any keyword of linear_kl_loss().

    Raises:
        TypeError: linear_kl_loss() has no such keyword.
    """

    _name, _known = "linear_kl_loss", _keywords(linear_kl_loss)

    def forward(
        self,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        **options: Any,
    ) -> Tensor | LossRecord:
        """The loss; keywords given here (labels, mask, num_items, ...) win over those of the module."""
        return linear_kl_loss(
            student_hidden, student_head, teacher_hidden, teacher_head, **{**self.options, **options}
        )


class LinearSparseKLLoss(_Loss):
    """linear_sparse_kl_loss() with options fixed.

    Args:
        **options: any keyword of linear_sparse_kl_loss().

    Raises:
        TypeError: linear_sparse_kl_loss() has no such keyword.
    """

    _name, _known = "linear_sparse_kl_loss", _keywords(linear_sparse_kl_loss)

    def forward(
        self,
        student_hidden: Tensor,
        student_head: Tensor,
        ids: Tensor,
        logprobs: Tensor,
        log_tail: LogTail,
        **options: Any,
    ) -> Tensor | LossRecord:
        """The loss; keywords given here (labels, mask, num_items, ...) win over those of the module."""
        return linear_sparse_kl_loss(
            student_hidden, student_head, ids, logprobs, log_tail, **{**self.options, **options}
        )
