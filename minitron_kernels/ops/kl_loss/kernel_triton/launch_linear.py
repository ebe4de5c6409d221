"""Launchers of the Triton kernels that see no logits in memory: the fused kernel, and what finishes states.

As in launch.py, none waits for the GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.driver import driver

from minitron_kernels.ops.kl_loss.divergence import NUM_METRIC_STATE, NUM_STATE, NUM_SUMS, Divergence
from minitron_kernels.ops.kl_loss.kernel_triton.arguments import OfLabels, Options, kernel_options, mask_of
from minitron_kernels.ops.kl_loss.kernel_triton.linear import (
    finish_mixture_kernel,
    finish_stats_kernel,
    linear_kernel,
)

FINISH_BLOCK = 128

Side = tuple[Tensor, Tensor, Tensor | None]  # hidden states, head, bias


class LinearBlocks(NamedTuple):
    """Tile sizes of the fused kernel."""

    rows: int
    vocab: int
    hidden: int = 64
    warps: int = 8
    stages: int = 3
    group: int = 8  # blocks of rows that share the tiles of the heads in L2


def linear_blocks(mixture: bool, crowded: bool = False) -> LinearBlocks:
    """The widest tiles that the registers of the current GPU hold.

    mixture: JSD's second run, which needs more of them. crowded: with metrics at another temperature than 1,
    or with label smoothing, which keep more of a row.
    """
    target = driver.active.get_current_target()
    if target.backend == "hip":
        return LinearBlocks(128, 128, stages=2)
    generation = target.arch // 10
    if mixture:
        return LinearBlocks(64, 64)  # 128 x 64 spills on sm_90 under Triton 3.6 and 3.7
    return LinearBlocks(128, 128) if generation in (9, 10) and not crowded else LinearBlocks(128, 64)


def finish_stats(
    states: Tensor,
    mask: Tensor | None,
    loss: Tensor,
    stats: Tensor,
    options: Options,
    labels: Tensor | None = None,
    metric_states: Tensor | None = None,
    metrics: Tensor | None = None,
    total_vocab: int = 0,
) -> None:
    """Writes loss [N] and stats [N, 6] from states [splits, 5, N]; for JSD the kl and the loss come later.

    And metrics [N, 4] from metric_states [splits, 4, N].
    """
    splits, _, rows = states.shape
    if rows == 0:
        return
    o = kernel_options(*options)
    of = OfLabels.of(metric_states is not None, labels, o, total_vocab)
    mask_bytes, mask_stride = mask_of(mask)
    with torch.cuda.device_of(states):
        finish_stats_kernel[(triton.cdiv(rows, FINISH_BLOCK),)](
            states, mask_bytes, loss, stats, metric_states, metrics,
            rows, splits, mask_stride, o.tau, *of.smoothing,
            DIVERGENCE=o.divergence, LABELED=of.labels is not None, **of.kinds,
            BLOCK_N=FINISH_BLOCK, num_warps=FINISH_BLOCK // 32,
        )  # fmt: skip


def finish_mixture(sums: Tensor, mask: Tensor | None, loss: Tensor, stats: Tensor, options: Options) -> None:
    """Writes JSD's loss [N], and the kl of stats [N, 6], from sums [splits, 2, N]."""
    splits, _, rows = sums.shape
    if rows == 0:
        return
    o = kernel_options(*options)
    mask_bytes, mask_stride = mask_of(mask)
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
    options: Options,
    labels: Tensor | None = None,
    metrics: Tensor | None = None,
) -> None:
    """Writes loss [N], stats [N, 6] and metrics [N, 4] from hidden states and heads in 16 bit.

    No logit leaves the registers. The states of the splits of the vocabulary are all that is kept: 20 bytes a
    row and split, 36 with metrics.
    """
    if student[0].shape[0] == 0:
        return
    states, metric_states = _linear(student, teacher, None, vocab_size, options, labels, metrics is not None)
    finish_stats(states, mask, loss, stats, options, labels, metric_states, metrics, vocab_size)
    if Divergence.of(options[0]).needs_second_look:
        sums, _ = _linear(student, teacher, stats, vocab_size, options)
        finish_mixture(sums, mask, loss, stats, options)


def _linear(
    student: Side,
    teacher: Side,
    stats: Tensor | None,
    vocab_size: int,
    options: Options,
    labels: Tensor | None = None,
    metrics: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """States [splits, 5, N] and metric_states [splits, 4, N]; with final stats sums [splits, 2, N]."""
    (hidden, head, _), (teacher_hidden, teacher_head, _) = student, teacher
    (rows, H), Ht = hidden.shape, teacher_hidden.shape[1]
    o = kernel_options(*options)
    of = OfLabels.of(metrics, labels, o)
    with torch.cuda.device_of(hidden):  # which need not be the current GPU
        blocks = linear_blocks(stats is not None, any(of.kinds.values()))
    tiles = triton.cdiv(vocab_size, blocks.vocab)
    per_split = triton.cdiv(tiles, splits_for(rows, vocab_size, blocks, processors(hidden.device)))
    splits = triton.cdiv(tiles, per_split)
    fields = NUM_STATE if stats is None else NUM_SUMS
    out = torch.empty((splits, fields, rows), dtype=torch.float32, device=hidden.device)
    metric_out = out.new_empty((splits, NUM_METRIC_STATE, rows)) if metrics else None
    with torch.cuda.device_of(hidden):
        linear_kernel[(triton.cdiv(rows, blocks.rows) * splits,)](
            *student, *teacher, stats, out, of.labels, metric_out, rows, vocab_size, H, Ht,
            hidden.stride(0), head.stride(0), teacher_hidden.stride(0), teacher_head.stride(0),
            splits, per_split, *o.floats, *o.shares, of.stride, o.tau,
            DIVERGENCE=o.divergence, **o.caps, EVEN_S=H % blocks.hidden == 0, EVEN_T=Ht % blocks.hidden == 0,
            BLOCK_N=blocks.rows, BLOCK_V=blocks.vocab, BLOCK_H=blocks.hidden, GROUP=blocks.group,
            **of.kinds, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return out, metric_out
