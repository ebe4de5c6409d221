"""Launches of kl_loss's Triton kernels for _offline_triton.py, and faults that the gates must see."""

import torch
from _faults import Fault

N, V, H, HT = 8192, 131072, 4096, 5120
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BETAS = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}


def cases(target_name):
    """(name, call) of every kernel, dtype and divergence."""
    from minitron_kernels.ops.kl_loss import kernel_triton as k

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def options(beta, cap=0.0):
        return (beta, 0.5, 1.0, cap, 1.0, cap)

    # reverse KL is forward KL with the two sides swapped: compiled for one target
    kinds = BETAS if target_name == "sm_90" else ("forward", "jsd")
    k.processors = lambda device: 132
    loss, stats = empty(N), empty(N, 6)
    out = []

    def add(name, call, *arguments):
        out.append((name, lambda: call(*arguments)))

    for kind, beta in ((kind, BETAS[kind]) for kind in kinds):
        pairs = [(name, name) for name in DTYPES] + [("bf16", "fp32")] * (kind == "forward")
        for student, teacher in pairs:
            logits = (empty(N, V, dtype=DTYPES[student]), empty(N, V, dtype=DTYPES[teacher]), None, None)
            name = f"{kind} {student} {teacher}" if student != teacher else f"{kind} {student}"
            add(f"rows {name}", k.forward, logits, None, loss, stats, V, options(beta))
            gradient = empty(N, V, dtype=DTYPES[student])
            add(f"grad {name}", k.grad, logits, None, loss, stats, gradient, V, options(beta))
        tile = (empty(N, 8192), empty(N, 8192), None, None)
        dz = empty(N, 8192, dtype=torch.bfloat16)
        add(f"dz {kind}", k.grad, tile, None, loss, stats, dz, 8192, options(beta))
        add(f"tile_stats {kind}", k.tile_stats, tile, None, empty(5, N), False, options(beta))
        add(f"finish_stats {kind}", k.finish_stats, empty(4, 5, N), None, loss, stats, options(beta))
        for name, dtype in DTYPES.items():
            if name == "fp32":
                continue  # served by the vendor's GEMM and the epilogues on tiles
            student = (empty(N, H, dtype=dtype), empty(V, H, dtype=dtype), None)
            teacher = (empty(N, HT, dtype=dtype), empty(V, HT, dtype=dtype), None)
            add(
                f"linear {kind} {name}", k.linear_stats, student, teacher, None, loss, stats, V, options(beta)
            )
    capped = (empty(N, V), empty(N, V), empty(V), empty(V))
    mask = empty(N, dtype=torch.bool)
    add("rows forward capped masked", k.forward, capped, mask, loss, stats, V, options(0.0, 30.0))
    add("grad forward capped masked", k.grad, capped, mask, loss, stats, empty(N, V), V, options(0.0, 30.0))
    add("tile_mixture jsd", k.tile_mixture, tile, None, stats, empty(2, N), False, options(0.5))
    add("finish_mixture jsd", k.finish_mixture, empty(4, 2, N), None, loss, stats, options(0.5))
    return out


FAULTS = {  # name: cases, fault, what the gate says
    "none": ("rows forward bf16", (), None),
    "spills": (
        "linear forward bf16",
        (Fault("kl_loss/kernel_triton_linear.py", "KEEP_EXP=False", "KEEP_EXP=True"),),
        "spilled registers",
    ),
    "no tensor cores": (
        "linear forward bf16",
        (
            Fault(
                "kl_loss/kernel_triton_linear.py",
                "tl.dot(x, tl.trans(w), z)",
                'tl.dot(x.to(tl.float32), tl.trans(w).to(tl.float32), z, input_precision="ieee")',
            ),
            Fault(
                "kl_loss/kernel_triton.py",
                "return LinearBlocks(128, 128) if generation in (9, 10)",
                "return LinearBlocks(32, 32) if generation in (9, 10)",
            ),
        ),
        "no HGMMA",
    ),
    "scalar accesses": (
        "grad forward bf16",
        (Fault("kl_loss/kernel_triton_rows.py", '["stride_mn", "stride_wn"]', '["stride_mn", "stride_sn"]'),),
        "wide_loads 2, at least",
    ),
    "registers": (
        "rows forward bf16",
        (Fault("kl_loss/kernel_triton.py", "block // 512", "block // 2048"),),
        "registers",
    ),
}
