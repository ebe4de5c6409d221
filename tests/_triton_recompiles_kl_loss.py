"""Launches of kl_loss and linear_kl_loss for _triton_recompiles.py: rows of any number."""

import torch
from _faults import Fault
from _kl_loss_cases import PLAIN, Kernels, linear, matmul_fp32

from minitron_kernels.ops.kl_loss import kernel_triton, linear_gpu
from minitron_kernels.ops.kl_loss.epilogues import triton_epilogues

VOCAB, H, HT = 12288, 64, 96  # two tiles
# one row, even and odd numbers, several chunks: chunks that start anywhere
SIZES = (128, 1, 2, 16, 33, 500, 777)
BUDGET = {"store": 200 * 10 * VOCAB, "recompute": 1 << 29}  # store: chunks of 200 rows

KERNELS = {
    "forward_kernel",
    "grad_kernel",
    "tile_stats_kernel",
    "tile_mixture_kernel",
    "finish_stats_kernel",
    "finish_mixture_kernel",
    "linear_kernel",
}
FAULTS = [  # fault, the kernels that are then compiled anew
    (
        Fault("kl_loss/kernel_triton_rows.py", '["stride_mn", "stride_state"]', '["stride_mn"]'),
        {"tile_stats_kernel"},
    ),
    (
        Fault("kl_loss/kernel_triton_rows.py", 'PER_ROW = ("mask_ptr", ', "PER_ROW = ("),
        {"forward_kernel", "grad_kernel"},
    ),
]


def launches(rows):
    """Every launch of a training step by either schedule, of an evaluation, and of kl_loss."""
    linear_gpu.matmul = matmul_fp32
    kernel_triton.processors = lambda device: 132
    forward, backward = kernel_triton.kl_loss_forward, kernel_triton.kl_loss_backward
    kernels = Kernels("triton", "cpu", forward, backward, triton_epilogues())
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
