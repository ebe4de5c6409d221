"""Faults in importance's CUDA sources that the gates of test_cuda_artifacts.py must see."""

from _faults import Fault

UNIT = "importance/cuda/importance.cu"
KERNELS = "importance/cuda/kernels.cuh"
FAULTS = {  # name: faults in the source, compiler flags, what the gate says
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
