"""Which tokens count, and their labels."""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_kernels._opaque import opaque_op
from minitron_kernels.ops.kl_loss.checks import check_tensor, integer


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The targets of the positions they stand at, from labels that stand at the tokens themselves.

        shifted[..., t] = labels[..., t + 1],  shifted[..., T - 1] = ignore_index

    Hugging Face batches carry the token of a position as its label, and their models shift inside; the losses
    here do not. Sequences packed into one row need nothing more where the first label of each is
    `ignore_index`, as DataCollatorWithFlattening of transformers makes them.

    Args:
        labels: [..., T] of integers.
        ignore_index: the label of the last position, which has no next token.

    Returns:
        [..., T], a new tensor of the same dtype.

    Raises:
        TypeError, ValueError: not a tensor of integers, or without dimensions.
    """
    check_tensor("labels", labels)
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
    if labels.dim() == 0:
        raise ValueError("labels must be [..., T], got a tensor without dimensions")
    ends = (*labels.shape[:-1], min(labels.shape[-1], 1))
    last = labels.new_full(ends, integer("ignore_index", ignore_index))
    return torch.cat((labels[..., 1:], last), -1)


def counted(labels: Tensor, ignore_index: int) -> Tensor:
    """Where labels are not ignore_index, bool of their shape."""
    # in int32 torch would wrap an ignore_index beyond it around, to some token
    return labels.to(torch.int64) != ignore_index


@opaque_op("minitron_kernels::labels_to_mask")
def _labels_to_mask(labels: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    """[N] bool: labels other than ignore_index; an error if one of those is not a token."""
    valid = counted(labels, ignore_index)
    wrong = valid & ((labels < 0) | (labels >= vocab_size))
    _refuse(labels, wrong, f"ignore_index={ignore_index}", vocab_size)
    return valid


@_labels_to_mask.register_fake
def _(labels: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    return torch.empty_like(labels, dtype=torch.bool)


def _refuse(labels: Tensor, wrong: Tensor, ignored: str, vocab_size: int) -> None:
    """An error where a label [N] is wrong; on a GPU the device raises it, since nothing waits for the GPU."""
    if labels.device.type != "cpu":
        torch._assert_async(~wrong.any())
    elif wrong.any():
        position = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"labels must be {ignored} or in [0, {vocab_size}), got {int(labels[position])} at position "
            f"{position}"
        )


def check_labels(labels: Tensor | None, vocab_size: int) -> None:
    """The labels of rows, -1 where there is none, are tokens.

    Raises:
        ValueError: one is not.
    """
    if labels is not None:
        _refuse(labels, labels >= vocab_size, "ignore_index", vocab_size)


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
        check_per_token("mask", mask, shape, device)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool (True = the token counts), got {mask.dtype}")
        rows = mask.reshape(-1)
    if labels is not None:
        check_per_token("labels", labels, shape, device)
        if labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
        ignore_index = integer("ignore_index", ignore_index)
        valid = _labels_to_mask(labels.reshape(-1), ignore_index, vocab_size)
        rows = valid if rows is None else rows & valid
    return None if rows is None else rows.contiguous()


def check_per_token(name: str, x: Tensor, shape: torch.Size, device: torch.device) -> None:
    """One entry for each token, where the student is."""
    check_tensor(name, x)
    if x.shape != shape:
        raise ValueError(f"{name} must have one entry per token, shape {tuple(shape)}; got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, but the student is on {device}")


def row_labels(labels: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """[N] int64 for the kernels: -1 at tokens that do not count, whose label may be anything."""
    if labels is None or valid is None:
        return None
    return torch.where(valid, labels.reshape(-1).to(torch.int64), -1)
