"""Launches of gather's Triton kernel for _offline_triton.py, and faults that the gates must see."""

import torch
from _faults import Fault

R, C, ROWS, COLS = 14336, 5120, 11520, 4096
DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "complex128": torch.complex128,
}


def cases(target_name):
    """(name, call) of every width, of one element and of blocks, and of rows that begin anywhere."""
    from minitron_kernels.ops.gather import kernel_triton as k

    def empty(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device="meta")

    out = []

    def add(name, *arguments):
        out.append((name, lambda: k.gather_channels_(*arguments)))

    rows = empty(ROWS)
    for name, dtype in DTYPES.items():
        weight, both = empty(R, C, dtype=dtype), empty(ROWS, COLS, dtype=dtype)
        add(f"both {name}", both, weight, rows, empty(COLS), 1)
        most = 16 // weight.element_size()
        if most > 1:
            add(f"blocks {name}", both, weight, rows, empty(COLS // most), most)
        add(f"rows {name}", empty(ROWS, C, dtype=dtype), weight, rows, None, 1)
        add(f"cols {name}", empty(R, COLS, dtype=dtype), weight, None, empty(COLS), 1)
    odd = empty(R, C + 1, dtype=torch.bfloat16)[:, :C]
    add("odd bf16", empty(ROWS, COLS, dtype=torch.bfloat16), odd, rows, empty(COLS), 1)
    return out


FILE = "gather/kernel_triton.py"
FAULTS = {  # name: cases, fault, what the gate says
    "none": ("both bf16", (), None),
    "scalar stores": (
        "both bf16",
        (Fault(FILE, "    out_row = tl.multiple_of(out_row, OUT_ALIGN)\n", ""),),
        "wide_stores 0, at least",
    ),
    "registers": ("both fp8", (Fault(FILE, "num_warps=4", "num_warps=1"),), "registers|spilled"),
}
