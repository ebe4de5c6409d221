"""linear_sparse_kl_loss on the CPU: plan, scratch memory and the native call."""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_kernels import _workspace
from minitron_kernels.ops.kl_loss.linear_rows import NO_METRICS, Side, TokenMetrics
from minitron_kernels.ops.kl_loss.options import LossOptions
from minitron_kernels.ops.kl_loss.plan import grad_dtype
from minitron_kernels.ops.kl_loss.plan_cpu import operand_type, plan
from minitron_kernels.ops.kl_loss.sparse_teacher import SparseTeacher


def sparse_kl_loss_cpu(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    student: Side,
    teacher: SparseTeacher,
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
) -> None:
    """As linear_sparse_kl_loss_() of sparse_gpu.py, with the engine in place of the epilogues."""
    loss, new_outcomes, grad_hidden, grad_head, grad_bias = outputs
    hidden, head, bias = student
    labels, metrics, ce_weight = of_tokens
    N, dtype = hidden.shape[0], loss.dtype
    chosen = plan(
        N if mask is None else int(mask.sum()),
        vocab_size,
        hidden.shape[1],
        0,
        dtype=grad_dtype(head.dtype),
        grad_hidden=needs_grad[0],
        grad_head=needs_grad[1],
        grad_bias=needs_grad[2],
        grad_head_accumulator=grad_head_accumulator is not None,
        divergence_needs_kl=False,
        schedule=schedule,
        workspace_bytes=workspace_bytes,
        engine=engine or operand_type(hidden.dtype, head.dtype),
        metrics=metrics is not None,
        outcomes=teacher.outcomes.shape[1],
    )

    def per_row(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype).expand(N).contiguous()

    with _workspace.borrow(chosen.total_bytes, hidden.device) as workspace:
        torch.ops.minitron_kernels.linear_sparse_kl_loss_cpu_(
            _rows(hidden),
            _rows(head),
            None if bias is None else bias[:vocab_size].to(dtype).contiguous(),
            teacher.ids.contiguous(),
            teacher.outcomes.to(dtype).contiguous(),
            mask,
            per_row(row_weight),
            loss,
            new_outcomes if stats is None else stats.contiguous(),
            stats is not None,
            grad_hidden if needs_grad[0] else None,
            grad_head if grad_head.numel() else None,
            grad_bias[:vocab_size] if needs_grad[2] else None,
            grad_head_accumulator,
            workspace,
            vocab_size,
            options,
            chosen.numbers,
            labels,
            metrics,
            per_row(ce_weight),
        )
    if needs_grad[2]:
        grad_bias[vocab_size:] = 0


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
