"""The primitives of importance by Triton, for CUDA and ROCm tensors; the ops' own schemas.

    rows     grid (groups of rows): the norm of each row, or with y its 1 - cosine. Reads each row once. It
             also computes the norms of heads, which are then summed like channels.
    pieces   grid (pieces of the tokens x blocks of channels): the sums of a piece's tokens, sequence by
             sequence. Reads x once, 16 bytes at a time. The pieces are so short that one sequence fills the
             GPU, and that a sum in fp32 has at most 8 + MOST_TOKENS / 8 roundings.
    finish   grid (sequences x blocks of channels): adds a sequence's pieces, in order, in float64.

A piece i of packed tokens may contain tokens of several sequences b. Its sums for b go to the slot i + b,
which no other pair has, so that the grid depends on shapes alone and the host does not wait for cu_seqlens.
There are no atomics: results are bitwise equal from run to run. Only the tiling and the choice of moments are
constexpr: another B, S or T recompiles nothing.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST_TOKENS, MOST_TOKENS = 32, 512  # in a piece
PROGRAMS = 1024  # about as many as an H100 runs at once: pieces are as long as this allows
PIECE_BYTES = 2048  # bytes of a token that one program reads: 4 warps of 16-byte loads
FINISH_BLOCK = 64
ROW_BLOCK, ROW_ELEMENTS = 1024, 2048  # elements read at a time: of one row; of all rows of a program
# A batch may start anywhere in these tensors: do not compile anew for another alignment.
BY_TOKEN = ("mask_ptr", "cu_seqlens_ptr")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _merge(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """Mean and M2 (sum of squared deviations) of the union of two sets of tokens (Chan et al. 1979, "Updating
    formulae and a pairwise algorithm for computing sample variances"); a set may be empty.
    """
    share = n_b / tl.maximum(n_a + n_b, 1.0)
    delta = mean_b - mean_a
    return mean_a + delta * share, m2_a + m2_b + delta * delta * (n_a * share)


@triton.jit
def _sum_tokens(
    x_ptr, mask_ptr, partial_ptr, piece_counts_ptr,
    begin, end, slot, slots, C, stride_t, offs_c, first_block,
    ABS: tl.constexpr, SQUARE: tl.constexpr, CENTRED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes the moments of the tokens begin .. end to a slot: sums, but the mean instead of Σv."""
    magnitude = tl.zeros((BLOCK_C,), tl.float32)
    square = tl.zeros((BLOCK_C,), tl.float32)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    count = tl.zeros((), tl.int32)
    for first in range(begin, end, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        valid = offs_t < end
        if mask_ptr is not None:
            valid &= tl.load(mask_ptr + offs_t, mask=valid, other=0) != 0
        inside = valid[:, None] & (offs_c < C)[None, :]
        v = tl.load(x_ptr + offs_t[:, None] * stride_t + offs_c[None, :], mask=inside, other=0.0)
        v = v.to(tl.float32)
        n = tl.sum(valid.to(tl.int32), 0)
        if ABS:
            magnitude += tl.sum(tl.abs(v), 0)
        if SQUARE:
            square += tl.sum(v * v, 0)
        if CENTRED:
            n_new = n.to(tl.float32)
            mean_new = tl.sum(v, 0) / tl.maximum(n_new, 1.0)
            d = tl.where(valid[:, None], v - mean_new[None, :], 0.0)
            mean, m2 = _merge(count.to(tl.float32), mean, m2, n_new, mean_new, tl.sum(d * d, 0))
        count += n
    moment_stride = slots.to(tl.int64) * C  # passes 2^31 where there are many short sequences
    out = partial_ptr + slot * C + offs_c
    if ABS:
        tl.store(out, magnitude, mask=offs_c < C)
        out += moment_stride
    if SQUARE:
        tl.store(out, square, mask=offs_c < C)
        out += moment_stride
    if CENTRED:
        tl.store(out, mean, mask=offs_c < C)
        tl.store(out + moment_stride, m2, mask=offs_c < C)
    if first_block:
        tl.store(piece_counts_ptr + slot, count)


@triton.jit
def _sequence_of(cu_seqlens_ptr, token, B, BLOCK_B: tl.constexpr):
    """The sequence that a packed token belongs to: how many sequences end at or before it."""
    before = tl.zeros((BLOCK_B,), tl.int32)
    for first in range(0, B, BLOCK_B):
        offs_b = first + tl.arange(0, BLOCK_B)
        borders = tl.load(cu_seqlens_ptr + 1 + offs_b, mask=offs_b < B, other=token + 1)
        before += (borders <= token).to(tl.int32)
    return tl.sum(before, 0)


@triton.jit(
    do_not_specialize=["B", "S", "C_blocks", "slots", "piece_tokens", "pieces_per_sequence"],
    do_not_specialize_on_alignment=BY_TOKEN,
)
def importance_pieces_kernel(
    x_ptr,  # (B, S, C), or (S, C) with cu_seqlens; stride 1 in the channels
    mask_ptr,  # (B, S) or (S) uint8, or None
    cu_seqlens_ptr,  # (B + 1) int64, or None
    partial_ptr,  # (moments, slots, C) fp32
    piece_counts_ptr,  # (slots) int32
    B, S, C, stride_t, gap_b, C_blocks, slots, piece_tokens, pieces_per_sequence,
    ABS: tl.constexpr, SQUARE: tl.constexpr, CENTRED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The moments of one piece of the tokens and one block of channels."""
    piece = (tl.program_id(0) // C_blocks).to(tl.int64)
    block = tl.program_id(0) % C_blocks
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    if cu_seqlens_ptr is None:
        b = piece // pieces_per_sequence
        begin = (piece - b * pieces_per_sequence) * piece_tokens
        if mask_ptr is not None:
            mask_ptr += b * S
        _sum_tokens(
            x_ptr + b * S * stride_t + b * gap_b, mask_ptr, partial_ptr, piece_counts_ptr,
            begin, tl.minimum(begin + piece_tokens, S), piece, slots, C, stride_t, offs_c, block == 0,
            ABS, SQUARE, CENTRED, BLOCK_T, BLOCK_C,
        )  # fmt: skip
    else:
        begin = piece * piece_tokens
        last = tl.minimum(begin + piece_tokens, S)
        b = _sequence_of(cu_seqlens_ptr, begin, B, BLOCK_B)
        # b < B: borders are not checked on a GPU, and those that end early must not lead out of bounds
        while (begin < last) & (b < B):
            end = tl.minimum(tl.load(cu_seqlens_ptr + 1 + b), last)
            _sum_tokens(
                x_ptr, mask_ptr, partial_ptr, piece_counts_ptr,
                begin, end, piece + b, slots, C, stride_t, offs_c, block == 0,
                ABS, SQUARE, CENTRED, BLOCK_T, BLOCK_C,
            )  # fmt: skip
            begin = tl.maximum(begin, end)
            b += 1


@triton.jit(
    do_not_specialize=["B", "M_blocks", "slots", "piece_tokens", "pieces_per_sequence"],
    do_not_specialize_on_alignment=BY_TOKEN,
)
def importance_finish_kernel(
    partial_ptr,  # (moments, slots, M) fp32
    piece_counts_ptr,  # (slots) int32
    cu_seqlens_ptr,  # (B + 1) int64, or None
    moments_ptr,  # (moments, B, M) fp32
    counts_ptr,  # (B) int64
    B, M, M_blocks, slots, piece_tokens, pieces_per_sequence,
    ABS: tl.constexpr, SQUARE: tl.constexpr, CENTRED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The moments of one sequence and one block of values, from the slots of its pieces."""
    b = (tl.program_id(0) // M_blocks).to(tl.int64)
    block = tl.program_id(0) % M_blocks
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    if cu_seqlens_ptr is None:
        first = b * pieces_per_sequence
        end = first + pieces_per_sequence
    else:
        first_token, end_token = tl.load(cu_seqlens_ptr + b), tl.load(cu_seqlens_ptr + b + 1)
        first = tl.maximum(first_token, 0) // piece_tokens + b
        end = tl.where(end_token > first_token, (end_token - 1) // piece_tokens + b + 1, first)
        end = tl.minimum(end, slots)
    magnitude = tl.zeros((BLOCK_C,), tl.float64)
    square = tl.zeros((BLOCK_C,), tl.float64)
    mean = tl.zeros((BLOCK_C,), tl.float64)
    m2 = tl.zeros((BLOCK_C,), tl.float64)
    count = tl.zeros((), tl.int64)
    moment_stride = slots.to(tl.int64) * M
    for begin in range(first, end, BLOCK_P):
        offs_p = begin + tl.arange(0, BLOCK_P)
        n = tl.load(piece_counts_ptr + offs_p, mask=offs_p < end, other=0).to(tl.int64)
        inside = (offs_p < end)[:, None] & (offs_c < M)[None, :]
        part = partial_ptr + offs_p[:, None] * M + offs_c[None, :]
        if ABS:
            magnitude += tl.sum(tl.load(part, mask=inside, other=0.0).to(tl.float64), 0)
            part += moment_stride
        if SQUARE:
            square += tl.sum(tl.load(part, mask=inside, other=0.0).to(tl.float64), 0)
            part += moment_stride
        if CENTRED:
            weight = n.to(tl.float64)[:, None]
            n_new = tl.sum(n, 0).to(tl.float64)
            means = tl.load(part, mask=inside, other=0.0).to(tl.float64)
            m2s = tl.load(part + moment_stride, mask=inside, other=0.0).to(tl.float64)
            mean_new = tl.sum(means * weight, 0) / tl.maximum(n_new, 1.0)
            d = means - mean_new[None, :]
            m2_new = tl.sum(m2s + d * d * weight, 0)
            mean, m2 = _merge(count.to(tl.float64), mean, m2, n_new, mean_new, m2_new)
        count += tl.sum(n, 0)
    out = moments_ptr + b * M + offs_c
    if ABS:
        tl.store(out, magnitude.to(tl.float32), mask=offs_c < M)
        out += B.to(tl.int64) * M
    if SQUARE:
        tl.store(out, square.to(tl.float32), mask=offs_c < M)
        out += B.to(tl.int64) * M
    if CENTRED:
        # stored as a sum, since sums add over ranks
        tl.store(out, (mean * count.to(tl.float64)).to(tl.float32), mask=offs_c < M)
        tl.store(out + B.to(tl.int64) * M, m2.to(tl.float32), mask=offs_c < M)
    if block == 0:
        tl.store(counts_ptr + b, count)


@triton.jit
def _cosine_distance(xx, xy, yy, xd, dd):
    """1 - cos of rows x and y from sums of products, d = y - x. csrc/importance/cosine.h explains why."""
    xx, xy, yy = xx.to(tl.float64), xy.to(tl.float64), yy.to(tl.float64)
    xd, dd = xd.to(tl.float64), dd.to(tl.float64)
    norms = tl.sqrt(xx) * tl.sqrt(yy)
    distance = tl.where(dd < yy, (xx * dd - xd * xd) / (norms * (norms + xy)), (norms - xy) / norms)
    # a distance below 0 comes from rounding; NaN stays NaN
    return tl.where(norms == 0, 1.0, tl.where(distance < 0, 0.0, distance)).to(tl.float32)


@triton.jit(do_not_specialize=["N", "S", "heads"], do_not_specialize_on_alignment=BY_TOKEN)
def importance_rows_kernel(
    x_ptr,  # (N / S / heads, S, heads, D), stride 1 in D, stride D in heads
    y_ptr,  # likewise, or None
    mask_ptr,  # (N / heads) uint8, or None
    out_ptr,  # (N) fp32
    N, S, heads, D, stride_xt, gap_xb, stride_yt,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """||x|| of some rows, or with y 1 - cos(x, y). Rows of masked tokens are neither read nor written."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # int64 division is slow
    token = row // heads
    inside = row < N
    if mask_ptr is not None:
        inside &= tl.load(mask_ptr + token, mask=inside, other=0) != 0
    b, head = (token // S).to(tl.int64), (row - token * heads).to(tl.int64)
    x_ptr += (token.to(tl.int64) * stride_xt + b * gap_xb + head * D)[:, None]
    xx = tl.zeros((ROWS, BLOCK_D), tl.float32)
    xy = tl.zeros((ROWS, BLOCK_D), tl.float32)
    yy = tl.zeros((ROWS, BLOCK_D), tl.float32)
    xd = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dd = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for begin in range(0, D, BLOCK_D):
        offs_d = begin + tl.arange(0, BLOCK_D)[None, :]
        x = tl.load(x_ptr + offs_d, mask=inside[:, None] & (offs_d < D), other=0.0).to(tl.float32)
        xx += x * x
        if y_ptr is not None:
            y = y_ptr + (row.to(tl.int64) * stride_yt)[:, None] + offs_d
            y = tl.load(y, mask=inside[:, None] & (offs_d < D), other=0.0).to(tl.float32)
            xy += x * y
            yy += y * y
            d = y - x
            xd += x * d
            dd += d * d
    out = tl.sqrt_rn(tl.sum(xx, 1))
    if y_ptr is not None:
        out = _cosine_distance(tl.sum(xx, 1), tl.sum(xy, 1), tl.sum(yy, 1), tl.sum(xd, 1), tl.sum(dd, 1))
    tl.store(out_ptr + row, out, mask=inside)


class _Pieces(NamedTuple):
    """How the tokens are cut into pieces."""

    tokens: int  # in a piece
    per_sequence: int  # pieces of a sequence; used without cu_seqlens only
    total: int
    slots: int


def pieces_of(B: int, S: int, packed: bool, blocks: int) -> _Pieces:
    """The longest pieces that still make PROGRAMS programs, of B sequences of S tokens or S packed tokens."""
    wanted = triton.cdiv((S if packed else B * S) * blocks, PROGRAMS)
    tokens = min(MOST_TOKENS, max(LEAST_TOKENS, triton.next_power_of_2(wanted)))
    per_sequence = triton.cdiv(S, tokens)
    if packed:
        return _Pieces(tokens, 1, per_sequence, per_sequence + B)
    return _Pieces(tokens, per_sequence, B * per_sequence, B * per_sequence)


def importance_moments(
    x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, num_heads: int, moment_flags: int
) -> tuple[Tensor, Tensor]:
    """The op importance_moments: the moments [moments, B, M] fp32 and the counts [B] int64."""
    _check_dtype(x)
    if num_heads:
        x = _head_norms(x, mask, num_heads)
    packed = cu_seqlens is not None
    B = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    S, M = x.shape[-2:]
    stride_t, gap_b = _steps(x[None] if packed else x)
    flags = {
        "ABS": bool(moment_flags & 1),
        "SQUARE": bool(moment_flags & 2),
        "CENTRED": bool(moment_flags & 4),
    }
    num_moments = sum(flags.values()) + flags["CENTRED"]
    moments = x.new_empty((num_moments, B, M), dtype=torch.float32)
    counts = x.new_empty(B, dtype=torch.int64)
    if B == 0:
        return moments, counts
    block = min(PIECE_BYTES // x.element_size(), max(64, triton.next_power_of_2(M)))
    blocks = max(1, triton.cdiv(M, block))  # tokens are counted also where there are no channels
    pieces = pieces_of(B, S, packed, blocks)
    partial = x.new_empty((num_moments, pieces.slots, M), dtype=torch.float32)
    piece_counts = x.new_empty(pieces.slots, dtype=torch.int32)
    with torch.cuda.device_of(x):
        if pieces.total:
            importance_pieces_kernel[(pieces.total * blocks,)](
                x, _bytes(mask), cu_seqlens, partial, piece_counts,
                B, S, M, stride_t, gap_b,
                blocks, pieces.slots, pieces.tokens, pieces.per_sequence,
                **flags, BLOCK_T=8, BLOCK_C=block, BLOCK_B=128,
                num_warps=max(1, block * x.element_size() // 512),
            )  # fmt: skip
        finish_blocks = max(1, triton.cdiv(M, FINISH_BLOCK))
        importance_finish_kernel[(B * finish_blocks,)](
            partial, piece_counts, cu_seqlens, moments, counts,
            B, M, finish_blocks, pieces.slots, pieces.tokens, pieces.per_sequence,
            **flags, BLOCK_P=16, BLOCK_C=FINISH_BLOCK, num_warps=4,
        )  # fmt: skip
    return moments, counts


def importance_rows(x: Tensor, y: Tensor | None) -> Tensor:
    """The op importance_rows: [N] fp32."""
    _check_dtype(x)
    out = x.new_empty(x.shape[0], dtype=torch.float32)
    return _rows(x[None], y, None, 1, out)


def _head_norms(x: Tensor, mask: Tensor | None, num_heads: int) -> Tensor:
    """[..., num_heads] fp32. Nothing is read or written where the mask is false."""
    out = x.new_empty((*x.shape[:-1], num_heads), dtype=torch.float32)
    return _rows(x if x.dim() == 3 else x[None], None, mask, num_heads, out)


def _rows(x: Tensor, y: Tensor | None, mask: Tensor | None, heads: int, out: Tensor) -> Tensor:
    (_, S, C), N = x.shape, out.numel()
    stride_xt, gap_xb = _steps(x)
    D = C // heads
    block = min(ROW_BLOCK, max(32, triton.next_power_of_2(D)))
    rows = ROW_ELEMENTS // block
    if N + rows > 1 << 31:
        raise ValueError(f"x must have fewer than 2^31 rows or heads of tokens, got {N}")
    if N:
        with torch.cuda.device_of(x):
            importance_rows_kernel[(triton.cdiv(N, rows),)](
                x, y, _bytes(mask), out,
                N, S, heads, D, stride_xt, gap_xb, 0 if y is None else _steps(y[None])[0],
                ROWS=rows, BLOCK_D=block, num_warps=4,
            )  # fmt: skip
    return out


def _steps(x: Tensor) -> tuple[int, int]:
    """(elements from a token of [B, S, C] to the next, elements more from a sequence's last token to the next
    sequence). The second is 0 where tokens are evenly spaced, so that nothing is compiled anew for an odd S,
    or for the arbitrary stride of a dimension of size 1.
    """
    B, S, C = x.shape
    if S == 1:
        return (x.stride(0) if B > 1 else C), 0
    return x.stride(1), (x.stride(0) - S * x.stride(1) if B > 1 else 0)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def _check_dtype(x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"x must be float32, bfloat16 or float16 for the Triton kernels, got {x.dtype}; "
            'backend="reference" serves float64'
        )
