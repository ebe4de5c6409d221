"""Faults in kl_loss's CUDA sources that the gates of test_cuda_artifacts.py must see."""

from _faults import Fault

UNIT = "kl_loss/cuda/rows.cu"
ALIGNED_LOAD = (
    "  if (aligned) {\n#pragma unroll\n    for (int i = 0; i < N; i += kPerAccess) {\n      const uint4 v"
)
FAULTS = {  # name: faults in the source, compiler flags, what the gate says
    "none": ((), (), None),
    "local memory": (  # indexed by what the compiler cannot know
        (
            Fault(
                "kl_loss/cuda/row_kernels.cuh",
                "  float value = state.loss();",
                "  float table[64] = {};\n#pragma unroll 1\n  for (int i = 0; i < 64; ++i)\n"
                "    table[options.vocab_size * i % 64] += float(i);\n"
                "  float value = state.loss() + table[blockDim.x % 64];",
            ),
        ),
        (),
        "spills",
    ),
    "scalar loads": (
        (Fault("common/cuda/vec.cuh", ALIGNED_LOAD, ALIGNED_LOAD.replace("(aligned)", "(false)")),),
        (),
        r" 0 128-bit loads",
    ),
    "spills": (  # twice as many logits as the registers hold
        (Fault("kl_loss/cuda/row_kernels.cuh", "kPairsAtOnce = 16;", "kPairsAtOnce = 32;"),),
        (),
        r"kl_forward_kernel.*spills",
    ),
    "more shared memory": (
        (Fault("common/cuda/reduce.cuh", "kMaxWarps = 32;", "kMaxWarps = 64;"),),
        (),
        "bytes of shared memory",
    ),
    "too many registers": (
        (Fault("kl_loss/cuda/row_kernels.cuh", "kGradBlocksPerSM = 3;", "kGradBlocksPerSM = 1;"),),
        ("-Xptxas=-O0",),
        "registers, at most",
    ),
}
