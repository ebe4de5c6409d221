"""Launches of importance's Triton kernels for _triton_recompiles.py: batches and tokens of any number."""

import torch
from _faults import Fault

from minitron_kernels.ops.importance import kernel_triton

C, HEADS = 1024, 8
SIZES = ((2, 64), (1, 1), (1, 16), (3, 1), (3, 1037), (16, 33), (1, 5000))  # B, S
KERNELS = {"importance_pieces_kernel", "importance_finish_kernel", "importance_rows_kernel"}
FILE = "importance/kernel_triton.py"
FAULTS = [  # fault, the kernels that are then compiled anew
    (
        Fault(FILE, '["B", "S", "C_blocks", "slots",', '["B", "C_blocks", "slots",'),
        {"importance_pieces_kernel"},
    ),
    (Fault(FILE, '["N", "S", "heads"]', '["N", "heads"]'), {"importance_rows_kernel"}),
    (
        Fault(FILE, 'BY_TOKEN = ("mask_ptr", "cu', 'BY_TOKEN = ("cu_seqlens_ptr", "cu'),
        {"importance_pieces_kernel", "importance_rows_kernel"},
    ),
]


def launches(size):
    B, S = size
    x, borders = torch.zeros(B, S, C, dtype=torch.bfloat16), torch.tensor([0, B * S])
    start = S % 2  # a mask that is aligned for the first size, and for others not
    mask = torch.ones(B * S + start, dtype=torch.bool)[start:]
    for heads in (0, HEADS):
        kernel_triton.importance_moments(x, None, None, heads, 7)
        kernel_triton.importance_moments(x, mask.view(B, S), None, heads, 7)
        kernel_triton.importance_moments(x.view(-1, C), mask, borders, heads, 7)
    kernel_triton.importance_rows(x.view(-1, C), None)
    kernel_triton.importance_rows(x.view(-1, C), x.view(-1, C))
