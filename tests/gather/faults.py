"""Every fault that a test plants in gather's kernels, by the check that must see it."""

from tools.faults import Fault

UNIT = "gather/cuda/gather.cu"
KERNEL = "gather/cuda/kernels.cuh"
NOT_TOGETHER = Fault(  # where a row lies depends on what the row before it holds
    KERNEL,
    "load16<true>(source + kept * shape.source.row_stride)",
    "load16<true>(source + kept * shape.source.row_stride + (r > 0 && words[r > 0 ? r - 1 : 0].x == 77u))",
)
CUDA_ARTIFACTS = {  # name: faults in the source, compiler flags, what the gate says
    "scalar loads": ((Fault(KERNEL, "  if (is_run) {", "  if (false) {"),), (), r" 0 128-bit loads"),
    "scalar stores": (
        (
            Fault(
                KERNEL,
                "      if (whole) {\n        store16(to, gather",
                "      if (false) {\n        store16(to, gather",
            ),
            Fault(
                KERNEL,
                "      if (whole) {\n        store16(to, words",
                "      if (false) {\n        store16(to, words",
            ),
            Fault(KERNEL, "for (; whole && row", "for (; false && row"),
        ),
        (),
        r" 0 128-bit stores",
    ),
    "words stored one by one": (
        (
            Fault(
                KERNEL,
                "        store16(to, gather_pack<T>(value[r]));\n",
                "        const uint4 words = gather_pack<T>(value[r]);\n"
                "        uint32_t* const parts = reinterpret_cast<uint32_t*>(to);\n"
                "        store_scalar(parts, words.x), store_scalar(parts + 1, words.y);\n"
                "        store_scalar(parts + 2, words.z), store_scalar(parts + 3, words.w);\n",
            ),
        ),
        (),
        "narrow stores",
    ),
    "loads one by one": ((NOT_TOGETHER,), (), r" [123] loads together"),
    "local memory": (  # indexed by what the compiler cannot know
        (Fault(KERNEL, "gather_pack<T>(value[r])", "gather_pack<T>(value[rows % kRows])"),),
        (),
        "spills",
    ),
    "rows of bytes that wait together": (
        (Fault(KERNEL, "sizeof(T) < 4   ? 1", "sizeof(T) < 4   ? 4"),),
        (),
        "spills|registers",
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
        Fault(KERNEL, "end - row < kRows ? static_cast<int>(end - row) : kRows", "kRows"),
        "load outside of the allowed regions",
    ),
    "scalar loads": ("run traffic", Fault(KERNEL, "  if (is_run) {", "  if (false) {"), "narrow"),
    "rows of a run beyond the last": (
        "run bounds",
        Fault(KERNEL, "row + kRuns <= end", "row <= end"),
        "load outside of the allowed regions",
    ),
    "words in another order": (
        "words",
        Fault(KERNEL, "<< 8 * sizeof(T) * (i", "<< 8 * sizeof(T) * (kPerWord - 1 - i"),
        "elements differ",
    ),
    "joined leads": (
        "leads",
        Fault(UNIT, "next.out_stride == out.back().size * out.back().out_stride", "true"),
        "elements differ",
    ),
}

TRITON = "gather/kernel_triton.py"
TRITON_ARTIFACTS = {  # name: launches, faults, what the gate says
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
