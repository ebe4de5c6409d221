"""Launches of gather's Triton kernel, for the tools that look at them without a GPU.

tools/offline_triton.py compiles them for GPUs that are not here,
tools/triton_traffic.py counts the bytes they move.
"""

import torch

from minitron_kernels.ops.gather import kernel_triton as k


def to_compile(target_name):
    """(name, call) of every width, of one element and of blocks, and of rows that begin anywhere."""
    R, C, ROWS, COLS = 14336, 5120, 11520, 4096
    DTYPES = {
        "fp8": torch.float8_e4m3fn,
        "bf16": torch.bfloat16,
        "fp32": torch.float32,
        "fp64": torch.float64,
        "complex128": torch.complex128,
    }

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


def measure(counting):
    """Single columns, blocks of 8, whole rows. `kept`: what is read of the weight, its size what is kept."""
    R, C, ROWS, COLS = 20, 256, 12, 192
    WORDS = {1: torch.int8, 2: torch.int16, 8: torch.int64}

    k.BLOCK_BYTES = 512
    report = {}
    rows, cols = torch.arange(ROWS) + 5, torch.arange(COLS) + 32
    for name, dtype in (("fp8", torch.uint8), ("bf16", torch.bfloat16), ("fp64", torch.float64)):
        weight = torch.zeros(R, C, dtype=dtype)
        block = min(8, 16 // weight.element_size())
        for kind, index, step in (("single", cols, 1), ("blocks", cols[::block] // block, block)):
            out = torch.zeros(ROWS, COLS, dtype=dtype)
            word = WORDS[min(8, step * out.element_size())]  # counted by the size of what is accessed
            with counting(kept=weight.view(word), out=out.view(word), rows=rows, cols=index) as counts:
                k.gather_channels_(out, weight, rows, index, step)
            counts["kept"][2] = out.nbytes
            report[f"{kind} {name}"] = counts
        out = torch.zeros(ROWS, C, dtype=dtype)
        with counting(kept=weight.view(torch.int64), out=out.view(torch.int64), rows=rows) as counts:
            k.gather_channels_(out, weight, rows, None, 1)
        counts["kept"][2] = out.nbytes
        report[f"rows {name}"] = counts
    return report
