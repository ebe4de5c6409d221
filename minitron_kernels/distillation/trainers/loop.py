"""Loops of one's own: what to divide by, so that micro-batches and ranks add up to one batch.

    student = DistributedDataParallel(attach(student))
    for batches in windows:                       # the micro-batches of one optimizer step
        num_items = count_items(batches)
        for i, batch in enumerate(batches):
            last = i + 1 == len(batches)
            with nullcontext() if last else student.no_sync():
                step(student, teacher, batch, loss, num_items=num_items).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

The mean of each micro-batch, averaged over micro-batches and ranks, weighs a token of a short batch more than
one of a long batch; with num_items every valid token of the step weighs the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_kernels.distillation.targets import count_targets


def count_items(
    batches: Iterable[Mapping[str, Any]], group: Any = None, *, ignore_index: int = -100
) -> Tensor:
    """The valid tokens of a step's micro-batches on all ranks, divided by the number of ranks.

        num_items = Σ over ranks and micro-batches of valid tokens / ranks

    This is `num_items` of step() and DistillationLoss under DDP and FSDP, which average the ranks' gradients:
    the mean of sums / num_items is the sum over all tokens / all tokens.

    Args:
        batches: this rank's micro-batches of one optimizer step, as step() takes them, and counted as it
            counts them: see count_targets(). A list, since each is needed again. Ranks may have different
            numbers of tokens; DDP wants the same number of micro-batches.
        group: the ranks over which gradients are averaged, the data-parallel ones; None: all ranks of
            torch.distributed where that is initialised, else this process alone. With tensor or pipeline
            parallelism pass the data-parallel group. Every rank of it must call.
        ignore_index: label of tokens that do not count; that of the loss.

    Returns:
        0-dim float64 on the batches' device (on the GPU for NCCL); 1 where no token counts at all.

    Raises:
        TypeError: one batch in place of a list, something that is no mapping, or an iterator, which counting
            would use up.
        ValueError: no batch; and as count_targets().
    """
    if isinstance(batches, Mapping) or iter(batches) is batches:
        raise TypeError(
            f"batches must be a list of a step's micro-batches, got {type(batches).__name__}: "
            "pass [batch], or list(...) of an iterator, which would be used up by counting"
        )
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"batches must hold mappings such as {{'input_ids': ...}}, got {type(batch).__name__}"
            )
    counts = [count_targets(batch, ignore_index) for batch in batches]
    if not counts:
        raise ValueError("batches must be the micro-batches of a step, got none")
    total = torch.stack([count.to(counts[0].device) for count in counts]).sum().double()
    ranks = 1
    if group is not None or (dist.is_available() and dist.is_initialized()):
        ranks = dist.get_world_size(group)
        if total.device.type == "cpu" and dist.get_backend(group) == "nccl":
            total = total.to(torch.device("cuda", torch.cuda.current_device()))
        dist.all_reduce(total, group=group)
    return torch.where(total > 0, total / ranks, torch.ones_like(total))
