"""Faults planted in kl_loss's kernels, by the check that must see them: machine code, recompilations."""

from tools.faults import Fault

UNIT = "kl_loss/cuda/rows.cu"
ALIGNED_LOAD = (
    "  if (aligned) {\n#pragma unroll\n    for (int i = 0; i < N; i += kPerAccess) {\n      const uint4 v"
)
CUDA_ARTIFACTS = {  # name: faults in the source, compiler flags, what the gate says
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

TRITON_ARTIFACTS = {  # name: launches, faults, what the gate says
    "none": ("rows forward bf16", (), None),
    "spills": (
        "linear forward bf16",
        (Fault("kl_loss/kernel_triton/linear.py", "KEEP_EXP=False", "KEEP_EXP=True"),),
        "spilled registers",
    ),
    "no tensor cores": (
        "linear forward bf16",
        (
            Fault(
                "kl_loss/kernel_triton/linear.py",
                "tl.dot(x, tl.trans(w), z)",
                'tl.dot(x.to(tl.float32), tl.trans(w).to(tl.float32), z, input_precision="ieee")',
            ),
            Fault(
                "kl_loss/kernel_triton/launch.py",
                "return LinearBlocks(128, 128) if generation in (9, 10)",
                "return LinearBlocks(32, 32) if generation in (9, 10)",
            ),
        ),
        "no HGMMA",
    ),
    "scalar accesses": (
        "grad forward bf16",
        (Fault("kl_loss/kernel_triton/rows.py", '["stride_mn", "stride_wn"]', '["stride_mn", "stride_sn"]'),),
        "wide_loads 2, at least",
    ),
    "registers": (
        "rows forward bf16",
        (Fault("kl_loss/kernel_triton/launch.py", "block // 512", "block // 2048"),),
        "registers",
    ),
}

TRITON_RECOMPILES = [  # fault, the kernels that are then compiled anew
    (
        Fault("kl_loss/kernel_triton/rows.py", '["stride_mn", "stride_state"]', '["stride_mn"]'),
        {"tile_stats_kernel"},
    ),
    (
        Fault("kl_loss/kernel_triton/rows.py", 'PER_ROW = ("mask_ptr", ', "PER_ROW = ("),
        {"forward_kernel", "grad_kernel"},
    ),
]
