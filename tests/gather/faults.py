"""Every fault that a test plants in gather's kernels, by the check that must see it."""

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

# test_cuda.py::test_planted_fault_is_found plants them: name: (check, fault, what the failure says)
CUDA = {
    "neighbours are not looked at": (
        "sorted",
        Fault(KERNEL, " && offset[i] == offset[0] + i;", ";"),
        "elements differ",
    ),
    "runs at any address": (
        "unaligned run",
        Fault(KERNEL, "  is_run = is_run && offset[0] % kVec == 0;\n", ""),
        "misaligned 16-byte access",
    ),
    "whole vectors at the end": (
        "bounds",
        Fault(KERNEL, "whole = count == kVec && ", "whole = "),
        "elsewhere|outside|misaligned",
    ),
    "rows beyond the last": (
        "bounds",
        Fault(KERNEL, "end - begin < kRows ? static_cast<int>(end - begin) : kRows", "kRows"),
        "load outside of the allowed regions",
    ),
    "scalar loads": ("run traffic", Fault(KERNEL, "      if (is_run) {", "      if (false) {"), "narrow"),
    "joined leads": (
        "leads",
        Fault(UNIT, "next.out_stride == out.back().size * out.back().out_stride", "true"),
        "elements differ",
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

# test_triton.py::test_planted_fault_is_found plants them: name: (cases by -k, fault, what the output says)
TRITON_VALUES = {
    "a load without its mask": (
        "lengths and sorted and dtype1",
        Fault(TRITON, "tl.load(source_ptr + at, mask=inside)", "tl.load(source_ptr + at)"),
        r"KernelFault.*reads \d+ element",
    ),
    "a store without its mask": (
        "lengths and sorted and dtype1",
        Fault(TRITON, "tl.store(out_ptr + at, value, mask=inside)", "tl.store(out_ptr + at, value)"),
        r"KernelFault.*writes \d+ element",
    ),
    "programs that write one address": (
        "lengths and sorted and dtype1",
        Fault(TRITON, "offs_r = (pid // blocks % runs)", "offs_r = (pid // blocks % runs // 2)"),
        "KernelFault.*race|KernelFault.*program|elements differ",
    ),
    "batch dims in the wrong order": (
        "strides and dtype0",
        Fault(TRITON, "b1, b2 = matrix // size_b2 // size_b1, matrix // size_b2 % size_b1, matrix % size_b2",
              "b2, b1 = matrix // size_b2 // size_b1, matrix // size_b2 % size_b1, matrix % size_b2"),
        "elements differ|KernelFault",
    ),
    "blocks that are not narrowed": (
        "blocks and dtype7",
        Fault(TRITON, "cols = _narrowed(cols, block_bytes // group_bytes)\n", "cols = _narrowed(cols, 1)\n"),
        "elements differ|KernelFault",
    ),
    "words from anywhere": (
        "blocks and dtype7",
        Fault(TRITON, " and all(stride % size == 0 for stride in strides)", " and len(list(strides)) >= 0"),
        "elements differ|KernelFault|RuntimeError",
    ),
}  # fmt: skip

# test_triton.py::test_planted_extra_pass_is_found plants it
TRITON_TRAFFIC = Fault(
    TRITON,
    "    out_step = GROUP if OUT_DENSE else out_g\n",
    "    out_step = GROUP if OUT_DENSE else out_g\n"
    "    tl.load(source_ptr + source_row[:, None], mask=(offs_r < row_count)[:, None])\n",
)
