"""Launchers of the Triton kernels of kl_loss and linear_kl_loss, for CUDA and ROCm tensors.

kl_loss_forward() and kl_loss_backward() serve the ops of these names. The rest are the epilogues that
linear_gpu.py is made of. None waits for the GPU; all allocate from torch's allocator on the current stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.driver import driver

from minitron_kernels.ops.kl_loss.divergence import NUM_STATE, NUM_STATS, NUM_SUMS, Divergence
from minitron_kernels.ops.kl_loss.kernel_triton.linear import (
    finish_mixture_kernel,
    finish_stats_kernel,
    linear_kernel,
)
from minitron_kernels.ops.kl_loss.kernel_triton.rows import (
    forward_kernel,
    grad_kernel,
    tile_mixture_kernel,
    tile_stats_kernel,
)

FORWARD_BLOCK, GRAD_BLOCK, FINISH_BLOCK = 4096, 2048, 128
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Logits = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # student, teacher, and the bias of each
Side = tuple[Tensor, Tensor, Tensor | None]  # hidden states, head, bias


class LinearBlocks(NamedTuple):
    """Tile sizes of the fused kernel."""

    rows: int
    vocab: int
    hidden: int = 64
    warps: int = 8
    stages: int = 3
    group: int = 8  # blocks of rows that share the tiles of the heads in L2


def linear_blocks(mixture: bool) -> LinearBlocks:
    """The widest tiles that the registers of the current GPU hold; JSD's second run needs more of them."""
    target = driver.active.get_current_target()
    if target.backend == "hip":
        return LinearBlocks(128, 128, stages=2)
    generation = target.arch // 10
    if mixture:
        return LinearBlocks(64, 64)  # 128 x 64 spills on sm_90 under Triton 3.6 and 3.7
    return LinearBlocks(128, 128) if generation in (9, 10) else LinearBlocks(128, 64)


class _Options(NamedTuple):
    """The ops' options as the kernels take them."""

    divergence: int
    shares: tuple[float, float]  # of student and teacher in JSD's M: 1 - beta in fp32 would be 0 next to 1
    floats: tuple[float, ...]  # factor, scale / cap and cap / tau of the student, then of the teacher
    caps: dict[str, bool]


def _kernel_options(
    beta: float,
    inv_tau: float,
    student_scale: float,
    student_softcap: float,
    teacher_scale: float,
    teacher_softcap: float,
    label_smoothing: float,
) -> _Options:
    floats: list[float] = []
    for scale, cap in ((student_scale, student_softcap), (teacher_scale, teacher_softcap)):
        floats += [scale * inv_tau, scale / cap if cap else 0.0, cap * inv_tau]
    caps = {"CAP_S": student_softcap != 0, "CAP_T": teacher_softcap != 0}
    shares = (1.0 - beta, max(beta, torch.finfo(torch.float32).tiny))
    return _Options(Divergence.of(beta).value, shares, tuple(map(float, floats)), caps)


def _block(columns: int, most: int) -> dict[str, int]:
    """A block of the vocabulary and the warps for it: 16 elements a thread."""
    block = min(most, max(128, triton.next_power_of_2(columns)))
    return {"BLOCK_V": block, "num_warps": max(1, block // 512)}


def _mask(mask: Tensor | None) -> tuple[Tensor | None, int]:
    """A mask as the kernels read it, and its stride."""
    return (None, 0) if mask is None else (mask.view(torch.uint8), mask.stride(0))


def check_dtypes(**tensors: Tensor) -> None:
    """The kernels compute in fp32."""
    for name, x in tensors.items():
        if x.dtype not in _DTYPES:
            raise TypeError(
                f"{name} must be float32, bfloat16 or float16 for the Triton kernels, got {x.dtype}; "
                'backend="reference" serves float64'
            )


def forward(
    logits: Logits,
    mask: Tensor | None,
    loss: Tensor,
    stats: Tensor,
    vocab_size: int,
    options: Sequence[float],
) -> None:
    """Writes loss [N] and stats [N, 6] of whole rows of logits."""
    student, teacher, *biases = logits
    if student.shape[0] == 0:
        return
    mask_bytes, mask_stride = _mask(mask)
    o = _kernel_options(*options)
    with torch.cuda.device_of(student):
        forward_kernel[(student.shape[0],)](
            student, teacher, *biases, mask_bytes, loss, stats,
            vocab_size, student.stride(0), teacher.stride(0), mask_stride,
            *o.floats, *o.shares,
            DIVERGENCE=o.divergence, **o.caps, **_block(vocab_size, FORWARD_BLOCK),
        )  # fmt: skip


def grad(
    logits: Logits,
    mask: Tensor | None,
    weight: Tensor,
    stats: Tensor,
    out: Tensor,
    vocab_size: int,
    options: Sequence[float],
) -> None:
    """Writes the gradient of sum(weight * loss) to the raw student logits, 0 from column vocab_size on."""
    student, teacher, *biases = logits
    rows, columns = out.shape
    if rows == 0:
        return
    mask_bytes, mask_stride = _mask(mask)
    block = _block(columns, GRAD_BLOCK)
    o = _kernel_options(*options)
    with torch.cuda.device_of(student):
        grad_kernel[(rows, triton.cdiv(columns, block["BLOCK_V"]))](
            student, teacher, *biases, mask_bytes, weight, stats, out,
            vocab_size, columns, student.stride(0), teacher.stride(0), mask_stride, weight.stride(0),
            out.stride(0), *o.floats, *o.shares,
            DIVERGENCE=o.divergence, **o.caps, **block,
        )  # fmt: skip


def forward_grad(
    logits: Logits,
    mask: Tensor | None,
    weight: Tensor,
    loss: Tensor,
    stats: Tensor,
    out: Tensor,
    vocab_size: int,
    options: Sequence[float],
) -> None:
    """forward(), then grad() with the stats that it wrote."""
    forward(logits, mask, loss, stats, vocab_size, options)
    grad(logits, mask, weight, stats, out, vocab_size, options)


def tile_stats(
    logits: Logits, mask: Tensor | None, state: Tensor, first: bool, options: Sequence[float]
) -> None:
    """Merges a tile of the vocabulary into the state [5, N] of its rows; `first` starts it."""
    student, teacher, *biases = logits
    rows, columns = student.shape
    if rows == 0:
        return
    mask_bytes, mask_stride = _mask(mask)
    o = _kernel_options(*options)
    with torch.cuda.device_of(student):
        tile_stats_kernel[(rows,)](
            student, teacher, *biases, mask_bytes, state,
            columns, student.stride(0), teacher.stride(0), mask_stride, state.stride(0), *o.floats,
            FIRST=first, DIVERGENCE=o.divergence, **o.caps, **_block(columns, FORWARD_BLOCK),
        )  # fmt: skip


def tile_mixture(
    logits: Logits, mask: Tensor | None, stats: Tensor, sums: Tensor, first: bool, options: Sequence[float]
) -> None:
    """Adds a tile's terms of JSD to the sums [2, N] of its rows; `first` starts them."""
    student, teacher, *biases = logits
    rows, columns = student.shape
    if rows == 0:
        return
    mask_bytes, mask_stride = _mask(mask)
    o = _kernel_options(*options)
    with torch.cuda.device_of(student):
        tile_mixture_kernel[(rows,)](
            student, teacher, *biases, mask_bytes, stats, sums,
            columns, student.stride(0), teacher.stride(0), mask_stride, sums.stride(0),
            *o.floats, *o.shares,
            FIRST=first, **o.caps, **_block(columns, FORWARD_BLOCK),
        )  # fmt: skip


def finish_stats(
    states: Tensor, mask: Tensor | None, loss: Tensor, stats: Tensor, options: Sequence[float]
) -> None:
    """Writes loss [N] and stats [N, 6] from states [splits, 5, N]; for JSD the kl and the loss come later."""
    splits, _, rows = states.shape
    if rows == 0:
        return
    o = _kernel_options(*options)
    mask_bytes, mask_stride = _mask(mask)
    with torch.cuda.device_of(states):
        finish_stats_kernel[(triton.cdiv(rows, FINISH_BLOCK),)](
            states, mask_bytes, loss, stats, rows, splits, mask_stride,
            DIVERGENCE=o.divergence, BLOCK_N=FINISH_BLOCK, num_warps=FINISH_BLOCK // 32,
        )  # fmt: skip


def finish_mixture(
    sums: Tensor, mask: Tensor | None, loss: Tensor, stats: Tensor, options: Sequence[float]
) -> None:
    """Writes JSD's loss [N], and the kl of stats [N, 6], from sums [splits, 2, N]."""
    splits, _, rows = sums.shape
    if rows == 0:
        return
    o = _kernel_options(*options)
    mask_bytes, mask_stride = _mask(mask)
    with torch.cuda.device_of(sums):
        finish_mixture_kernel[(triton.cdiv(rows, FINISH_BLOCK),)](
            sums, mask_bytes, loss, stats, rows, splits, mask_stride, *o.shares,
            BLOCK_N=FINISH_BLOCK, num_warps=FINISH_BLOCK // 32,
        )  # fmt: skip


def splits_for(rows: int, vocab_size: int, blocks: LinearBlocks, count: int) -> int:
    """In how many parts the vocabulary is split: so many that the last wave of programs is nearly full.

    Each part keeps at least four tiles; the fewest parts win among those that fill the chip alike and are
    enough that one group of blocks of rows fills it alone.
    """
    row_blocks, tiles = triton.cdiv(rows, blocks.rows), triton.cdiv(vocab_size, blocks.vocab)

    def time(splits: int) -> float:
        return triton.cdiv(row_blocks * splits, count) * (triton.cdiv(tiles, splits) + 0.5)

    most = max(1, min(tiles // 4, 2 * count))
    return min(range(min(most, max(1, count // min(row_blocks, blocks.group))), most + 1), key=time)


def processors(device: torch.device) -> int:
    """Multiprocessors or compute units of the GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def linear_stats(
    student: Side,
    teacher: Side,
    mask: Tensor | None,
    loss: Tensor,
    stats: Tensor,
    vocab_size: int,
    options: Sequence[float],
) -> None:
    """Writes loss [N] and stats [N, 6] from hidden states and heads in 16 bit; no logit leaves the registers.

    The states of the splits of the vocabulary are all that is kept: 20 bytes a row and split.
    """
    if student[0].shape[0] == 0:
        return
    states = _linear(student, teacher, None, vocab_size, options)
    finish_stats(states, mask, loss, stats, options)
    if Divergence.of(options[0]).needs_second_look:
        sums = _linear(student, teacher, stats, vocab_size, options)
        finish_mixture(sums, mask, loss, stats, options)


def _linear(
    student: Side, teacher: Side, stats: Tensor | None, vocab_size: int, options: Sequence[float]
) -> Tensor:
    """States [splits, 5, N] of the rows, or with final stats their sums [splits, 2, N]."""
    (hidden, head, _), (teacher_hidden, teacher_head, _) = student, teacher
    (rows, H), Ht = hidden.shape, teacher_hidden.shape[1]
    blocks, o = linear_blocks(stats is not None), _kernel_options(*options)
    tiles = triton.cdiv(vocab_size, blocks.vocab)
    per_split = triton.cdiv(tiles, splits_for(rows, vocab_size, blocks, processors(hidden.device)))
    splits = triton.cdiv(tiles, per_split)
    fields = NUM_STATE if stats is None else NUM_SUMS
    out = torch.empty((splits, fields, rows), dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        linear_kernel[(triton.cdiv(rows, blocks.rows) * splits,)](
            *student, *teacher, stats, out, rows, vocab_size, H, Ht,
            hidden.stride(0), head.stride(0), teacher_hidden.stride(0), teacher_head.stride(0),
            splits, per_split, *o.floats, *o.shares,
            DIVERGENCE=o.divergence, **o.caps, EVEN_S=H % blocks.hidden == 0, EVEN_T=Ht % blocks.hidden == 0,
            BLOCK_N=blocks.rows, BLOCK_V=blocks.vocab, BLOCK_H=blocks.hidden, GROUP=blocks.group,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return out


def kl_loss_forward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    vocab_size: int,
    options: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """The op kl_loss_forward: loss [N] and stats [N, 6]."""
    check_dtypes(student_logits=student_logits, teacher_logits=teacher_logits)
    rows = student_logits.shape[0]
    loss = student_logits.new_empty(rows, dtype=torch.float32)
    stats = student_logits.new_empty((rows, NUM_STATS), dtype=torch.float32)
    logits = (student_logits, teacher_logits, None, None)
    forward(logits, mask, loss, stats, vocab_size, options)
    return loss, stats


def kl_loss_backward(
    grad_loss: Tensor,
    stats: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    vocab_size: int,
    options: Sequence[float],
) -> Tensor:
    """The op kl_loss_backward: the gradient to student_logits."""
    out = student_logits.new_empty(student_logits.shape)
    logits = (student_logits, teacher_logits, None, None)
    grad(logits, mask, grad_loss, stats, out, vocab_size, options)
    return out
