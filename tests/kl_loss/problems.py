"""Inputs for the kl_loss tests, and the rule by which results are judged."""

import dataclasses
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from minitron_kernels import _native
from minitron_kernels.ops.kl_loss import linear_cpu, plan_cpu
from minitron_kernels.ops.kl_loss.plan import grad_dtype

# Whether this CPU and libtorch multiply bf16 operands as they are (AVX512_BF16, AMX).
HAS_BF16 = bool(_native.build_info().get("bf16_microkernel"))
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# What rounding the operands and results to a dtype may cost a gradient (Frobenius, relative).
GRADIENT_BOUND = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-3,
    torch.float16: 3e-3,
}
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


def to_numpy(*tensors):
    """float64 copies; None stays None."""
    return [None if x is None else x.detach().double().numpy() for x in tensors]


def relative(actual, truth):
    """||actual - truth|| / ||truth||."""
    return float(
        np.linalg.norm(actual.detach().double().numpy() - truth) / max(np.linalg.norm(truth), 1e-300)
    )


def assert_gradient(actual, truth, dtype, *, probability_norm):
    """Within GRADIENT_BOUND of the truth, plus 4 ulps of the probabilities that are subtracted to make it."""
    error = np.linalg.norm(actual.detach().double().numpy() - truth)
    ulp = 2.0**-52 if dtype == torch.float64 else 2.0**-23
    allowed = GRADIENT_BOUND[dtype] * np.linalg.norm(truth) + 4 * ulp * probability_norm
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}, truth {np.linalg.norm(truth):.3g}"


def make_linear(N, H, Ht, V, dtype, *, distance=3.0, seed=0):
    """Student hidden and head, teacher hidden and head; distance is the spread of the logits' difference.

    The teacher sees what the student sees and Ht - H channels more; distance 0.05 gives a KL of about 1e-3.
    """
    g = torch.Generator().manual_seed(seed)
    shared = max(1, min(H, Ht))
    hidden = torch.randn(N, max(H, Ht), generator=g)
    head = torch.randn(V, max(H, Ht), generator=g) * 2.5 / shared**0.5
    if max(H, Ht) > shared:
        head[:, shared:] *= distance / 2.5 * 0.5
    student_head = head[:, :H] + torch.randn(V, H, generator=g) * distance / max(1, H) ** 0.5
    return [x.to(dtype) for x in (hidden[:, :H], student_head, hidden[:, :Ht], head[:, :Ht])]


def make_rows(N, V, dtype, *, distance=1.0, rising=False, seed=0):
    """Student and teacher logits; rising: every block of the vocabulary raises the running maximum."""
    g = torch.Generator().manual_seed(seed)
    teacher = torch.randn(N, V, generator=g) * 2
    if rising:
        teacher = teacher + torch.linspace(-30, 30, V)
    student = teacher + torch.randn(N, V, generator=g) * distance
    return student.to(dtype), teacher.to(dtype)


def force_operands(monkeypatch, kind):
    """linear_kl_loss packs operands as bf16 or f32, or uses a portable GEMM, whatever this CPU prefers."""
    if kind == "bf16" and not HAS_BF16:
        pytest.skip("the bf16 microkernel needs a CPU with AVX512_BF16 or AMX")
    if kind in ("amx", "avx512_bf16") and (why := torch.ops.minitron_kernels.why_no_engine(kind)):
        pytest.skip(f"the kernels for {kind} cannot run here: {why}")
    if kind is not None:
        for module in (linear_cpu, plan_cpu):
            monkeypatch.setattr(module, "operand_type", lambda *dtypes: kind)


def force_plan(monkeypatch, **numbers):
    """linear_kl_loss takes these numbers of LinearKLPlan, whatever the planner chose; returns the plans made.

    `stored_tiles` only with schedule "store", and no more tiles than there are.
    """
    made = []
    real = plan_cpu.plan

    def planned(N, V, H, Ht, **options):
        own = real(N, V, H, Ht, **options)
        forced = dict(numbers)
        tiles = -(-V // forced.get("tile", own.tile))
        stored = min(forced.get("stored_tiles", tiles), tiles)
        forced["stored_tiles"] = stored if own.schedule == "store" else 0
        p = dataclasses.replace(own, **forced)
        dtype = grad_dtype(options["dtype"])
        *parts, _ = torch.ops.minitron_kernels.linear_kl_loss_layout(
            N, V, H, Ht, max(dtype.itemsize, 4),
            options["grad_hidden"], options["grad_head"],
            options["grad_head_accumulator"] or dtype != torch.bfloat16,
            p.numbers, options.get("metrics", False),
            options.get("outcomes", 0),
        )  # fmt: skip
        made.append(dataclasses.replace(p, part_bytes=tuple(parts)))
        return made[-1]

    monkeypatch.setattr(linear_cpu, "plan", planned)
    return made


@contextmanager
def threads(count):
    """torch on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_no_worse(actual, baseline, truth, *, floor):
    """The error is at most twice PyTorch's own in that dtype, or within `floor` (relative) of the truth."""
    error, allowed = relative(actual, truth), max(2 * relative(baseline, truth), floor)
    assert error <= allowed, f"relative error {error:.3g}, allowed {allowed:.3g}"
