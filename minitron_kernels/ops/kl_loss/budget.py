"""The scratch memory of a call: schedules, default sizes, and what is said of a budget that is too small."""

from __future__ import annotations

import torch

from minitron_kernels.ops.kl_loss.checks import byte_count

SCHEDULES = ("auto", "store", "recompute")
CPU_WORKSPACE_BYTES = 576 << 20  # by default: both logits of 512 rows of 131072, and what goes with them
GPU_WORKSPACE_BYTES = 4 << 30  # by default: dz of 8192 rows of 131072, and logits of 2048 of them


def workspace_budget(workspace_bytes: int | float | None, device: torch.device) -> int:
    """The budget of a call, by default that of its device."""
    if workspace_bytes is not None:
        return byte_count("workspace_bytes", workspace_bytes)
    return CPU_WORKSPACE_BYTES if device.type == "cpu" else GPU_WORKSPACE_BYTES


def check_schedule(schedule: str) -> None:
    """It is one of SCHEDULES."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}")


def too_small(budget: int, least: int, schedule: str, vocab_size: int, more: str = "") -> ValueError:
    """The error for a budget with which no plan fits; `least` would do."""
    return ValueError(
        f"workspace_bytes={budget} is too small: the least that would do is {least} (schedule={schedule!r}, "
        f"{more}vocabulary {vocab_size})"
    )
