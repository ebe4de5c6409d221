"""gather_channels(): the kept rows and columns of a weight, both axes in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minitron_kernels._backend import pick
from minitron_kernels.ops.gather import reference
from minitron_kernels.ops.gather.index import ChannelIndex, check_kind


def gather_channels(
    weight: Tensor,
    rows: Tensor | ChannelIndex | None = None,
    cols: Tensor | ChannelIndex | None = None,
    out: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """weight[..., rows, :][..., cols]: one read of what is kept, one write, bit for bit.

    `cols` are of the last dimension, `rows` of the one before it; dimensions before these are kept whole
    (experts [E, out, in]). A vector (a bias, a norm's gain) has `cols` only. An axis without indices is kept
    whole; without any the weight is copied.

    Args:
        weight: [..., R, C] or [C], any dtype of 1, 2, 4, 8 or 16 bytes, any strides, any device.
        rows: [K_r] int64 or int32 in [0, R), on any device; need be neither sorted nor unique.
        cols: [K_c], in [0, C), likewise.
        out: [..., K_r, K_c] of weight's dtype and device to write to; may be a view with any strides, must
            not overlap weight. Default: a new contiguous tensor.
        backend: "auto", "native", "triton" or "reference"; a named one never falls back.

    Indices are checked on the host before anything is written, which for tensors on a GPU is one sync for
    each. A ChannelIndex has been checked: make one of each set of channels that many weights share. Under
    torch.compile tensors of indices are checked where the op runs: RuntimeError on a CPU, a device-side
    assertion on a GPU.

    Returns:
        out, or the new tensor.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device, an index out of range (names
            the first), out overlaps weight or itself; `out` is unchanged. Also where grad mode is on and weight
            or out requires grad: there is no gradient, and none is lost in silence; call it under
            torch.no_grad(), or detach.
        RuntimeError: the named backend cannot run here, and why.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a torch.Tensor, got {type(weight).__name__}")
    shape = list(weight.shape)
    if not shape:
        raise ValueError("weight must have at least 1 dimension, got a scalar")
    if rows is not None and len(shape) == 1:
        raise ValueError(f"rows must be None for a vector {tuple(shape)}: its one dimension is that of cols")
    row_index = None if rows is None else _index("rows", rows, shape[-2])
    col_index = None if cols is None else _index("cols", cols, shape[-1])
    if row_index is not None:
        shape[-2] = len(row_index)
    if col_index is not None:
        shape[-1] = len(col_index)
    _check_no_grad("weight", weight)
    chosen = pick("gather", weight.device, backend)
    weight = weight.detach().resolve_conj().resolve_neg()
    indices = [None if x is None else x.on(weight.device) for x in (row_index, col_index)]
    if out is not None:
        _check_out(out, weight, shape)
    if chosen == "reference":
        result = reference.gather_channels(weight, *indices)
        return result if out is None else out.copy_(result)
    raise NotImplementedError(chosen)


def _index(name: str, keep: Any, size: int) -> ChannelIndex:
    if isinstance(keep, ChannelIndex):
        if keep.size != size:
            raise ValueError(f"{name} is for an axis of {keep.size} channels, weight has {size}")
        return keep
    check_kind(name, keep)
    return ChannelIndex(keep, size, name=name)


def _check_no_grad(name: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, and gather_channels has no gradient: call it under torch.no_grad(), or "
            f"pass {name}.detach()"
        )


def _check_out(out: Any, weight: Tensor, shape: list[int]) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch.Tensor, got {type(out).__name__}")
    _check_no_grad("out", out)
    if out.dtype != weight.dtype:
        raise TypeError(f"out must have weight's dtype {weight.dtype}, got {out.dtype}")
    if list(out.shape) != shape or out.device != weight.device:
        raise ValueError(
            f"out must be {tuple(shape)} on {weight.device}, got {tuple(out.shape)} on {out.device}"
        )
