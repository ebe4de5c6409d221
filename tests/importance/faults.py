"""Faults planted in importance's kernels, by the check that must see them: machine code, recompilations."""

from tools.faults import Fault

UNIT = "importance/cuda/importance.cu"
KERNELS = "importance/cuda/kernels.cuh"
CUDA_ARTIFACTS = {  # name: faults in the source, compiler flags, what the gate says
    "none": ((), (), None),
    "registers for too many blocks": (
        (Fault(KERNELS, "kPieceBlocksPerSM = 3;", "kPieceBlocksPerSM = 8;"),),
        (),
        "importance_pieces_kernel.*spills",
    ),
    "scalar loads": (
        (Fault(KERNELS, "    if (aligned) {\n      if (wanted", "    if (false) {\n      if (wanted"),),
        (),
        r"importance_pieces_kernel.* 0 128-bit loads",
    ),
    "scalar stores": (
        (Fault(KERNELS, "store_run(token + first, true, v)", "store_run(token + first, false, v)"),),
        (),
        r"importance_pieces_kernel.* 0 128-bit stores",
    ),
    "more shared memory": (
        (Fault(KERNELS, "kMostTokens = 512;", "kMostTokens = 1024;"),),
        (),
        "1024 bytes of shared memory|2048 bytes of shared memory",
    ),
}

TRITON = "importance/kernel_triton.py"
TRITON_ARTIFACTS = {  # name: launches, faults, what the gate says
    "none": ("moments bf16 1", (), None),
    "scalar loads": (
        "moments bf16 1",
        (Fault(TRITON, '["B", "S", "C_blocks", "slots",', '["B", "S", "C_blocks", "stride_t", "slots",'),),
        "importance_pieces_kernel: wide_loads 0, at least",
    ),
    "registers": (
        "moments bf16 7",
        (Fault(TRITON, "num_warps=max(1, block * x.element_size() // 512)", "num_warps=1"),),
        "importance_pieces_kernel: (registers|.*spilled)",
    ),
    "spills": (
        "moments bf16 7",
        (Fault(TRITON, "BLOCK_T=8,", "BLOCK_T=32,"),),
        "importance_pieces_kernel: .*spilled registers",
    ),
}

TRITON_RECOMPILES = [  # fault, the kernels that are then compiled anew
    (
        Fault(TRITON, '["B", "S", "C_blocks", "slots",', '["B", "C_blocks", "slots",'),
        {"importance_pieces_kernel"},
    ),
    (Fault(TRITON, '["N", "S", "heads"]', '["N", "heads"]'), {"importance_rows_kernel"}),
    (
        Fault(TRITON, 'BY_TOKEN = ("mask_ptr", "cu', 'BY_TOKEN = ("cu_seqlens_ptr", "cu'),
        {"importance_pieces_kernel", "importance_rows_kernel"},
    ),
]
