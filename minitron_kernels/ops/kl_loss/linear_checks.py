"""Checks of linear_kl_loss()'s own arguments, and what autocast makes of its operands."""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_kernels.ops.kl_loss.checks import check_floating, check_tensor, integer, refuse
from minitron_kernels.ops.kl_loss.vocab_parallel import Parallel, group_size


def check_sides(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor
) -> None:
    """Hidden states fit their heads, and each other's tokens."""
    for side, hidden, head in (
        ("student", student_hidden, student_head),
        ("teacher", teacher_hidden, teacher_head),
    ):
        if hidden.dim() < 1 or head.dim() != 2 or hidden.shape[-1] != head.shape[1]:
            raise ValueError(
                f"{side}_hidden [..., H] and {side}_head [V, H] must have the same H, got "
                f"{tuple(hidden.shape)} and {tuple(head.shape)}"
            )
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            "student_hidden and teacher_hidden must have the same leading dimensions, got "
            f"{tuple(student_hidden.shape)} and {tuple(teacher_hidden.shape)}"
        )


def check_parallel(parallel: Parallel, vocab_size: int | None, shape: torch.Size) -> tuple[int, torch.Size]:
    """The number of tokens of the whole vocabulary, 0 if not known here; and the shape of all tokens.

    What the ranks have together is checked where they exchange it; labels then, too.
    """
    if vocab_size is not None:
        vocab_size = integer("vocab_size", vocab_size)
        if vocab_size < 1:
            refuse("vocab_size", "at least 1", vocab_size)
    if parallel.sequence_parallel:
        if not shape:
            raise ValueError(
                "sequence_parallel=True cuts the tokens along their first dimension: hidden states must be "
                "[..., H] with at least one dimension of tokens, got [H]"
            )
        assert parallel.group is not None
        shape = torch.Size((shape[0] * group_size(parallel.group), *shape[1:]))
    return vocab_size or 0, shape


def autocast(*tensors: Tensor) -> list[Tensor]:
    """Under autocast the operands take its dtype, as those of any linear layer do."""
    kind = tensors[0].device.type
    # meta has no autocast; torch.amp.is_autocast_available(), which knows, is not compiled by torch 2.11
    if kind == "meta" or not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return list(tensors)
    return [x.to(torch.get_autocast_dtype(kind)) for x in tensors]


def check_bias(name: str, bias: Tensor | None, head: Tensor) -> None:
    """A bias fits its head."""
    """A bias fits its head."""
    if bias is None:
        return
    check_floating(**{name: bias})
    if bias.shape != head.shape[:1] or bias.device != head.device:
        raise ValueError(
            f"{name} must be [V] = [{head.shape[0]}] on {head.device}, got {tuple(bias.shape)} on "
            f"{bias.device}"
        )


def check_accumulator(buffer: Tensor | None, head: Tensor) -> None:
    """A buffer that the gradient of `head` can be added to."""
    """A buffer that the gradient of `head` can be added to."""
    if buffer is None:
        return
    dtype = torch.float64 if head.dtype == torch.float64 else torch.float32
    check_tensor("grad_head_accumulator", buffer)
    if buffer.dtype != dtype:
        raise TypeError(f"grad_head_accumulator must be a {dtype} tensor, got {buffer.dtype}")
    fits = buffer.shape == head.shape and buffer.device == head.device
    if not fits or buffer.stride(1) != 1 or buffer.stride(0) < head.shape[1]:
        raise ValueError(
            f"grad_head_accumulator must have student_head's shape {tuple(head.shape)} on {head.device} with "
            "stride 1 along H and rows that do not overlap, got "
            f"{tuple(buffer.shape)} on {buffer.device} with strides {buffer.stride()}"
        )
