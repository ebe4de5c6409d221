"""The roofline: the best that the device can do, measured in the same process as the row it is compared with.

The roofline of a shape is the longer of two times: that of its four GEMMs at the rate of one large matrix
product, and that of moving its operands and gradients once at the rate of a copy.
"""

from __future__ import annotations

from typing import Any

import torch

from common.dtypes import DTYPES
from common.harness import timer
from kl_loss_rows.cases import Case
from kl_loss_rows.floor import gemm_flops

SIDE = 8192  # of the square matrices: a product has 1.1 TFLOP
RATES = ("matmul_flops_per_s", "copy_bytes_per_s")
COPY_BYTES = 1 << 30  # much larger than any cache


def rates(
    dtype: str, device: str, *, side: int = SIDE, copy_bytes: int = COPY_BYTES, reps: int = 10
) -> dict[str, float]:
    """Flops and bytes per second: the best of `reps` products of square matrices, and of `reps` copies."""
    # random numbers, since constants draw less power and run faster
    a, b, out = (torch.randn(side, side, dtype=DTYPES[dtype], device=device) for _ in range(3))
    source, target = (torch.ones(copy_bytes, dtype=torch.uint8, device=device) for _ in range(2))

    def best(call: Any) -> float:
        call()
        clock = timer(call, device)
        return min(clock.sample().busy_s for _ in range(reps))

    product = 2 * side**3 / best(lambda: torch.mm(a, b, out=out))
    copy = 2 * copy_bytes / best(lambda: target.copy_(source))
    return dict(zip(RATES, (product, copy), strict=True))


def least_bytes(case: Case, dtype: str) -> int:
    """Bytes of reading hidden states and heads once and writing the student's gradients once."""
    operands = (case.N + case.V) * (case.H + case.Ht)
    gradients = (case.N + case.V) * case.H
    return DTYPES[dtype].itemsize * (operands + gradients)


def roofline(case: Case, dtype: str, measured: dict[str, float]) -> dict[str, float]:
    """The rates, the flops and bytes of the shape, and the least seconds that these take."""
    flops, moved = gemm_flops(case), least_bytes(case, dtype)
    seconds = max(flops / measured["matmul_flops_per_s"], moved / measured["copy_bytes_per_s"])
    return measured | {"flops": flops, "bytes": moved, "seconds": seconds}
