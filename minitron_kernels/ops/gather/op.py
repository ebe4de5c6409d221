"""gather_channels(): the kept rows and columns of a weight, both axes in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minitron_kernels import _native
from minitron_kernels._backend import pick
from minitron_kernels._opaque import opaque_op
from minitron_kernels._tensors import check_no_tangent, check_tensor, extents_meet, levels_of
from minitron_kernels.ops.gather import reference
from minitron_kernels.ops.gather.index import ChannelIndex, check_index_tensor

# dtypes whose elements hold several channels each
_PACKED = tuple(getattr(torch, name) for name in ("float4_e2m1fn_x2", "bits1x8", "bits2x4", "bits4x2"))


def gather_channels(
    weight: Tensor,
    rows: Tensor | ChannelIndex | None = None,
    cols: Tensor | ChannelIndex | None = None,
    out: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """weight[..., rows, :][..., cols]: reads what is kept once, writes it once, bit for bit.

    `cols` index the last dimension, `rows` the one before it; dimensions before these are kept whole (experts
    [E, out, in]). A vector (a bias, a norm's gain) has `cols` only. An axis without indices is kept whole;
    without any indices the weight is copied.

    Args:
        weight: [..., R, C] or [C], any dtype of 1, 2, 4, 8 or 16 bytes, any strides, any device.
        rows: [K_r] int64 or int32 in [0, R), on any device; need be neither sorted nor unique.
        cols: [K_c], in [0, C), likewise.
        out: [..., K_r, K_c] of weight's dtype and device to write to; may be a view with any strides, must
            not overlap weight. Default: a new contiguous tensor.
        backend: "auto", "native", "triton" or "reference"; a named one never falls back.

    Indices are checked on the host before anything is written; for indices on a GPU that costs one sync each.
    A ChannelIndex has been checked already: make one for each set of channels that many weights share. Under
    torch.compile, tensors of indices are checked where the op runs: a RuntimeError on the CPU, a device-side
    assertion on a GPU.

    Returns:
        out, or the new tensor.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device; an index out of range (names
            the first); out overlaps itself or weight. `out` is then unchanged. Dtypes that pack several
            channels into one element and quantized dtypes are refused. So are, since the op has no
            derivative, a weight or out that requires grad while grad mode is on, or that carries a
            forward-mode tangent: call it under torch.no_grad(), or detach.
        RuntimeError: the named backend cannot run here, and why.

    Source: structured pruning of Minitron (arXiv 2407.14679) section 2.3.
    """
    shape, keep_rows, keep_cols = check_kept(weight, rows, cols)
    _check_no_grad("weight", weight)
    if out is not None:
        _check_out(out, weight, shape)
    chosen = pick("gather", weight.device, backend)
    source = weight.detach().resolve_conj().resolve_neg()
    row_values = _values(keep_rows, weight.device, 1)
    if chosen == "reference":
        result = reference.gather_channels(source, row_values, _values(keep_cols, weight.device, 1))
        return result if out is None else out.copy_(result)
    target = source.new_empty(shape) if out is None else out.detach()
    if chosen == "triton":
        block = 1 if not isinstance(keep_cols, ChannelIndex) else keep_cols.block
        block = min(block, 16 // weight.element_size())
        _gather_triton_(target, source, row_values, _values(keep_cols, weight.device, block), block)
    else:
        col_values = _values(keep_cols, weight.device, 1)
        torch.ops.minitron_kernels.gather_channels_(target, source, row_values, col_values)
    if out is None:
        return target
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(out)
    return out


Kept = ChannelIndex | Tensor | None


def check_kept(weight: Tensor, rows: Any, cols: Any) -> tuple[list[int], Kept, Kept]:
    """The shape of what gather_channels() gives, and the indices, after their checks and the weight's."""
    check_tensor("weight", weight)
    shape = list(weight.shape)
    if not shape:
        raise ValueError("weight must have at least 1 dimension, got a scalar")
    _check_one_channel_each(weight)
    if rows is not None and len(shape) == 1:
        raise ValueError(f"rows must be None for a vector {tuple(shape)}: its one dimension is that of cols")
    keep_rows = None if rows is None else _index("rows", rows, shape[-2], weight.device)
    keep_cols = None if cols is None else _index("cols", cols, shape[-1], weight.device)
    if keep_rows is not None:
        shape[-2] = len(keep_rows)
    if keep_cols is not None:
        shape[-1] = len(keep_cols)
    return shape, keep_rows, keep_cols


def _index(name: str, keep: Any, size: int, device: torch.device) -> ChannelIndex | Tensor:
    """`keep` as a checked index; under torch.compile a tensor, whose values are not known yet."""
    if isinstance(keep, ChannelIndex):
        if keep.size != size:
            raise ValueError(f"{name} must be for weight's {size} channels, got one for {keep.size}")
        return keep
    check_index_tensor(name, keep)
    if not torch.compiler.is_compiling():
        return ChannelIndex(keep, size, name=name)
    values = keep.to(device, torch.int64).contiguous()
    if device.type != "cpu":
        torch._assert_async(
            ((values >= 0) & (values < size)).all(), f"{name}: indices must be in [0, {size})"
        )
    return values


def _values(keep: ChannelIndex | Tensor | None, device: torch.device, block: int) -> Tensor | None:
    return keep.on(device, block) if isinstance(keep, ChannelIndex) else keep


def _check_one_channel_each(weight: Tensor) -> None:
    if weight.is_quantized:
        raise TypeError(
            f"weight must not be quantized, got {weight.dtype}, whose scales would be lost: gather its "
            "int_repr(), and the scales of the kept channels beside it"
        )
    if weight.dtype in _PACKED:
        raise TypeError(
            f"weight must have one channel in each element, and {weight.dtype} packs several: unpack it first"
        )


def _check_no_grad(name: str, x: Tensor) -> None:
    if torch.is_grad_enabled() and any(level.requires_grad for level in levels_of(x)):
        raise ValueError(
            f"{name} requires grad, and gather_channels has no gradient: call it under torch.no_grad(), or "
            f"pass {name}.detach()"
        )
    check_no_tangent("gather_channels", **{name: x})


def _check_out(out: Any, weight: Tensor, shape: list[int]) -> None:
    check_tensor("out", out)
    _check_no_grad("out", out)
    if out.dtype != weight.dtype:
        raise TypeError(f"out must have weight's dtype {weight.dtype}, got {out.dtype}")
    if list(out.shape) != shape or out.device != weight.device:
        raise ValueError(
            f"out must be {tuple(shape)} on {weight.device}, got {tuple(out.shape)} on {out.device}"
        )
    if not torch.compiler.is_compiling() and (out.is_conj() or out.is_neg()):
        raise ValueError("out must be plain memory, got a lazy conjugate or negative view")
    if not out.numel():
        return
    if _overlaps_itself(out):
        raise ValueError(f"out must not overlap itself, got strides {out.stride()} for {tuple(out.shape)}")
    if torch.compiler.is_compiling() or weight.device.type == "meta" or not weight.numel():
        return
    if extents_meet(out, weight):
        raise ValueError("out must not lie within the memory that weight spans")


def _overlaps_itself(x: Tensor) -> bool:
    left = [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    reach = 0  # elements between the first and the last that the smaller strides reach
    while left:
        at = 0
        for i, (stride, _) in enumerate(left):  # torch.compile cannot trace a sort of symbolic strides
            if stride < left[at][0]:
                at = i
        stride, size = left.pop(at)
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


# custom_op reads the schema off the signature: the arguments of the native op, and col_block, the number of
# neighbouring columns that each index of `cols` stands for
@opaque_op("minitron_kernels::gather_channels_triton_", mutates_args=("out",))
def _gather_triton_(
    out: Tensor, weight: Tensor, rows: Tensor | None, cols: Tensor | None, col_block: int
) -> None:
    from minitron_kernels.ops.gather.kernel_triton import gather_channels_

    gather_channels_(out, weight, rows, cols, col_block)


@_gather_triton_.register_fake
def _fake_triton(
    out: Tensor, weight: Tensor, rows: Tensor | None, cols: Tensor | None, col_block: int
) -> None:
    return None


def _fake(out: Tensor, weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> None:
    return None


if _native.available():
    torch.library.register_fake("minitron_kernels::gather_channels_", _fake)
