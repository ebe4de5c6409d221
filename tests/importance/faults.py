"""Every fault that a test plants in importance's kernels, by the check that must see it."""

from tools.faults import Fault

UNIT = "importance/cuda/importance.cu"
KERNELS = "importance/cuda/kernels.cuh"
CUDA_ARTIFACTS = {  # name: faults in the source, compiler flags, what the gate says
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

# test_cuda.py::test_planted_fault_is_found plants them: name: (check, fault, what the failure says)
CUDA = {
    "no weight in the merge": (
        "values",
        Fault(KERNELS, "delta * delta * (n * share)", "delta * delta * share"),
        "plane 3",
    ),
    "a piece is lost": (
        "values",
        Fault(KERNELS, "slot = first + warp; slot < end;", "slot = first + warp; slot < end - 1;"),
        "counts",
    ),
    "no barrier before the mask is used": (
        "orders",
        Fault(KERNELS, "    __syncthreads();\n  }\n", "  }\n"),
        "assert",
    ),
    "no barrier before the totals are added": (
        "orders",
        Fault(KERNELS, "= total;\n  __syncthreads();\n", "= total;\n"),
        "assert",
    ),
    "a token too many": (
        "bounds",
        Fault(KERNELS, "in[r] = t < end &&", "in[r] = t <= end &&"),
        "load outside of the allowed regions",
    ),
    "slots that collide": (
        "packed",
        Fault(KERNELS, "slot = packed ? piece + b : piece;", "slot = piece;"),
        "counts",
    ),
    "x twice": (
        "traffic",
        Fault(
            KERNELS,
            "        n += in[r];\n",
            "        n += in[r];\n        lane.load(x + t * tokens.stride_t, in[r]);\n",
        ),
        r"assert \(491520",
    ),
    "scalar loads": (
        "traffic",
        Fault(KERNELS, "    if (aligned) {\n      if (wanted", "    if (false) {\n      if (wanted"),
        r"narrow|assert \(245760, 122880\)",
    ),
    "norms that mix": (
        "row groups",
        Fault(KERNELS, "warp_reduce(sum, together, lanes)", "warp_reduce(sum, together, kWarpSize)"),
        "Not equal",
    ),
}

TRITON = "importance/kernel_triton.py"
TRITON_ARTIFACTS = {  # name: launches, faults, what the gate says
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

# test_triton.py::test_planted_fault_is_found plants them: name: (cases by -k, fault, what the output says)
TRITON_VALUES = {
    "no weight in the merge": (
        "test_long_pieces",
        Fault(TRITON, "delta * delta * (n_a * share)", "delta * delta * share"),
        "plane 3",
    ),
    "a piece is lost": (
        "test_long_pieces",
        Fault(TRITON, "end = first + pieces_per_sequence\n", "end = first + pieces_per_sequence - 1\n"),
        "counts",
    ),
    "a load without its mask": (
        "test_moments and shape1-dtype1",
        Fault(
            TRITON, "+ offs_c[None, :], mask=inside, other=0.0)\n        v", "+ offs_c[None, :])\n        v"
        ),
        r"KernelFault.*reads \d+ element",
    ),
    "padding is read": (
        "masked_tokens and 0",
        Fault(TRITON, "other=0) != 0\n        inside", "other=0) >= 0\n        inside"),
        "counts",
    ),
    "slots that collide": (
        "packed_sequences and False-0",
        Fault(TRITON, "begin, end, piece + b, slots", "begin, end, piece, slots"),
        "KernelFault|counts|plane",
    ),
    "programs that write one address": (
        "test_moments and shape2-dtype1",
        Fault(TRITON, "out = partial_ptr + slot * C + offs_c", "out = partial_ptr + slot // 2 * C + offs_c"),
        "KernelFault.*race|KernelFault.*program",
    ),
    "a slot that nobody wrote": (
        "packed_sequences and False-0",
        Fault(TRITON, "// piece_tokens + b + 1, first)", "// piece_tokens + b + 2, first)"),
        "counts|plane|KernelFault",
    ),
}

# test_triton.py::test_planted_extra_pass_is_found plants it
TRITON_TRAFFIC = Fault(
    TRITON,
    "        n = tl.sum(valid.to(tl.int32), 0)\n",
    "        n = tl.sum(valid.to(tl.int32), 0)\n"
    "        at = x_ptr + offs_t[:, None] * stride_t + offs_c[None, :]\n"
    "        v += 0.0 * tl.load(at, mask=inside, other=0.0).to(tl.float32)\n",
)
