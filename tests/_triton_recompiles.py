"""Which Triton kernels the calls of kl_loss and linear_kl_loss launch for a number of rows, on any machine.

Run as a script; prints JSON: {number of rows: [name and hash of each kernel]}.
"""

import json
import sys

import torch
from _kl_loss_cases import PLAIN, Kernels, linear, matmul_fp32
from _offline_triton import TARGETS, compiling_for

from minitron_kernels.ops.kl_loss import kernel_triton, linear_gpu
from minitron_kernels.ops.kl_loss.epilogues import triton_epilogues

VOCAB, H, HT = 12288, 64, 96  # two tiles
ROWS = (1, 2, 16, 33, 128, 500, 777)
BUDGET = {"store": 200 * 10 * VOCAB, "recompute": 1 << 29}  # store: chunks of 200 rows


def launches(rows):
    """Every launch of a training step by either schedule, of an evaluation, and of kl_loss."""
    kernels = Kernels(
        "cpu", kernel_triton.kl_loss_forward, kernel_triton.kl_loss_backward, triton_epilogues()
    )
    mask = torch.ones(rows, dtype=torch.bool)
    tensors = [torch.zeros(size, width, dtype=torch.bfloat16) for width in (H, HT) for size in (rows, VOCAB)]
    for beta in (0.0, 0.5):
        for schedule, budget in BUDGET.items():
            weight = torch.ones(rows)
            linear(
                kernels, tensors, beta=beta, mask=mask, row_weight=weight, schedule=schedule, budget=budget
            )
        linear(kernels, tensors, beta=beta, mask=mask, wants=(False, False, False))
        logits = [torch.zeros(rows, VOCAB, dtype=torch.bfloat16) for _ in range(2)]
        loss, stats = kernels.forward(*logits, mask, VOCAB, beta, *PLAIN)
        kernels.backward(loss, stats, *logits, mask, VOCAB, beta, *PLAIN)


def main():
    linear_gpu.matmul = matmul_fp32
    kernel_triton.processors = lambda device: 132
    found = {}
    for rows in ROWS:
        with compiling_for(TARGETS["sm_90"]) as compiled:
            launches(rows)
        found[rows] = sorted({f"{kernel.metadata.name} {kernel.hash}" for kernel in compiled})
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
