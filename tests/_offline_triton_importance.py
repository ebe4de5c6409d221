"""Launches of importance's Triton kernels for _offline_triton.py, and faults that the gates must see."""

import torch
from _faults import Fault

B, S, C, HEADS = 4, 2048, 14336, 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cases(target_name):
    """(name, call) of every kernel and dtype; for one target with all kinds, else with few."""
    from minitron_kernels.ops.importance import kernel_triton as k

    def empty(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    out = []

    def add(name, call, *arguments):
        out.append((name, lambda: call(*arguments)))

    mask, borders = empty(B, S, dtype=torch.bool), empty(B + 1, dtype=torch.int64)
    for name, dtype in DTYPES.items():
        x = empty(B, S, C, dtype=dtype)
        for kinds in range(1, 8) if target_name == "sm_90" else (1, 7):
            add(f"moments {name} {kinds}", k.importance_moments, x, None, None, 0, kinds)
        for kinds in (1, 7):
            add(f"masked {name} {kinds}", k.importance_moments, x, mask, None, 0, kinds)
            add(f"packed {name} {kinds}", k.importance_moments, x[0], None, borders, 0, kinds)
        heads = empty(B, S, HEADS * 128, dtype=dtype)
        add(f"heads {name}", k.importance_moments, heads, mask, None, HEADS, 1)
        rows = empty(B * S, 4096, dtype=dtype)
        add(f"rows {name}", k.importance_rows, rows, None)
        add(f"pairs {name}", k.importance_rows, rows, rows)
    return out


FILE = "importance/kernel_triton.py"
FAULTS = {  # name: cases, fault, what the gate says
    "none": ("moments bf16 1", (), None),
    "scalar loads": (
        "moments bf16 1",
        (Fault(FILE, '["B", "S", "C_blocks", "slots",', '["B", "S", "C_blocks", "stride_t", "slots",'),),
        "importance_pieces_kernel: wide_loads 0, at least",
    ),
    "registers": (
        "moments bf16 7",
        (Fault(FILE, "num_warps=max(1, block * x.element_size() // 512)", "num_warps=1"),),
        "importance_pieces_kernel: (registers|.*spilled)",
    ),
    "spills": (
        "moments bf16 7",
        (Fault(FILE, "BLOCK_T=8,", "BLOCK_T=32,"),),
        "importance_pieces_kernel: .*spilled registers",
    ),
}
