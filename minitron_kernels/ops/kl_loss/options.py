"""What kl_loss and linear_kl_loss have in common: options, their checks, masks and reductions."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_DIVERGENCES = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")


class LossOptions(NamedTuple):
    """The options of the row divergence, in the order of the ops' schemas."""

    beta: float
    inv_tau: float
    student_scale: float
    student_softcap: float  # 0.0 = none
    teacher_scale: float
    teacher_softcap: float


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be finite and greater than 0, got {value}")
    return float(value)


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
    elif isinstance(divergence, (int, float)) and not isinstance(divergence, bool):
        if not 0 <= divergence <= 1:
            raise ValueError(f"divergence as a number is the beta of JSD, in [0, 1]; got {divergence}")
        beta = float(divergence)
    else:
        raise TypeError(f"divergence must be a name or a number, got {type(divergence).__name__}")

    def cap(name: str, value: float | None) -> float:
        return 0.0 if value is None else _positive(name, value)

    return LossOptions(
        beta,
        1.0 / _positive("temperature", temperature),
        _positive("student_logit_scale", student_logit_scale),
        cap("student_softcap", student_softcap),
        _positive("teacher_logit_scale", teacher_logit_scale),
        cap("teacher_softcap", teacher_softcap),
    )


def check_floating(**tensors: Tensor) -> None:
    """Each is a float tensor of a served dtype, all on one device."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device}, but {first_name} is on {first.device}")
        if (x.dtype == torch.float64) != (first.dtype == torch.float64):
            raise TypeError(f"{name} is {x.dtype}, but {first_name} is {first.dtype}: float64 needs float64")


def check_vocab_size(vocab_size: int | None, student: int, teacher: int) -> int:
    """The number of real tokens: columns beyond it are padding in both."""
    if vocab_size is None:
        if student != teacher:
            raise ValueError(
                f"student and teacher have vocabularies of {student} and {teacher} tokens: pass vocab_size=, "
                "the number of tokens that both share (columns beyond it count as padding)"
            )
        return student
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}")
    if not 1 <= vocab_size <= min(student, teacher):
        raise ValueError(
            f"vocab_size must be from 1 to {min(student, teacher)}, which student and teacher have; got "
            f"{vocab_size}"
        )
    return vocab_size


@torch.library.custom_op("minitron_kernels::labels_to_mask", mutates_args=())
def _labels_to_mask(labels: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    """[N] bool: labels other than ignore_index; an error if one of those is no token."""
    counted = labels != ignore_index
    wrong = counted & ((labels < 0) | (labels >= vocab_size))
    if labels.device.type == "cpu":
        if wrong.any():
            position = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"labels must be ignore_index={ignore_index} or in [0, {vocab_size}), got "
                f"{int(labels[position])} at position {position}"
            )
    else:  # no synchronisation: the error comes from the device
        torch._assert_async(~wrong.any())
    return counted


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
    """[N] bool of the rows that count, or None for all of them."""
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
        counted = _labels_to_mask(labels.reshape(-1), ignore_index, vocab_size)
        rows = counted if rows is None else rows & counted
    return None if rows is None else rows.contiguous()


def _check_per_token(name: str, x: Tensor, shape: torch.Size, device: torch.device) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
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

    `temperature` is given where the loss carries the temperature-squared factor.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    scale = 1.0 if temperature is None else float(temperature) ** 2
    if num_items is None:
        if reduction != "mean":
            return scale, None
        if mask is None:
            return scale * (1.0 / max(rows, 1)), None  # to the bit what a mask gives
        return scale, mask.sum().clamp(min=1).to(torch.float64).reciprocal()
    if reduction != "mean":
        raise ValueError(f'num_items is what reduction="mean" divides by; got reduction={reduction!r}')
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must have one element, got shape {tuple(num_items.shape)}")
        return scale, num_items.reshape(()).to(torch.float64).reciprocal()
    return scale / _positive("num_items", num_items), None
