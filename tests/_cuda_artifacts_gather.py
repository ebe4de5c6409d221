"""Faults in gather's CUDA sources that the gates of test_cuda_artifacts.py must see."""

from _faults import Fault

UNIT = "gather/cuda/gather.cu"
KERNEL = "gather/cuda/kernels.cuh"
FAULTS = {  # name: faults in the source, compiler flags, what the gate says
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
