"""linear_kl_loss as one opaque op: plan, scratch memory and the native call, or the schedules of a GPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from minitron_kernels._opaque import opaque_op
from minitron_kernels._tensors import with_unit_stride
from minitron_kernels.ops.kl_loss.divergence import NUM_METRICS, NUM_STATS
from minitron_kernels.ops.kl_loss.epilogues import EPILOGUES
from minitron_kernels.ops.kl_loss.find_shard import find_shard
from minitron_kernels.ops.kl_loss.labels import check_labels
from minitron_kernels.ops.kl_loss.linear_cpu import linear_kl_loss_cpu_, linear_sparse_kl_loss_cpu_
from minitron_kernels.ops.kl_loss.linear_gpu import linear_kl_loss_
from minitron_kernels.ops.kl_loss.linear_shard import linear_kl_loss_of_shard
from minitron_kernels.ops.kl_loss.operands import TokenMetrics
from minitron_kernels.ops.kl_loss.options import LossOptions
from minitron_kernels.ops.kl_loss.plan import grad_dtype
from minitron_kernels.ops.kl_loss.sparse_gpu import linear_sparse_kl_loss_
from minitron_kernels.ops.kl_loss.sparse_teacher import SparseTeacher
from minitron_kernels.ops.kl_loss.student_torch import cpu_epilogues
from minitron_kernels.ops.kl_loss.vocab_parallel import HiddenSum, Parallel, group_size


def _loss_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@opaque_op("minitron_kernels::linear_kl_loss", mutates_args=("grad_head_accumulator", "grad_head_buffer"))
def linear_kl_loss_op(
    student_hidden: Tensor,
    student_head: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    teacher_bias: Tensor | None,
    ids: Tensor | None,
    teacher_outcomes: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    stats: Tensor | None,
    grad_head_accumulator: Tensor | None,
    labels: Tensor | None,
    ce_weight: Tensor | None,
    metrics: Tensor | None,
    needs_hidden: bool,
    needs_head: bool,
    needs_bias: bool,
    needs_metrics: bool,
    vocab_size: int,
    numbers: Sequence[float],
    values: Tensor | None,
    backend: str,
    schedule: str,
    workspace_bytes: int,
    engine: str | None,
    group: str | None = None,
    sequence_parallel: bool = False,
    vocab_range: Sequence[int] | None = None,
    grad_head_buffer: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row losses [N], stats [N, 6], metrics [N, 4] and gradients, those that are needed, else empty.

    The teacher is hidden states, head and bias, or sparse: ids [N, k] and outcomes [N, k + 1], as
    sparse_teacher.py makes them. Then stats are the student's outcomes, [N, k + 1].
    The gradients are those of sum(row_weight * loss + ce_weight * cross-entropy). Both weights: [N] or 0-dim;
    row_weight None for 1, ce_weight None for 0; ce_weight needs labels, [N] int64, -1 where there is none.
    With `stats` (and `metrics`, for a ce_weight) of an earlier call, only the gradients are made.
    `numbers` and `values` are those of LossOptions.as_arguments(), the three after `engine` of Parallel.
    The head's gradient is added to a grad_head_accumulator, or written to a grad_head_buffer, if given.
    With a group N is the number of all tokens, vocab_size that of the whole vocabulary, 0 if not known.
    """
    options = LossOptions.from_arguments(numbers, values)
    outputs = _empty_outputs(
        student_hidden,
        student_head,
        teacher_outcomes,
        stats,
        grad_head_accumulator,
        needs_hidden,
        needs_head,
        needs_bias,
        needs_metrics,
        group,
        sequence_parallel,
        grad_head_buffer,
    )
    loss, new_stats, grad_hidden, grad_head, grad_bias, new_metrics = outputs
    lent = needs_head and grad_head_buffer is not None
    if needs_head and grad_head_buffer is not None:
        grad_head = grad_head_buffer
    if metrics is None and needs_metrics:
        metrics = new_metrics
    needs_grad = (needs_hidden, needs_head, needs_bias)
    shard, hidden_sum = None, None
    if group is not None:
        operands = (x for x in (student_hidden, student_head, teacher_hidden, teacher_head) if x is not None)
        asked = (*needs_grad, needs_metrics, stats is None, ce_weight is None, schedule, backend)
        of_ids = "" if ids is None else str(ids.shape)
        shard = find_shard(
            Parallel(group, sequence_parallel, vocab_range or ()),
            student_head.shape[0],
            student_head.shape[0] if teacher_head is None else teacher_head.shape[0],
            vocab_size,
            student_hidden.shape[0],
            (*asked, *(str(x.dtype) for x in operands), of_ids),
            workspace_bytes,
            student_hidden.device,
        )
        vocab_size = shard.width
        check_labels(labels, shard.total_vocab)
        student_hidden = shard.all_tokens(with_unit_stride(student_hidden))
        if teacher_hidden is not None:
            teacher_hidden = shard.all_tokens(with_unit_stride(teacher_hidden))
        if needs_hidden:
            hidden_sum = HiddenSum(grad_hidden, _loss_dtype(student_hidden), shard)
            grad_hidden = hidden_sum.partial
    written = (loss, new_stats, grad_hidden, grad_head, grad_bias)
    student = (student_hidden, student_head, student_bias)
    given = (
        mask,
        row_weight,
        stats,
        grad_head_accumulator,
        needs_grad,
        vocab_size,
        options,
        schedule,
        workspace_bytes,
    )
    of_tokens, on_cpu = TokenMetrics(labels, metrics, ce_weight), not _on_gpu(student_hidden)
    if ids is not None and teacher_outcomes is not None:
        sparse = (written, student, SparseTeacher(ids, teacher_outcomes), *given)
        if on_cpu and shard is None:
            linear_sparse_kl_loss_cpu_(*sparse, engine, of_tokens, lent=lent)
        else:
            epilogues = cpu_epilogues() if on_cpu else EPILOGUES[backend]()
            linear_sparse_kl_loss_(*sparse, epilogues, of_tokens, shard, hidden_sum)
    else:
        assert teacher_hidden is not None and teacher_head is not None
        dense = (written, student, (teacher_hidden, teacher_head, teacher_bias), *given)
        if not on_cpu:
            linear_kl_loss_(*dense, EPILOGUES[backend](), of_tokens, shard, hidden_sum)
        elif shard is None:
            linear_kl_loss_cpu_(*dense, engine, of_tokens, lent=lent)
        else:
            run = functools.partial(linear_kl_loss_cpu_, engine=engine, lent=lent)
            linear_kl_loss_of_shard(run, dense, of_tokens, shard)
    if hidden_sum is not None:
        hidden_sum.finish()
    return outputs


def _on_gpu(x: Tensor) -> bool:  # apart, so that tests can run the schedules of GPUs on CPU tensors
    return x.device.type != "cpu"


@linear_kl_loss_op.register_fake
def _empty_outputs(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_outcomes: Tensor | None,
    stats: Tensor | None,
    grad_head_accumulator: Tensor | None,
    needs_hidden: bool,
    needs_head: bool,
    needs_bias: bool,
    needs_metrics: bool,
    group: str | None,
    sequence_parallel: bool,
    grad_head_buffer: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (N, H), rows = student_hidden.shape, student_head.shape[0]
    loss_dtype = _loss_dtype(student_hidden)
    tokens = N * group_size(group) if group is not None and sequence_parallel else N
    makes_head = needs_head and grad_head_accumulator is None and grad_head_buffer is None
    columns = NUM_STATS if teacher_outcomes is None else teacher_outcomes.shape[1]

    def grad(x: Tensor, shape: tuple[int, ...], wanted: bool) -> Tensor:
        return x.new_empty(shape if wanted else (0,), dtype=grad_dtype(x.dtype))

    return (
        student_hidden.new_empty(tokens, dtype=loss_dtype),
        student_hidden.new_empty((tokens, columns) if stats is None else (0,), dtype=loss_dtype),
        grad(student_hidden, (N, H), needs_hidden),
        grad(student_head, (rows, H), makes_head),
        student_hidden.new_empty(rows if needs_bias else 0, dtype=loss_dtype),
        student_hidden.new_empty((tokens, NUM_METRICS) if needs_metrics else (0,), dtype=loss_dtype),
    )
