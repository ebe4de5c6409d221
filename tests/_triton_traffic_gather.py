"""Launches of gather's Triton kernel, for _triton_traffic.py to count."""

import torch

from minitron_kernels.ops.gather import kernel_triton as k

R, C, ROWS, COLS = 20, 256, 12, 192
WORDS = {1: torch.int8, 2: torch.int16, 8: torch.int64}


def measure(counting):
    """Single columns, blocks of 8, whole rows. `kept`: what is read of the weight, its size what is kept."""
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
