"""linear_kl_loss and linear_sparse_kl_loss on the CPU: plan, scratch memory and the native call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minitron_kernels import _workspace
from minitron_kernels._tensors import with_unit_stride
from minitron_kernels.ops.kl_loss.operands import NO_METRICS, Side, TokenMetrics
from minitron_kernels.ops.kl_loss.options import LossOptions
from minitron_kernels.ops.kl_loss.plan_cpu import operand_type, plan
from minitron_kernels.ops.kl_loss.sparse_teacher import SparseTeacher

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # loss, stats, gradients to hidden, head and bias


def linear_kl_loss_cpu_(outputs: Outputs, student: Side, teacher: Side, *given: Any, **more: Any) -> None:
    """What linear_kl_loss_() of linear_gpu.py does on a GPU: fills the outputs that are needed.

    For what is given beside the teacher see _fill().
    """

    def operands(vocab_size: int) -> tuple[Tensor | None, ...]:
        heads = (with_unit_stride(x) for x in (*student[:2], *teacher[:2]))
        return (*heads, *(_bias(side[2], vocab_size, outputs) for side in (student, teacher)))

    _fill("linear_kl_loss_cpu_", operands, teacher[:2], 0, outputs, student, *given, **more)


def linear_sparse_kl_loss_cpu_(
    outputs: Outputs, student: Side, teacher: SparseTeacher, *given: Any, **more: Any
) -> None:
    """The same with a sparse teacher, whose stats are the student's outcomes, [N, k + 1]."""

    def operands(vocab_size: int) -> tuple[Tensor | None, ...]:
        bias, loss = _bias(student[2], vocab_size, outputs), outputs[0]
        of_teacher = teacher.ids.contiguous(), teacher.outcomes.to(loss.dtype).contiguous()
        return (*(with_unit_stride(x) for x in student[:2]), bias, *of_teacher)

    outcomes = teacher.outcomes.shape[1]
    _fill("linear_sparse_kl_loss_cpu_", operands, (), outcomes, outputs, student, *given, **more)


def _bias(bias: Tensor | None, vocab_size: int, outputs: Outputs) -> Tensor | None:
    return None if bias is None else bias[:vocab_size].to(outputs[0].dtype).contiguous()


def _fill(
    op: str,
    operands: Callable[[int], tuple[Tensor | None, ...]],
    teacher: tuple[Tensor, ...],
    outcomes: int,
    outputs: Outputs,
    student: Side,
    mask: Tensor | None,
    row_weight: Tensor | None,
    stats: Tensor | None,
    grad_head_accumulator: Tensor | None,
    needs_grad: tuple[bool, bool, bool],
    vocab_size: int,
    options: LossOptions,
    schedule: str,
    workspace_bytes: int,
    engine: str | None,
    of_tokens: TokenMetrics = NO_METRICS,
    total_vocab: int = 0,
    lent: bool = False,
) -> None:
    """Plans and makes a call of `op`, whose first arguments are operands(vocab_size).

    Args:
        op: its name.
        operands: gives hidden states, heads and biases as the op takes them.
        teacher: hidden states and head, or nothing for a sparse one.
        outcomes: k + 1 of a sparse teacher, else 0.
        outputs: see linear_kl_loss_() of linear_gpu.py, as most that follows.
        student: as there.
        mask: as there.
        row_weight: as there.
        stats: as there.
        grad_head_accumulator: as there.
        needs_grad: as there.
        vocab_size: as there.
        options: as there.
        schedule: as there.
        workspace_bytes: as there.
        engine: as the planner has it; None for what is fastest.
        of_tokens: as there.
        total_vocab: of all ranks, where vocab_size is a shard's.
        lent: whether grad_head is a caller's memory, of pages that are mapped.
    """
    loss, new_stats, grad_hidden, grad_head, grad_bias = outputs
    hidden, head, _ = student
    N = hidden.shape[0]
    chosen = plan(
        N if mask is None else int(mask.sum()),
        vocab_size,
        hidden.shape[1],
        teacher[0].shape[1] if teacher else 0,
        dtype=head.dtype,
        grad_hidden=needs_grad[0],
        grad_head=needs_grad[1],
        grad_bias=needs_grad[2],
        grad_head_accumulator=grad_head_accumulator is not None,
        divergence_needs_kl=not outcomes and options.divergence.needs_second_look,
        schedule=schedule,
        workspace_bytes=workspace_bytes,
        engine=engine or operand_type(hidden.dtype, head.dtype, *(x.dtype for x in teacher)),
        metrics=of_tokens.metrics is not None,
        outcomes=outcomes,
        lent=lent,
    )

    def per_row(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(loss.dtype).expand(N).contiguous()

    with _workspace.borrow(chosen.total_bytes, hidden.device) as workspace:
        getattr(torch.ops.minitron_kernels, op)(
            *operands(vocab_size),
            mask,
            per_row(row_weight),
            loss,
            new_stats if stats is None else stats.contiguous(),
            stats is not None,
            grad_hidden if needs_grad[0] else None,
            grad_head if needs_grad[1] and grad_head.numel() else None,
            grad_bias[:vocab_size] if needs_grad[2] else None,
            grad_head_accumulator if needs_grad[1] else None,
            workspace,
            vocab_size,
            options,
            chosen.numbers,
            of_tokens.labels,
            of_tokens.metrics,
            per_row(of_tokens.ce_weight),
            total_vocab,
        )
    if needs_grad[2]:
        grad_bias[vocab_size:] = 0
