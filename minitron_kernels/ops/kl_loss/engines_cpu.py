"""What multiplies on the CPU: engines by name, and the numbers of them and of schedules in C++."""

from __future__ import annotations

import functools

import torch

# by name: the operands' type, and whose GEMM multiplies them; see csrc/kl_loss/cpu/engine.h
ENGINES = {
    "bf16": (torch.bfloat16, "libtorch"),
    "portable_bf16": (torch.bfloat16, "portable"),
    "amx": (torch.bfloat16, "amx"),
    "avx512_bf16": (torch.bfloat16, "avx512_bf16"),
    "portable_amx": (torch.bfloat16, "portable_amx"),
    "portable_avx512_bf16": (torch.bfloat16, "portable_avx512_bf16"),
    "f32": (torch.float32, "portable"),
    "f64": (torch.float64, "portable"),
}
# the numbers of LinearPlan in csrc/kl_loss/cpu/linear_plan.h, which a test compares
SCHEDULE_CODES = {"store": 0, "recompute": 1, "forward": 2}
OPERAND_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2}
IMPLEMENTATION_CODES = {
    "libtorch": 0,
    "portable": 1,
    # operands in tiles, which a head is always copied into
    "amx": 2,
    "avx512_bf16": 3,
    "portable_amx": 4,
    "portable_avx512_bf16": 5,
}


def operand_type(*dtypes: torch.dtype) -> str:
    """The engine, a key of ENGINES, for GEMM operands of these dtypes.

    One of bf16 operands only where every operand is bf16: rounding another would give a wrong result,
    silently.
    """
    if torch.float64 in dtypes:
        return "f64"
    if set(dtypes) == {torch.bfloat16}:
        return _bf16_engine()
    return "f32"


@functools.cache
def _bf16_engine() -> str:
    return torch.ops.minitron_kernels.bf16_engine()  # a property of the processor


def copies_head(engine: str, dtype: torch.dtype) -> bool:
    """Whether a head of this dtype is converted or put in tiles, and not read as it lies."""
    operands, implementation = ENGINES[engine]
    return dtype != operands or implementation not in ("libtorch", "portable")
