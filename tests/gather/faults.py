"""Faults planted in gather's kernels, by the check that must see them: machine code, recompilations."""

from tools.faults import Fault

UNIT = "gather/cuda/gather.cu"
KERNEL = "gather/cuda/kernels.cuh"
CUDA_ARTIFACTS = {  # name: faults in the source, compiler flags, what the gate says
    "none": ((), (), None),
    "scalar loads": ((Fault(KERNEL, "      if (is_run) {", "      if (false) {"),), (), r" 0 128-bit loads"),
    "scalar stores": ((Fault(KERNEL, "      if (whole) {", "      if (false) {"),), (), r" 0 128-bit stores"),
    "local memory": (  # indexed by what the compiler cannot know
        (Fault(KERNEL, "memcpy(value[r], &words, 16);", "memcpy(value[rows % kRows], &words, 16);"),),
        (),
        "spills",
    ),
    "rows of bytes that wait together": (
        (Fault(KERNEL, "sizeof(T) >= 4 ? 4 : sizeof(T);", "4;"),),
        (),
        "spills",
    ),
}

TRITON = "gather/kernel_triton.py"
TRITON_ARTIFACTS = {  # name: launches, faults, what the gate says
    "none": ("both bf16", (), None),
    "scalar stores": (
        "both bf16",
        (Fault(TRITON, "    out_row = tl.multiple_of(out_row, OUT_ALIGN)\n", ""),),
        "wide_stores 0, at least",
    ),
    "registers": ("both fp8", (Fault(TRITON, "num_warps=4", "num_warps=1"),), "registers|spilled"),
}
