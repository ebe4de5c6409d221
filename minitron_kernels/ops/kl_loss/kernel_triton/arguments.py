"""What the launchers hand to the kernels of kl_loss and linear_kl_loss beside tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from minitron_kernels.ops.kl_loss.divergence import Divergence

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class KernelOptions(NamedTuple):
    """The ops' options as the kernels take them."""

    divergence: int
    shares: tuple[float, float]  # of student and teacher in JSD's M: 1 - beta in fp32 would be 0 next to 1
    floats: tuple[float, ...]  # factor, scale / cap and cap / tau of the student, then of the teacher
    caps: dict[str, bool]
    tau: float
    smoothing: float


def kernel_options(
    beta: float,
    inv_tau: float,
    student_scale: float,
    student_softcap: float,
    teacher_scale: float,
    teacher_softcap: float,
    label_smoothing: float,
) -> KernelOptions:
    """From `float[] options` of the ops."""
    floats: list[float] = []
    for scale, cap in ((student_scale, student_softcap), (teacher_scale, teacher_softcap)):
        floats += [scale * inv_tau, scale / cap if cap else 0.0, cap * inv_tau]
    caps = {"CAP_S": student_softcap != 0, "CAP_T": teacher_softcap != 0}
    shares = (1.0 - beta, max(beta, torch.finfo(torch.float32).tiny))
    numbers = tuple(map(float, floats))
    return KernelOptions(Divergence.of(beta).value, shares, numbers, caps, 1.0 / inv_tau, label_smoothing)


class OfLabels(NamedTuple):
    """Labels, as the kernels take them, and what is compiled for them and for metrics."""

    labels: Tensor | None
    stride: int
    smoothing: tuple[float, float]  # label_smoothing, and 1 over the tokens it spreads over
    kinds: dict[str, bool]  # TEMPERED, SMOOTHED: both off where nobody asked for metrics

    @classmethod
    def of(
        cls, wanted: bool, labels: Tensor | None, options: KernelOptions, total_vocab: int = 0
    ) -> OfLabels:
        """wanted: whether there is anything to do with metrics."""
        if not wanted:
            return _NO_LABELS
        smoothed = labels is not None and options.smoothing != 0
        kinds = {"TEMPERED": options.tau != 1, "SMOOTHED": smoothed}
        inv_vocab = 1.0 / total_vocab if smoothed and total_vocab else 0.0
        stride = 0 if labels is None else labels.stride(0)
        return cls(labels, stride, (float(options.smoothing), inv_vocab), kinds)


_NO_LABELS = OfLabels(None, 0, (0.0, 0.0), {"TEMPERED": False, "SMOOTHED": False})


def block_of(columns: int, most: int) -> dict[str, Any]:
    """A block of the vocabulary and the warps for it: 16 elements a thread."""
    block = min(most, max(128, triton.next_power_of_2(columns)))
    return {"BLOCK_V": block, "num_warps": max(1, block // 512)}


def mask_of(mask: Tensor | None) -> tuple[Tensor | None, int]:
    """A mask as the kernels read it, and its stride."""
    return (None, 0) if mask is None else (mask.view(torch.uint8), mask.stride(0))


def stride_of(x: Tensor | None) -> int:
    """The first stride."""
    return 0 if x is None else x.stride(0)


def check_dtypes(**tensors: Tensor) -> None:
    """The kernels compute in fp32."""
    for name, x in tensors.items():
        if x.dtype not in _DTYPES:
            raise TypeError(
                f"{name} must be float32, bfloat16 or float16 for the Triton kernels, got {x.dtype}; "
                'backend="reference" serves float64'
            )


Options = Sequence[float]  # `float[] options` of the ops
