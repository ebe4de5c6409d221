"""Matrix products of linear_kl_loss on CUDA and ROCm: torch's, in fp32 sums whatever the process has set."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_COPY_BYTES = 64 << 20  # of operands that are converted at a time, where the GEMM cannot write fp32


def matmul(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """Out (+)= a·b, summed in fp32; a and b have one dtype, and out that dtype or fp32."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif not _writes_fp32(a.device.type, a.dtype):
        _matmul_of_copies(a, b, out, accumulate)
    elif accumulate:
        torch.addmm(out, a, b, out.dtype, out=out)
    else:
        torch.mm(a, b, out.dtype, out=out)


@functools.cache
def _writes_fp32(device: str, dtype: torch.dtype) -> bool:
    """Whether the GEMM of 16-bit operands writes fp32: always on CUDA, on ROCm and CPUs as torch has it."""
    if device == "cuda" and torch.version.hip is None:
        return True
    x = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(torch.mm(x, x, torch.float32), x, x, torch.float32)
    except RuntimeError:  # and NotImplementedError, which is one
        return False
    return True


def _matmul_of_copies(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """The same from fp32 copies of the operands, which hold the same numbers; some columns of b at a time."""
    left = a.float()
    step = max(1, _COPY_BYTES // (4 * max(1, b.shape[0])))
    for begin in range(0, b.shape[1], step):
        right, target = b[:, begin : begin + step].float(), out[:, begin : begin + step]
        torch.addmm(target, left, right, out=target) if accumulate else torch.mm(left, right, out=target)


@contextmanager
def summed_in_fp32() -> Iterator[None]:
    """Within it, products of fp32 are not made of TF32, and 16-bit ones are not reduced in 16 bit.

    Both are switches of the whole process, which trainers set for their layers. They are put back at the end.
    """
    flags = torch.backends.cuda.matmul
    precision = flags.fp32_precision
    reductions = {name: _reduction(name) for name in ("bf16", "fp16")}
    accumulation = flags.allow_fp16_accumulation
    try:
        if precision == "tf32":
            flags.fp32_precision = "ieee"
        for name, allowed in reductions.items():
            if allowed[0]:
                _set_reduction(name, (False, *allowed[1:]))
        if accumulation:
            flags.allow_fp16_accumulation = False
        yield
    finally:
        if precision == "tf32":
            flags.fp32_precision = "none"  # what all backends have; enough where the switch was theirs
            if flags.fp32_precision != precision:
                flags.fp32_precision = precision
        for name, allowed in reductions.items():
            if allowed[0]:
                _set_reduction(name, allowed)
        if accumulation:
            flags.allow_fp16_accumulation = True


def _reduction(name: str) -> tuple[bool, ...]:
    """The switch of reduced-precision sums, and beside it that of split K where torch has it."""
    flags = torch.backends.cuda.matmul
    switch = f"allow_{name}_reduced_precision_reduction"
    split_k = getattr(flags, f"{switch}_split_k", None)
    return (getattr(flags, switch),) if split_k is None else (getattr(flags, switch), split_k)


def _set_reduction(name: str, allowed: tuple[bool, ...]) -> None:
    value = allowed if len(allowed) > 1 else allowed[0]
    setattr(torch.backends.cuda.matmul, f"allow_{name}_reduced_precision_reduction", value)
