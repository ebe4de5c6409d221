"""linear_kl_loss's CUDA kernels, run on the host by the shim: the cases of every backend through the whole
GPU schedule, its order of threads, scratch and reads; test_tiles_cuda.py has each kernel.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kl_loss.cases import *  # noqa: F403
from kl_loss.cases import BUDGET, CAPPED, DTYPES, H, N, V, linear, made_plans, numpy_of, problem, truth_of
from kl_loss.edge_cases import (
    EDGE_BETAS,
    check_biases_at_edges,
    check_dtypes_of_linear,
    check_evaluation_at_edges,
    check_training_at_edges,
)
from kl_loss.edges import TEMPERATURES, finite_rows
from kl_loss.shim_tiles import (  # noqa: F401
    BETAS,
    ORDERS,
    kernels_fixture,
    poisoned_memory_fixture,
    shim_fixture,
    without_cublas_fixture,
)
from minitron_kernels.ops.kl_loss import linear_gpu
from tools.host_shim import SANITIZE, assert_clean_under_sanitizers, missing_tool

pytestmark = pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))

aten = torch.ops.aten


@pytest.mark.parametrize("beta", BETAS)
def test_forward_only_schedule(kernels, beta):
    """No gradient wanted: tiles, for 16-bit operands too: no fused kernel. Masked rows hold NaN."""
    tensors = problem(kernels, torch.bfloat16)
    bias = torch.linspace(-9, 9, len(tensors[1]), dtype=torch.bfloat16)
    bias[:128] = -math.inf  # the first tile has no token
    mask = torch.ones(N, dtype=torch.bool)
    mask[3] = False
    tensors[0][3], tensors[2][3] = math.nan, math.nan
    setup = {"beta": beta, "options": CAPPED, "biases": (bias, bias)}
    nothing = {"needs_grad": (False, False, False), "mask": mask, "budget": BUDGET["recompute"]}
    loss, stats, *_ = linear(kernels, tensors, **setup, **nothing)
    assert loss[3] == 0 and (stats[3] == 0).all()
    truth = truth_of(tensors, **setup)[0]
    np.testing.assert_allclose(np.delete(numpy_of(loss), 3), np.delete(truth, 3), rtol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_order_of_threads_changes_no_bit(shim, kernels, beta):
    """Forwards, backwards and five shuffles, over every kernel of both schedules."""
    tensors = problem(kernels, torch.bfloat16)
    for schedule in ("store", "recompute"):
        results = []
        for order in ORDERS:
            with shim.order(order):
                results.append(
                    linear(kernels, tensors, beta=beta, schedule=schedule, budget=BUDGET[schedule])
                )
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", ["store", "recompute"])
@pytest.mark.parametrize("budget", [1 << 16, None])
@pytest.mark.parametrize("lent", [False, True])
def test_scratch_is_what_is_planned(kernels, monkeypatch, schedule, dtype, budget, lent):
    """Bytes of the logits, dz and fp32 sums that a call allocates: its plan has counted each of them."""
    plans, calls, live, most = made_plans(monkeypatch), [], {}, [0]
    init, add = linear_gpu.Call.__init__, linear_gpu.GradientSum.add

    def begin(self, *arguments):
        init(self, *arguments)
        calls.append(self)

    def added(self, *operands):
        if self.sum is None:
            live[id(self)] = self, 4 * self.out.numel()
            most[0] = max(most[0], sum(nbytes for _, nbytes in live.values()))
        add(self, *operands)
        if self.missing == 0:
            live.pop(id(self), None)

    monkeypatch.setattr(linear_gpu.Call, "__init__", begin)
    monkeypatch.setattr(linear_gpu.GradientSum, "add", added)
    tensors, budget = problem(kernels, dtype), budget or BUDGET[schedule]
    accumulator = torch.zeros(V, H) if lent else None
    linear(kernels, tensors, schedule=schedule, budget=budget, accumulator=accumulator)
    (plan,) = plans
    logits, dz, *sums = plan.part_bytes
    assert sum(x.nbytes for x in calls[0].buffers.values()) == logits + dz
    assert 0.9 * sum(sums) <= most[0] <= sum(sums)  # the last group of rows may be smaller
    assert plan.workspace_bytes <= budget


@pytest.mark.parametrize("schedule", ["store", "recompute"])
def test_half_precision_rows_do_not_share_their_fate(kernels, schedule):
    """Reverse KL in fp16: a row of infinite loss, or one that does not count and has any weight, leaves the
    hidden gradients of the others as they are.
    """
    tensors = problem(kernels, torch.float16)
    setup = {
        "beta": 1.0,
        "schedule": schedule,
        "budget": BUDGET[schedule],
        "needs_grad": (True, False, False),
    }
    stats = linear(kernels, tensors, needs_grad=(False, False, False), beta=1.0)[1]
    expected = linear(kernels, tensors, stats=stats, **setup)[2]
    infinite = stats.clone()
    infinite[3, 5] = math.inf
    others = torch.arange(N) != 3
    found = linear(kernels, tensors, stats=infinite, **setup)[2]
    torch.testing.assert_close(found[others], expected[others], rtol=2e-3, atol=1e-4)
    for weight in (math.nan, math.inf, 1e30):
        weights = torch.where(others, 1.0, weight)
        found = linear(kernels, tensors, stats=stats, row_weight=weights, mask=others, **setup)[2]
        torch.testing.assert_close(found[others], expected[others], rtol=2e-3, atol=1e-4)
        assert (found[3] == 0).all()


@pytest.mark.parametrize(
    ("schedule", "dtype"), [("store", torch.float16), ("recompute", torch.bfloat16), ("store", torch.float32)]
)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("beta", EDGE_BETAS)
def test_linear_at_edges(kernels, beta, temperature, schedule, dtype):
    """Through tiles of the vocabulary or chunks of rows: evaluation, training, a loss per token."""
    edges = finite_rows(300, 128)
    stats = check_evaluation_at_edges(kernels, edges, beta, temperature, dtype)
    for known in (None, stats):
        check_training_at_edges(kernels, edges, beta, temperature, dtype, schedule, known)


@pytest.mark.parametrize("temperature", [0.005, 1.0])
@pytest.mark.parametrize("beta", BETAS)
def test_biases_at_edges(kernels, beta, temperature):
    check_biases_at_edges(kernels, 269, 128, beta, temperature)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("schedule", ["store", "recompute"])
def test_dtypes_of_linear(kernels, schedule, beta):
    """All 81 of four operands; gradients, and where it differs no gradient."""
    training = {"beta": beta, "schedule": schedule, "budget": 3 << 14}
    setups = (
        [training] if schedule == "store" else [training, training | {"needs_grad": (False, False, False)}]
    )
    check_dtypes_of_linear(kernels, itertools.product(DTYPES, repeat=4), setups)


class NoReadBack(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal):
            raise RuntimeError(f"{func} waits for the GPU")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needs_grad", [(True, True, True), (False, False, False)])
def test_nothing_is_read_back(kernels, needs_grad, dtype):
    """Shapes alone decide what is launched: nothing of a tensor's contents comes back to the host."""
    tensors, mask = problem(kernels, dtype), torch.arange(N) % 3 > 0
    weight = torch.full((), 1 / N)
    for schedule in ("store", "recompute"):
        setup = {
            "needs_grad": needs_grad,
            "mask": mask,
            "row_weight": weight,
            "beta": 0.3,
            "schedule": schedule,
        }
        with NoReadBack():
            linear(kernels, tensors, budget=BUDGET[schedule], **setup)
    with pytest.raises(RuntimeError, match="waits"), NoReadBack():
        int(mask.sum())


SANITIZED = "any_tiles or splits or rising_tiles or forward_only or bounds or bad_input or at_edges and 0.3"


@pytest.mark.skipif(SANITIZE, reason="this is the child")
def test_under_sanitizers():
    """Of this file and the tiles' one what comes near an edge, with the beta that all code is used by."""
    for name in ("test_linear_cuda.py", "test_tiles_cuda.py"):
        assert_clean_under_sanitizers(str(Path(__file__).with_name(name)), SANITIZED)
