"""Launches of kl_loss's Triton kernels, for the tools that look at them without a GPU.

tools/offline_triton.py compiles them for GPUs that are not here, tools/triton_traffic.py counts their bytes,
tools/triton_recompiles.py sees whether another size compiles anew.
"""

import functools

import torch

from kl_loss.cases import PLAIN, Kernels, linear, matmul_fp32
from minitron_kernels.ops.kl_loss import gemm_gpu
from minitron_kernels.ops.kl_loss.divergence import (
    NUM_METRIC_STATE,
    NUM_METRICS,
    NUM_STATE,
    NUM_STATS,
    NUM_SUMS,
)
from minitron_kernels.ops.kl_loss.epilogues import triton_epilogues
from minitron_kernels.ops.kl_loss.kernel_triton import launch as k
from minitron_kernels.ops.kl_loss.kernel_triton import launch_linear as linear_k
from minitron_kernels.ops.kl_loss.kernel_triton import launch_student as student_k
from minitron_kernels.ops.kl_loss.kernel_triton import scale
from minitron_kernels.ops.kl_loss.operands import TokenMetrics


def to_compile(target_name):
    """(name, call) of every kernel, dtype and divergence."""
    N, V, H, HT = 8192, 131072, 4096, 5120
    DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    BETAS = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def options(beta, cap=0.0, inv_tau=0.5, smoothing=0.0):
        return (beta, inv_tau, 1.0, cap, 1.0, cap, smoothing)

    # reverse KL is forward KL with the two sides swapped: compiled for one target
    kinds = BETAS if target_name == "sm_90" else ("forward", "jsd")
    linear_k.processors = lambda device: 132
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
        add(f"finish_stats {kind}", linear_k.finish_stats, empty(4, 5, N), None, loss, stats, options(beta))
        for name, dtype in DTYPES.items():
            if name == "fp32":
                continue  # served by the vendor's GEMM and the epilogues on tiles
            student = (empty(N, H, dtype=dtype), empty(V, H, dtype=dtype), None)
            teacher = (empty(N, HT, dtype=dtype), empty(V, HT, dtype=dtype), None)
            add(
                f"linear {kind} {name}",
                linear_k.linear_stats,
                student,
                teacher,
                None,
                loss,
                stats,
                V,
                options(beta),
            )
    for name, dtype in DTYPES.items():
        add(f"scale {name}", scale.scale_grad_, empty(V, H, dtype=dtype), empty())
    capped = (empty(N, V), empty(N, V), empty(V), empty(V))
    mask = empty(N, dtype=torch.bool)
    add("rows forward capped masked", k.forward, capped, mask, loss, stats, V, options(0.0, 30.0))
    add("grad forward capped masked", k.grad, capped, mask, loss, stats, empty(N, V), V, options(0.0, 30.0))
    add("tile_mixture jsd", k.tile_mixture, tile, None, stats, empty(2, N), False, options(0.5))
    add("finish_mixture jsd", linear_k.finish_mixture, empty(4, 2, N), None, loss, stats, options(0.5))
    out += with_metrics(N, V, H, HT, empty, options)
    tile, dz = empty(N, 8192), empty(N, 8192, dtype=torch.bfloat16)
    add("student stats", student_k.student_stats, tile, None, None, empty(2, N), False, options(0.0))
    add("student grad", student_k.student_grad, tile, None, None, loss, loss, dz, 8192, options(0.0))
    return out


def with_metrics(N, V, H, HT, empty, options):
    """The kernels that also make metrics: at temperature 1, and with all that is optional."""
    bf16, out = torch.bfloat16, []
    labels, metrics, loss, stats = empty(N, dtype=torch.int64), empty(N, 4), empty(N), empty(N, 6)
    logits = (*(empty(N, V, dtype=bf16) for _ in range(2)), None, None)
    tile, dz = (empty(N, 8192), empty(N, 8192), None, None), empty(N, 8192, dtype=bf16)
    sides = [(empty(N, width, dtype=bf16), empty(V, width, dtype=bf16), None) for width in (H, HT)]
    for name, numbers in (
        ("at one with metrics", options(0.0, inv_tau=1.0)),
        ("smoothed with metrics", options(0.0, smoothing=0.1)),
    ):
        rest = {"options": numbers, "labels": labels}
        of_ce = {**rest, "metrics": metrics, "ce_weight": loss}
        of_tile = {"first_token": 8192, "total_vocab": V}
        state, of_state = empty(5, N), {"metric_state": empty(4, N), "first_token": 8192}
        states, of_states = empty(4, 5, N), {"metric_states": empty(4, 4, N), "total_vocab": V}
        out += [
            (
                f"{kernel} {name}",
                functools.partial(call, *arguments, **more),
            )
            for kernel, call, arguments, more in (
                ("rows", k.forward, (logits, None, loss, stats, V), {**rest, "metrics": metrics}),
                ("grad", k.grad, (logits, None, loss, stats, empty(N, V, dtype=bf16), V), of_ce),
                (
                    "dz",
                    k.grad,
                    (tile, None, loss, stats, dz, 8192),
                    {**of_ce, **of_tile},
                ),
                ("tile_stats", k.tile_stats, (tile, None, state, False), {**rest, **of_state}),
                (
                    "finish_stats",
                    linear_k.finish_stats,
                    (states, None, loss, stats),
                    {**rest, **of_states, "metrics": metrics},
                ),
                (
                    "linear",
                    linear_k.linear_stats,
                    (*sides, None, loss, stats, V),
                    {**rest, "metrics": metrics},
                ),
                (
                    "student stats",
                    student_k.student_stats,
                    (tile[0], None, None, empty(2, N), False),
                    {**rest, **of_state},
                ),
                (
                    "student grad",
                    student_k.student_grad,
                    (tile[0], None, None, loss, loss, dz, 8192),
                    {**rest, "lse_y": loss, "ce_weight": loss, **of_tile},
                ),
            )
        ]
    return out


def measure(counting):
    """Bytes of each tensor that each kernel moves, at shapes small enough for the interpreter."""
    ROWS, VOCAB = 3, 512
    k.FORWARD_BLOCK = k.GRAD_BLOCK = 256
    linear_k.processors = lambda device: 2
    report = {}
    loss, stats, weight = torch.zeros(ROWS), torch.zeros(ROWS, NUM_STATS), torch.ones(ROWS)
    for beta, kind in ((0.0, "forward"), (1.0, "reverse"), (0.5, "jsd")):
        options = (beta, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0)
        for student_dtype, teacher_dtype in (
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
        ):
            student = torch.randn(ROWS, VOCAB).to(student_dtype)
            teacher = torch.randn(ROWS, VOCAB).to(teacher_dtype)
            logits, grad = (student, teacher, None, None), torch.zeros_like(student)
            name = f"{kind} {student.element_size()} {teacher.element_size()}"
            with counting(student=student, teacher=teacher, loss=loss, stats=stats) as report[f"rows {name}"]:
                k.forward(logits, None, loss, stats, VOCAB, options)
            with counting(student=student, teacher=teacher, weight=weight, stats=stats, grad=grad) as counts:
                k.grad(logits, None, weight, stats, grad, VOCAB, options)
            report[f"grad {name}"] = counts
        student, teacher = torch.randn(ROWS, VOCAB), torch.randn(ROWS, VOCAB)
        state, sums = torch.zeros(NUM_STATE, ROWS), torch.zeros(NUM_SUMS, ROWS)
        logits = (student, teacher, None, None)
        with counting(student=student, teacher=teacher, state=state) as report[f"tile_stats {kind}"]:
            k.tile_stats(logits, None, state, False, options)
        if kind == "jsd":
            with counting(student=student, teacher=teacher, stats=stats, sums=sums) as counts:
                k.tile_mixture(logits, None, stats, sums, False, options)
            report["tile_mixture jsd"] = counts
    measure_metrics(counting, report)
    scale.BLOCK = 256
    for name, value in (("scale", 0.5), ("scale by one", 1.0)):
        for dtype in (torch.float32, torch.bfloat16):
            grad, factor = torch.randn(2 * 256 + 9).to(dtype), torch.tensor(value)
            with counting(grad=grad, factor=factor) as report[f"{name} {grad.element_size()}"]:
                scale.scale_grad_(grad, factor)
    return report


def measure_metrics(counting, report):
    """The same with metrics and the gradient of a cross-entropy; all that a row has is in use."""
    ROWS, VOCAB = 3, 512
    student, teacher = torch.randn(ROWS, VOCAB).bfloat16(), torch.randn(ROWS, VOCAB)
    loss, stats, weight, ce_weight = (torch.zeros(ROWS, *more) for more in ((), (NUM_STATS,), (), ()))
    metrics, metric_state = torch.zeros(ROWS, NUM_METRICS), torch.zeros(NUM_METRIC_STATE, ROWS)
    grad, state, labels = torch.zeros_like(student), torch.zeros(NUM_STATE, ROWS), torch.tensor([0, 300, 511])
    options, logits = (0.0, 0.5, 1.0, 0.0, 1.0, 0.0, 0.1), (student, teacher, None, None)
    read = {"student": student, "teacher": teacher, "labels": labels}
    with counting(**read, loss=loss, stats=stats, metrics=metrics) as report["metrics rows"]:
        k.forward(logits, None, loss, stats, VOCAB, options, labels, metrics)
    of_row = {"weight": weight, "ce_weight": ce_weight, "stats": stats, "metrics": metrics}
    with counting(**read, **of_row, grad=grad) as report["metrics grad"]:
        k.grad(logits, None, weight, stats, grad, VOCAB, options, labels, metrics, ce_weight)
    with counting(**read, state=state, metric_state=metric_state) as report["metrics tile_stats"]:
        k.tile_stats(logits, None, state, False, options, labels, metric_state)
    bf16, lse_y, options = student, torch.zeros(ROWS), (0.0, 0.5, 1.0, 0.0, 1.0, 0.0, 0.1)
    state, read = torch.zeros(2, ROWS), {"student": bf16, "labels": labels}
    with counting(student=bf16, state=state) as report["student stats"]:
        student_k.student_stats(bf16, None, None, state, False, options)
    with counting(**read, state=state, metric_state=metric_state) as report["metrics student stats"]:
        student_k.student_stats(bf16, None, None, state, False, options, labels, metric_state)
    of_row = {"weight": weight, "lse": loss, "lse_y": lse_y, "ce_weight": ce_weight}
    for name, more in (("student grad", ()), ("metrics student grad", (labels, lse_y, ce_weight))):
        with counting(**read, **of_row, grad=grad) as report[name]:
            student_k.student_grad(bf16, None, None, weight, loss, grad, VOCAB, options, *more)


# of inputs that differ in size alone: the first is what the others are compared with
SIZES = (128, 1, 2, 16, 33, 500, 777)
KERNELS = {
    "forward_kernel",
    "grad_kernel",
    "tile_stats_kernel",
    "tile_mixture_kernel",
    "finish_stats_kernel",
    "finish_mixture_kernel",
    "linear_kernel",
    "scale_grad_kernel",
    "student_stats_kernel",
    "student_grad_kernel",
}


def launch(rows):
    """Every launch of a training step by either schedule, of an evaluation, and of kl_loss."""
    VOCAB, H, HT = 12288, 64, 96  # two tiles
    BUDGET = {"store": 200 * 10 * VOCAB, "recompute": 1 << 29}  # store: chunks of 200 rows

    gemm_gpu.matmul = matmul_fp32
    linear_k.processors = lambda device: 132
    forward, backward = k.kl_loss_forward, k.kl_loss_backward
    kernels = Kernels("triton", "cpu", forward, backward, triton_epilogues())
    mask, labels = torch.ones(rows, dtype=torch.bool), torch.zeros(rows, dtype=torch.int64)
    tensors = [torch.zeros(size, width, dtype=torch.bfloat16) for width in (H, HT) for size in (rows, VOCAB)]
    for beta in (0.0, 0.5):
        for schedule, budget in BUDGET.items():
            weight = torch.ones(rows)
            run = {"beta": beta, "mask": mask, "row_weight": weight, "schedule": schedule, "budget": budget}
            linear(kernels, tensors, **run)
            of_tokens = TokenMetrics(labels, torch.zeros(rows, NUM_METRICS), weight)
            linear(kernels, tensors, of_tokens=of_tokens, **run)
        run = {"beta": beta, "mask": mask, "needs_grad": (False, False, False)}
        linear(kernels, tensors, **run)
        linear(kernels, tensors, of_tokens=of_tokens, **run)
        logits = [torch.zeros(rows, VOCAB, dtype=torch.bfloat16) for _ in range(2)]
        loss, stats = kernels.forward(*logits, mask, VOCAB, (beta, *PLAIN))
        kernels.backward(loss, stats, *logits, mask, VOCAB, (beta, *PLAIN))
    for begin in (0, 1):  # a chunk of rows starts anywhere
        tile, dz = torch.zeros(rows, 512), torch.zeros(rows, 512)
        state, metric_state = (torch.zeros(n, rows + begin)[:, begin:] for n in (2, NUM_METRIC_STATE))
        weight, lse, lse_y, ce_weight = (torch.zeros(rows + begin)[begin:] for _ in range(4))
        chunk, options = torch.zeros(rows + begin, dtype=torch.int64)[begin:], (0.0, 0.5, *PLAIN[1:])
        for of_state, of_ce in (((), ()), ((chunk, metric_state), (chunk, lse_y, ce_weight))):
            student_k.student_stats(tile, None, mask, state, False, options, *of_state)
            student_k.student_grad(tile, None, mask, weight, lse, dz, 512, options, *of_ce)
    scale.scale_grad_(torch.zeros(7 * rows, dtype=torch.bfloat16), torch.zeros(()))
