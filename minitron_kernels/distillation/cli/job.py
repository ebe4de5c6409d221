"""How much a run does, windows, steps, tokens, of how many processes; and on which device."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minitron_kernels._command.values import MOST

LENGTHS = ("steps", "tokens", "epochs")


@dataclass(frozen=True)
class Job:
    """What a run of train does."""

    windows: int  # that there are
    seq_len: int
    processes: int
    per_step: int  # windows of an optimizer step, of all processes
    steps: int

    @property
    def tokens(self) -> int:
        """Of all steps."""
        return self.steps * self.per_step * self.seq_len

    @property
    def passes(self) -> float:
        """Over the windows."""
        return self.steps * self.per_step / self.windows

    def __str__(self) -> str:
        of = f" of {self.processes} processes" if self.processes > 1 else ""
        return (
            f"{self.steps:,} steps of {self.per_step:,} windows{of} = {self.tokens:,} tokens, "
            f"{self.passes:.3g} passes over {self.windows:,} windows of {self.seq_len:,}"
        )


def job_of(config: Mapping[str, Any], windows: int) -> Job:
    """The job of a configuration of train, on so many windows.

    Raises:
        ValueError: it says twice how long; its warm-up is too long.
    """
    check_length(config)
    processes = world_size()
    per_step = config["batch_size"] * config["accumulation"] * processes
    if config["steps"] is not None:
        steps = config["steps"]
    elif config["tokens"] is not None:
        steps = -(-config["tokens"] // (per_step * config["seq_len"]))
    else:
        passes = (config["epochs"] or 1) * windows / per_step
        if passes > MOST:
            raise ValueError(
                f"--epochs must be so few that there are at most 2^53 steps, got {config['epochs']:g}"
            )
        steps = math.ceil(passes)
    check_warmup(config, steps)
    return Job(windows, config["seq_len"], processes, per_step, steps)


def check_length(config: Mapping[str, Any]) -> None:
    """Raises ValueError if a configuration of train says twice how long."""
    given = [name for name in LENGTHS if config[name] is not None]
    if len(given) > 1:
        raise ValueError(
            f"give one of --steps, --tokens and --epochs, got {' and '.join(map('--'.__add__, given))}"
        )


def check_warmup(config: Mapping[str, Any], steps: int) -> None:
    """Raises ValueError if the warm-up does not fit into the steps of a run."""
    linear = config["lr_schedule"] == "linear"  # it divides by the steps behind the warm-up
    if config["warmup"] > steps - linear:
        what = f"less than the {steps}" if linear else f"at most the {steps}"
        raise ValueError(f"--warmup must be {what} steps of the run, got {config['warmup']}")


def world_size() -> int:
    """Processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This one's number among them."""
    return int(os.environ.get("RANK", "0"))


def check_sharding(config: Mapping[str, Any]) -> None:
    """Checks that there are processes to shard over.

    Raises:
        ValueError: there is one alone.
    """
    if config["fsdp"] and world_size() < 2:
        raise ValueError(
            "--fsdp shards models over the processes that torchrun starts, and there is one alone: torchrun "
            "--nproc-per-node N -m minitron_kernels.distillation train ..., or --no-fsdp"
        )


def device_for(name: str) -> str:
    """ "cpu" or "cuda", the first GPU, for what runs in one process.

    Raises:
        ValueError: it cannot be used here.
    """
    import torch

    from minitron_kernels._command.models import device_of

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device_of(name)
    return name


def choose_device(name: str) -> str:
    """device_for(), for what runs in a process for each GPU.

    Raises:
        ValueError: there is no such device; one process sees several GPUs.
    """
    import torch

    name = device_for(name)
    if name == "cuda" and "LOCAL_RANK" not in os.environ and torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        raise ValueError(
            f"--device cuda: this process sees {count} GPUs: start one each (torchrun "
            f"--nproc-per-node {count} -m minitron_kernels.distillation ...), or set CUDA_VISIBLE_DEVICES"
        )
    return name


def own_device(name: str) -> Any:
    """The device of this process."""
    import torch

    return (
        torch.device(name, int(os.environ.get("LOCAL_RANK", "0"))) if name == "cuda" else torch.device(name)
    )
