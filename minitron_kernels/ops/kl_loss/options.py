"""What kl_loss and linear_kl_loss have in common: options, their checks, masks and reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minitron_kernels.ops.kl_loss.checks import check_tensor, integer, number, positive, refuse
from minitron_kernels.ops.kl_loss.divergence import Divergence

_DIVERGENCES = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
REDUCTIONS = ("mean", "sum", "none")


class LossOptions(NamedTuple):
    """The options of the row divergence: `float[] options` of the ops, LossOptions in csrc."""

    beta: float
    inv_tau: float
    student_scale: float
    student_softcap: float  # 0.0 = none
    teacher_scale: float
    teacher_softcap: float

    @property
    def divergence(self) -> Divergence:
        """Which of the divergences beta names."""
        return Divergence.of(self.beta)

    def as_arguments(self) -> tuple[list[float], Tensor | None]:
        """For an op: the numbers; or, inside torch.compile, none, and a tensor [6] of them.

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

    def cap(name: str, value: float | None) -> float:
        return 0.0 if value is None else positive(name, value)

    return LossOptions(
        beta,
        1.0 / positive("temperature", temperature),
        positive("student_logit_scale", student_logit_scale),
        cap("student_softcap", student_softcap),
        positive("teacher_logit_scale", teacher_logit_scale),
        cap("teacher_softcap", teacher_softcap),
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


@torch.library.custom_op("minitron_kernels::labels_to_mask", mutates_args=())
def _labels_to_mask(labels: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    """[N] bool: labels other than ignore_index; an error if one of those is not a token."""
    valid = labels != ignore_index
    wrong = valid & ((labels < 0) | (labels >= vocab_size))
    if labels.device.type == "cpu":
        if wrong.any():
            position = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"labels must be ignore_index={ignore_index} or in [0, {vocab_size}), got "
                f"{int(labels[position])} at position {position}"
            )
    else:  # no synchronisation: the error comes from the device
        torch._assert_async(~wrong.any())
    return valid


@_labels_to_mask.register_fake
def _(labels: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    return torch.empty_like(labels, dtype=torch.bool)


def rows_mask(
    labels: Tensor | None,
    ignore_index: int,
    mask: Tensor | None,
    shape: torch.Size,
    vocab_size: int,
    device: torch.device,
) -> Tensor | None:
    """[N] bool of the valid tokens, or None if all are valid."""
    rows = None
    if mask is not None:
        _check_per_token("mask", mask, shape, device)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool (True = the token counts), got {mask.dtype}")
        rows = mask.reshape(-1)
    if labels is not None:
        _check_per_token("labels", labels, shape, device)
        if labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
        ignore_index = integer("ignore_index", ignore_index)
        valid = _labels_to_mask(labels.reshape(-1), ignore_index, vocab_size)
        rows = valid if rows is None else rows & valid
    return None if rows is None else rows.contiguous()


def _check_per_token(name: str, x: Tensor, shape: torch.Size, device: torch.device) -> None:
    check_tensor(name, x)
    if x.shape != shape:
        raise ValueError(f"{name} must have one entry per token, shape {tuple(shape)}; got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, but the student is on {device}")


def row_factor(
    reduction: str,
    num_items: float | Tensor | None,
    rows: int,
    mask: Tensor | None,
    temperature: float | None,
) -> tuple[float, Tensor | None]:
    """What each row's loss is multiplied by before it is summed: a number times a 0-dim tensor (or None).

    `temperature` is given where the loss carries the temperature-squared factor. Where no token is
    valid the factor is finite, whatever num_items is, so that the loss is 0.
    """
    if reduction not in REDUCTIONS:
        hint = _BATCHMEAN if reduction == "batchmean" else ""
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}{hint}")
    scale = 1.0 if temperature is None else temperature * temperature
    if reduction != "mean":
        if num_items is not None:
            raise ValueError(f'num_items is what reduction="mean" divides by; got reduction={reduction!r}')
        return scale, None
    if num_items is None:
        if mask is None:
            return scale * (1.0 / max(rows, 1)), None  # to the bit what a mask gives
        return scale, mask.sum().clamp(min=1).to(torch.float64).reciprocal()
    if rows == 0:
        return 0.0, None
    if isinstance(num_items, Tensor):
        count = _items_tensor(num_items, mask)
        if isinstance(count, Tensor):
            return scale, count
        num_items = count
    num_items = number("num_items", num_items)
    if num_items == 0 and mask is not None:
        return scale, _reciprocal(torch.zeros((), dtype=torch.float64, device=mask.device), mask)
    return scale / positive("num_items", num_items), None


_BATCHMEAN = (
    '. F.kl_div\'s "batchmean" divides by the size of the batch: for that pass num_items=batch_size; '
    'here "mean" divides by the valid tokens'
)


def _items_tensor(num_items: Tensor, mask: Tensor | None) -> Tensor | float:
    """1 / num_items as a tensor where its value cannot be looked at without waiting, else num_items."""
    check_tensor("num_items", num_items)
    if num_items.numel() != 1:
        raise ValueError(f"num_items must have one element, got shape {tuple(num_items.shape)}")
    if num_items.device.type == "cpu" and not torch.compiler.is_compiling():
        return num_items.item()
    if mask is not None and num_items.device.type != "cpu" and num_items.device != mask.device:
        raise ValueError(f"num_items is on {num_items.device}, but the student is on {mask.device}")
    return _reciprocal(num_items.reshape(()).to(torch.float64).clamp(min=0), mask)


def _reciprocal(count: Tensor, mask: Tensor | None) -> Tensor:
    """1 / count; 0 where no token is valid. Of 0 where some are: inf, or on the CPU at once an error."""
    if mask is None:
        return count.reciprocal()
    any_row = mask.any()
    known = count.device.type == mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if known and any_row:
        positive("num_items", float(count))
    return torch.where(any_row, count.to(mask.device).reciprocal(), 0.0)
