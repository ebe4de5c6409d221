"""The device of stages that run in the recipe's own process."""

from __future__ import annotations


def device_for(name: str) -> str:
    """ "cpu" or "cuda", the first GPU: unlike training, other stages need no process for each GPU.

    Raises:
        ValueError: it cannot be used here.
    """
    import torch

    from minitron_kernels._command.models import device_of

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device_of(name)
    return name
