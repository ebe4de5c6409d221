"""Kept rows and columns of matrices by Triton, both axes in one launch, by the width of an element alone.

    grid (matrices x runs of rows x blocks of columns), the columns innermost, so that programs that run at
    the same time read the same rows

A program makes BLOCK_R rows of BLOCK_G groups. A group is GROUP neighbouring words of 1, 2, 4 or 8 bytes that
are kept together: the launcher takes the widest that the indices and the addresses allow, up to 16 bytes;
single narrow elements, sorted, fall into few lines. Bound by memory: reads the lines that hold what is kept,
writes each result once. Only tiling, GROUP and what is known of addresses are constexpr; whether
the number of groups is a multiple of 16 makes two variants.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_BYTES, BLOCK_R = 1024, 8  # of a row, and rows, of a program
MOST_LEADS = 3
_INTEGER_OF = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SIZES = ["leads_1", "leads_2", "row_count"]
_STRIDES = [f"{side}_{axis}" for side in ("out", "source") for axis in ("l0", "l1", "l2", "r")]


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def gather_kernel(
    out_ptr,
    source_ptr,
    rows_ptr,  # (row_count) int64 or None
    cols_ptr,  # (group_count) int64 or None
    leads_1, leads_2, row_count, group_count,
    out_l0, out_l1, out_l2, out_r, out_g,  # strides in words
    source_l0, source_l1, source_l2, source_r, source_g,
    GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr,
    OUT_DENSE: tl.constexpr, SOURCE_DENSE: tl.constexpr,  # groups lie side by side
    OUT_ALIGN: tl.constexpr, SOURCE_ALIGN: tl.constexpr,  # words, of which every row begins at a multiple
):  # fmt: skip
    """source[..., rows, cols] to out, in words."""
    blocks, runs = tl.cdiv(group_count, BLOCK_G), tl.cdiv(row_count, BLOCK_R)
    pid = tl.program_id(0)
    offs_g = (pid % blocks).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    offs_r = (pid // blocks % runs).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    lead = (pid // blocks // runs).to(tl.int64)
    l0, l1, l2 = lead // leads_2 // leads_1, lead // leads_2 % leads_1, lead % leads_2
    groups, rows = offs_g, offs_r
    if cols_ptr is not None:
        groups = tl.load(cols_ptr + offs_g, mask=offs_g < group_count, other=0)
    if rows_ptr is not None:
        rows = tl.load(rows_ptr + offs_r, mask=offs_r < row_count, other=0)
    source_row = l0 * source_l0 + l1 * source_l1 + l2 * source_l2 + rows * source_r
    out_row = l0 * out_l0 + l1 * out_l1 + l2 * out_l2 + offs_r * out_r
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
    """out[..., i, j] = source[..., rows[i], cols[j]]; cols are of blocks of `col_block` neighbours."""
    if not out.numel():
        return
    if source.dim() == 1:
        out, source = out[None], source[None]
    if not _is_dense(source) and _is_dense(source.mT) and _is_dense(out.mT):
        # both are stored by columns: the same gather of the transposed matrices
        cols, rows = rows, _narrowed(cols, col_block)
        out, source, col_block = out.mT, source.mT, 1
    width = out.element_size()
    block_bytes = 16 if cols is None else width * col_block
    wide = next(
        (n for n in (16, 8, 4, 2) if n > width and block_bytes % n == 0 and _holds(n, out, source)), width
    )
    cols = _narrowed(cols, block_bytes // wide)
    aligned = [_aligned(x, 16) for x in (out, source)]
    out, source = _groups(out, wide), _groups(source, wide)
    word, group = out.element_size(), out.shape[-1]
    leads = _leads(out, source)
    row_count, group_count = out.shape[-3:-1]
    block_g = min(BLOCK_BYTES // wide, triton.next_power_of_2(group_count))
    matrices = leads[0][0] * leads[1][0] * leads[2][0]
    programs = matrices * triton.cdiv(row_count, BLOCK_R) * triton.cdiv(group_count, block_g)
    if programs >= 1 << 31:
        raise ValueError(f"out must fit one launch of fewer than 2^31 programs, needs {programs}")
    gather_kernel[(programs,)](
        out, source, rows, cols,
        leads[1][0], leads[2][0], row_count, group_count,
        *(lead[1] for lead in leads), out.stride(-3), out.stride(-2),
        *(lead[2] for lead in leads), source.stride(-3), source.stride(-2),
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
    width = x.element_size()
    strides = (stride * width for stride, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1)
    return _is_dense(x) and x.data_ptr() % size == 0 and all(stride % size == 0 for stride in strides)


def _holds(size: int, *tensors: Tensor) -> bool:
    """Whether rows are whole words of `size` bytes, at multiples of that."""
    return all(_aligned(x, size) and x.shape[-1] * x.element_size() % size == 0 for x in tensors)


def _narrowed(cols: Tensor | None, parts: int) -> Tensor | None:
    """Indices of blocks to indices of their `parts`."""
    if cols is None or parts == 1:
        return cols
    return (cols[:, None] * parts + torch.arange(parts, device=cols.device)).flatten()


def _groups(x: Tensor, wide: int) -> Tensor:
    """[..., C] to [..., groups, words of a group] as integers, a group of `wide` bytes."""
    if x.element_size() == 16:
        return torch.view_as_real(x).view(torch.int64)
    if wide > x.element_size():  # rows are dense; a dimension of size 1 may have any stride
        strides = [s if n > 1 else x.shape[-1] for s, n in zip(x.stride(), x.shape, strict=True)]
        x = x.as_strided(x.shape, [*strides[:-1], 1])
    x = x.view(_INTEGER_OF[min(wide, 8)])
    return x.unflatten(-1, (-1, 2)) if wide == 16 else x.unsqueeze(-1)


def _leads(out: Tensor, source: Tensor) -> list[tuple[int, int, int]]:
    """(size, stride of out, of source) of MOST_LEADS dimensions before a matrix, joined where they can be."""
    leads: list[tuple[int, int, int]] = []
    for size, a, b in reversed(
        list(zip(out.shape[:-3], out.stride()[:-3], source.stride()[:-3], strict=True))
    ):
        if size == 1:
            continue
        if leads and (a, b) == (leads[0][0] * leads[0][1], leads[0][0] * leads[0][2]):
            leads[0] = (size * leads[0][0], *leads[0][1:])
        else:
            leads.insert(0, (size, a, b))
    if len(leads) > MOST_LEADS:
        raise ValueError(
            f"weight and out have strides that leave {len(leads)} dimensions before the last two, at most "
            f"{MOST_LEADS}: make them contiguous"
        )
    return [(1, 0, 0)] * (MOST_LEADS - len(leads)) + leads
