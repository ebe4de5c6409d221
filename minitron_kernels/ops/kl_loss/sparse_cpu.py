"""linear_sparse_kl_loss on the CPU: plan, scratch memory and the native call."""

from __future__ import annotations

from typing import Any


def sparse_kl_loss_cpu(*arguments: Any) -> None:
    """As linear_sparse_kl_loss_() of sparse_gpu.py, with the engine in place of the epilogues."""
    raise NotImplementedError
