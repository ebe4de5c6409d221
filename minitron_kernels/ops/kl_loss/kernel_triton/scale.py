"""grad *= factor in place, the product in fp32 and rounded once.

grid (at most PROGRAMS): each takes every PROGRAMS-th block. Reads and writes grad once; where the factor,
which is read on the device, is 1, touches none of it.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Two waves on a GPU of 128 SMs; more programs would only take time to start where the factor is 1.
BLOCK, PROGRAMS, WARPS = 8192, 2048, 8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["factor_ptr"])
def scale_grad_kernel(
    grad_ptr,  # fp32, bf16 or fp16
    factor_ptr,  # fp32
    n,  # elements; 64 bit from 2^31 on, and so is what is counted up to it
    BLOCK: tl.constexpr,
):
    """Blocks without an end first; what lies beyond the last one is the work of one program."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        lanes = tl.arange(0, BLOCK)
        whole = n // BLOCK
        for block in range(tl.program_id(0), whole, tl.num_programs(0)):
            ptr = grad_ptr + block * BLOCK + lanes
            tl.store(ptr, (tl.load(ptr).to(tl.float32) * factor).to(grad_ptr.dtype.element_ty))
        if tl.program_id(0) == whole % tl.num_programs(0):
            rest = lanes < n - whole * BLOCK
            ptr = grad_ptr + whole * BLOCK + lanes
            value = tl.load(ptr, mask=rest).to(tl.float32) * factor
            tl.store(ptr, value.to(grad_ptr.dtype.element_ty), mask=rest)


def scale_grad_(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor; grad is contiguous, factor 0-dim fp32 on its device."""
    if grad.dtype not in _DTYPES or factor.dtype != torch.float32:
        raise TypeError(
            "grad must be float32, bfloat16 or float16 and factor float32, "
            f"got {grad.dtype} and {factor.dtype}"
        )
    if not grad.is_contiguous() or factor.dim() != 0:
        raise ValueError("grad must be contiguous and factor without dimensions")
    if grad.numel() == 0:
        return
    n = grad.numel()
    with torch.cuda.device_of(grad):
        programs = min(PROGRAMS, triton.cdiv(n, BLOCK))
        scale_grad_kernel[(programs,)](grad, factor, n, BLOCK=BLOCK, num_warps=WARPS)
