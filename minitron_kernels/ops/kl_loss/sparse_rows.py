"""sparse_kl_loss on rows of logits, some rows at a time in fp32, and its gradient.

The backward reads the logits again, as that of rows.py does. What stays in between has the size of [N, k].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minitron_kernels._opaque import opaque_op
from minitron_kernels.ops.kl_loss.checks import as_saved
from minitron_kernels.ops.kl_loss.divergence import NUM_METRICS
from minitron_kernels.ops.kl_loss.epilogues import EPILOGUES, Epilogues
from minitron_kernels.ops.kl_loss.operands import TokenMetrics, slices
from minitron_kernels.ops.kl_loss.options import LossOptions
from minitron_kernels.ops.kl_loss.record import TokenTerms
from minitron_kernels.ops.kl_loss.rows import columns, no_second_derivative, returned_terms
from minitron_kernels.ops.kl_loss.sparse_gpu import SparseCall
from minitron_kernels.ops.kl_loss.sparse_teacher import SparseTeacher
from minitron_kernels.ops.kl_loss.student_torch import cpu_epilogues
from minitron_kernels.ops.kl_loss.tile_passes import statistics

# fp32 logits of the rows that are at work: a CPU's L2 cache, or what fills a GPU
_CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 256 << 20}


class _Rows(SparseCall):
    """A SparseCall whose logits exist."""

    def __init__(
        self,
        logits: Tensor,
        teacher: SparseTeacher,
        mask: Tensor | None,
        vocab_size: int,
        options: LossOptions,
        epilogues: Epilogues,
        of_tokens: TokenMetrics,
    ) -> None:
        self.student, self.buffers = (logits, logits, None), {}
        self.mask, self.vocab_size, self.options, self.epilogues = mask, vocab_size, options, epilogues
        self.of_tokens = of_tokens
        self.any_masked_out = torch.zeros(logits.shape[:1], dtype=torch.bool, device=logits.device)
        self.shard, self.first_token, self.total_vocab = None, 0, vocab_size
        self.set_teacher(teacher)

    def make(self, tile: Tensor, rows: slice, columns: slice) -> None:
        tile.copy_(self.student[0][rows, columns])
        if self.options.label_smoothing:
            self.any_masked_out[rows] = (tile == -math.inf).any(1)

    def masked_out(self, rows: slice) -> Tensor | None:
        return self.any_masked_out[rows]

    @property
    def chunk_rows(self) -> int:
        """Rows at a time."""
        row_bytes = self.outcomes.element_size() * (self.vocab_size + 1)
        return max(1, _CHUNK_BYTES["cpu" if self.outcomes.device.type == "cpu" else "cuda"] // row_bytes)


def sparse_rows(
    backend: str,
    student: Tensor,
    teacher: SparseTeacher,
    mask: Tensor | None,
    labels: Tensor | None,
    vocab_size: int,
    options: LossOptions,
    needs_metrics: bool,
) -> TokenTerms:
    """[N, Vs] with stride 1 along the vocabulary -> the terms of each row; see rows.py."""
    arguments = (vocab_size, *options.as_arguments(), backend)
    if torch.is_grad_enabled() and student.requires_grad:
        return TokenTerms(*_SparseRows.apply(student, *teacher, mask, labels, needs_metrics, arguments))
    loss, _, metrics = _forward(student, *teacher, mask, labels, needs_metrics, *arguments)
    return TokenTerms(loss, *columns(metrics)) if needs_metrics else TokenTerms(loss)


class _SparseRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        ids: Tensor,
        outcomes: Tensor,
        mask: Tensor | None,
        labels: Tensor | None,
        needs_metrics: bool,
        arguments: tuple[Any, ...],
    ) -> tuple[Tensor | None, ...]:
        inputs = (student, ids, outcomes, mask, labels)
        loss, of_student, metrics = _forward(*inputs, needs_metrics, *arguments)
        ctx.save_for_backward(*map(as_saved, inputs), of_student, metrics)
        ctx.arguments = arguments
        return returned_terms(ctx, loss, metrics if needs_metrics else None)

    @staticmethod
    @no_second_derivative("sparse_kl_loss")
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_ce: Tensor | None = None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        *inputs, of_student, metrics = ctx.saved_tensors
        if grad_loss is None:
            grad_loss = of_student.new_zeros(of_student.shape[:1])
        ce_weight = None if inputs[4] is None else grad_ce
        return _backward(*inputs, of_student, metrics, grad_loss, ce_weight, *ctx.arguments), *(None,) * 6


def _call(
    student: Tensor,
    teacher: SparseTeacher,
    mask: Tensor | None,
    of_tokens: TokenMetrics,
    vocab_size: int,
    options: LossOptions,
    backend: str,
) -> _Rows:
    epilogues = cpu_epilogues() if student.device.type == "cpu" else EPILOGUES[backend]()
    return _Rows(student, teacher, mask, vocab_size, options, epilogues, of_tokens)


@opaque_op("minitron_kernels::sparse_rows_forward")
def _forward(
    student: Tensor,
    ids: Tensor,
    outcomes: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    needs_metrics: bool,
    vocab_size: int,
    numbers: Sequence[float],
    values: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    options = LossOptions.from_arguments(numbers, values)
    loss, of_student, metrics = _fake_forward(student, ids, outcomes, mask, labels, needs_metrics)
    of_tokens = TokenMetrics(labels, metrics if needs_metrics else None)
    call = _call(student, SparseTeacher(ids, outcomes), mask, of_tokens, vocab_size, options, backend)
    if loss.numel():
        statistics(call, loss, of_student, call.chunk_rows, vocab_size)
    return loss, of_student, metrics


@opaque_op("minitron_kernels::sparse_rows_backward")
def _backward(
    student: Tensor,
    ids: Tensor,
    outcomes: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    of_student: Tensor,
    metrics: Tensor,
    weight: Tensor,
    ce_weight: Tensor | None,
    vocab_size: int,
    numbers: Sequence[float],
    values: Tensor | None,
    backend: str,
) -> Tensor:
    options = LossOptions.from_arguments(numbers, values)
    grad = student.new_zeros(student.shape)
    of_tokens = TokenMetrics(labels, metrics if ce_weight is not None else None)
    call = _call(student, SparseTeacher(ids, outcomes), mask, of_tokens, vocab_size, options, backend)
    weight = weight.to(outcomes.dtype).contiguous()
    ce_weight = None if ce_weight is None else ce_weight.to(outcomes.dtype).contiguous()
    if student.shape[0] == 0:
        return grad
    call.prepare(of_student, weight, True)
    whole = slice(0, vocab_size)
    for rows in slices(0, student.shape[0], call.chunk_rows):
        dz = call.buffer("dz", rows.stop - rows.start, vocab_size, student.dtype)
        call.grad(rows, whole, None, of_student, weight, ce_weight, dz)
        grad[rows, whole] = dz
    return grad


@_forward.register_fake
def _fake_forward(
    student: Tensor,
    ids: Tensor,
    outcomes: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    needs_metrics: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    N, like = student.shape[0], outcomes
    return (
        like.new_empty(N),
        like.new_empty(like.shape),
        like.new_empty((N, NUM_METRICS) if needs_metrics else (0,)),
    )


@_backward.register_fake
def _(student: Tensor, *_: Any) -> Tensor:
    return student.new_empty(student.shape)
