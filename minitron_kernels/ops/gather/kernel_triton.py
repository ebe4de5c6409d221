"""Kept rows and columns of matrices by Triton, both axes in one launch; dtypes of one size share a kernel.

    grid (matrices x runs of rows x blocks of columns), the columns innermost, so that programs that run at
    the same time read the same rows

A program writes BLOCK_R rows of BLOCK_G groups. A group is GROUP neighbouring words of 1, 2, 4 or 8 bytes
that are kept together. The launcher takes the widest group that the indices and the addresses allow, up to 16
bytes. Where only single narrow elements can be moved, sorted ones still fall into few cache lines. The kernel
is bound by memory: it reads the cache lines that hold kept elements, and writes each result once. Only the
tiling, GROUP and what is known of addresses are constexpr. There are two variants of each kernel, for numbers
of groups that are and are not a multiple of 16.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_BYTES, BLOCK_R = 1024, 8  # of a program: bytes of a row, and rows
MOST_BATCH_DIMS = 3  # dimensions before the rows and columns
_INTEGER_OF = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SIZES = ["size_b1", "size_b2", "row_count"]
_STRIDES = [f"{side}_{axis}" for side in ("out", "source") for axis in ("b0", "b1", "b2", "r")]


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def gather_kernel(
    out_ptr,
    source_ptr,
    rows_ptr,  # (row_count) int64 or None
    cols_ptr,  # (group_count) int64 or None
    size_b1, size_b2, row_count, group_count,
    out_b0, out_b1, out_b2, out_r, out_g,  # strides in words
    source_b0, source_b1, source_b2, source_r, source_g,
    GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr,
    OUT_DENSE: tl.constexpr, SOURCE_DENSE: tl.constexpr,  # groups lie side by side
    OUT_ALIGN: tl.constexpr, SOURCE_ALIGN: tl.constexpr,  # every row begins at a multiple of so many words
):  # fmt: skip
    """out = source[..., rows, cols], in words."""
    blocks, runs = tl.cdiv(group_count, BLOCK_G), tl.cdiv(row_count, BLOCK_R)
    pid = tl.program_id(0)
    offs_g = (pid % blocks).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    offs_r = (pid // blocks % runs).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    matrix = (pid // blocks // runs).to(tl.int64)
    b0, b1, b2 = matrix // size_b2 // size_b1, matrix // size_b2 % size_b1, matrix % size_b2
    groups, rows = offs_g, offs_r
    if cols_ptr is not None:
        groups = tl.load(cols_ptr + offs_g, mask=offs_g < group_count, other=0)
    if rows_ptr is not None:
        rows = tl.load(rows_ptr + offs_r, mask=offs_r < row_count, other=0)
    source_row = b0 * source_b0 + b1 * source_b1 + b2 * source_b2 + rows * source_r
    out_row = b0 * out_b0 + b1 * out_b1 + b2 * out_b2 + offs_r * out_r
    source_row = tl.multiple_of(source_row, SOURCE_ALIGN)
    out_row = tl.multiple_of(out_row, OUT_ALIGN)
    word = tl.arange(0, GROUP)[None, None, :]
    inside = (offs_r < row_count)[:, None, None] & (offs_g < group_count)[None, :, None] & (word < GROUP)
    source_step = GROUP if SOURCE_DENSE else source_g
    out_step = GROUP if OUT_DENSE else out_g
    at = source_row[:, None, None] + (groups * source_step)[None, :, None] + word
    value = tl.load(source_ptr + at, mask=inside)
    at = out_row[:, None, None] + (offs_g * out_step)[None, :, None] + word
    tl.store(out_ptr + at, value, mask=inside)


def gather_channels_(
    out: Tensor, source: Tensor, rows: Tensor | None, cols: Tensor | None, col_block: int
) -> None:
    """out[..., i, j] = source[..., rows[i], cols[j]]; `cols` indexes blocks of `col_block` neighbours."""
    if not out.numel():
        return
    if source.dim() == 1:
        out, source = out[None], source[None]
    if not _is_dense(source) and _is_dense(source.mT) and _is_dense(out.mT):
        # both are stored by columns: the same gather of the transposed matrices
        cols, rows = rows, _narrowed(cols, col_block)
        out, source, col_block = out.mT, source.mT, 1
    element_size = out.element_size()
    block_bytes = 16 if cols is None else element_size * col_block
    group_bytes = next(
        (n for n in (16, 8, 4, 2) if n > element_size and block_bytes % n == 0 and _holds(n, out, source)),
        element_size,
    )
    cols = _narrowed(cols, block_bytes // group_bytes)
    aligned = [_aligned(x, 16) for x in (out, source)]
    out, source = _groups(out, group_bytes), _groups(source, group_bytes)
    word, group = out.element_size(), out.shape[-1]
    batch_dims = _batch_dims(out, source)
    row_count, group_count = out.shape[-3:-1]
    block_g = min(BLOCK_BYTES // group_bytes, triton.next_power_of_2(group_count))
    matrices = batch_dims[0].size * batch_dims[1].size * batch_dims[2].size
    programs = matrices * triton.cdiv(row_count, BLOCK_R) * triton.cdiv(group_count, block_g)
    if programs >= 1 << 31:
        raise ValueError(f"out must fit one launch of fewer than 2^31 programs, needs {programs}")
    with torch.cuda.device_of(out):
        gather_kernel[(programs,)](
            out, source, rows, cols,
            batch_dims[1].size, batch_dims[2].size, row_count, group_count,
            *(dim.out_stride for dim in batch_dims), out.stride(-3), out.stride(-2),
            *(dim.source_stride for dim in batch_dims), source.stride(-3), source.stride(-2),
            GROUP=group, BLOCK_R=BLOCK_R, BLOCK_G=block_g,
            OUT_DENSE=out.stride(-2) == group,
            SOURCE_DENSE=source.stride(-2) == group,
            OUT_ALIGN=16 // word if aligned[0] else 1,
            SOURCE_ALIGN=16 // word if aligned[1] else 1,
            num_warps=4,
        )  # fmt: skip


def _is_dense(x: Tensor) -> bool:
    return x.shape[-1] <= 1 or x.stride(-1) == 1


def _aligned(x: Tensor, size: int) -> bool:
    """Whether columns lie side by side and every row begins at a multiple of `size` bytes."""
    element_size = x.element_size()
    strides = (
        stride * element_size for stride, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1
    )
    return _is_dense(x) and x.data_ptr() % size == 0 and all(stride % size == 0 for stride in strides)


def _holds(size: int, *tensors: Tensor) -> bool:
    """Whether rows consist of whole words of `size` bytes, at addresses that are multiples of it."""
    return all(_aligned(x, size) and x.shape[-1] * x.element_size() % size == 0 for x in tensors)


def _narrowed(cols: Tensor | None, parts: int) -> Tensor | None:
    """Indices of blocks -> indices of the `parts` equal parts of each."""
    if cols is None or parts == 1:
        return cols
    return (cols[:, None] * parts + torch.arange(parts, device=cols.device)).flatten()


def _groups(x: Tensor, group_bytes: int) -> Tensor:
    """[..., C] -> [..., groups, words of a group] as integers, for groups of `group_bytes` bytes."""
    if x.element_size() == 16:
        return torch.view_as_real(x).view(torch.int64)
    if group_bytes > x.element_size():  # rows are dense; a dimension of size 1 may have any stride
        strides = [s if n > 1 else x.shape[-1] for s, n in zip(x.stride(), x.shape, strict=True)]
        x = x.as_strided(x.shape, [*strides[:-1], 1])
    x = x.view(_INTEGER_OF[min(group_bytes, 8)])
    return x.unflatten(-1, (-1, 2)) if group_bytes == 16 else x.unsqueeze(-1)


class _BatchDim(NamedTuple):
    """A dimension before rows and columns; strides in words."""

    size: int
    out_stride: int
    source_stride: int


def _batch_dims(out: Tensor, source: Tensor) -> list[_BatchDim]:
    """MOST_BATCH_DIMS batch dimensions: neighbours are joined where both tensors' strides allow it."""
    dims: list[_BatchDim] = []
    every = map(_BatchDim, out.shape[:-3], out.stride()[:-3], source.stride()[:-3])
    for dim in reversed([dim for dim in every if dim.size > 1]):
        if dims and dim[1:] == (dims[0].size * dims[0].out_stride, dims[0].size * dims[0].source_stride):
            dims[0] = dims[0]._replace(size=dim.size * dims[0].size)
        else:
            dims.insert(0, dim)
    if len(dims) > MOST_BATCH_DIMS:
        raise ValueError(
            f"weight and out have strides that leave {len(dims)} dimensions before the last two, at most "
            f"{MOST_BATCH_DIMS}: make them contiguous"
        )
    return [_BatchDim(1, 0, 0)] * (MOST_BATCH_DIMS - len(dims)) + dims
