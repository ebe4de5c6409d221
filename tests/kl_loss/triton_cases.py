"""Tests of kl_loss's Triton kernels, written for device="cuda": the cases of every backend, and Triton's own.
Not collected by name: kl_loss/test_triton.py runs them on the CPU under ttsem (values, bounds, races,
uninitialised reads).

Blocks are shrunk, so that few small shapes have several blocks, tiles, splits and ragged ends.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import minitron_kernels as mk
from kl_loss import metric_cases, student_cases
from kl_loss.cases import *  # noqa: F403
from kl_loss.cases import (
    BETAS,
    BUDGET,
    CAPPED,
    DTYPES,
    INF,
    PADDED,
    Kernels,
    N,
    V,
    assert_near,
    linear,
    matmul_fp32,
    numpy_of,
    problem,
    rows,
    truth_of,
)
from kl_loss.edge_cases import (
    check_dtypes_of_linear,
    check_dtypes_of_rows,
    check_evaluation_at_edges,
    check_rows_at_edges,
    some,
)
from kl_loss.edges import finite_rows, masked_out_rows
from kl_loss.metric_cases import test_metrics_of_unknown_labels  # noqa: F401
from kl_loss.oracle import oracle_linear, oracle_rows
from kl_loss.problems import make_linear, make_rows
from kl_loss.scaling_cases import check as check_scaling
from kl_loss.student_cases import test_student_of_no_weight_and_nan  # noqa: F401
from minitron_kernels.ops.kl_loss import gemm_gpu
from minitron_kernels.ops.kl_loss.epilogues import triton_epilogues
from minitron_kernels.ops.kl_loss.kernel_triton import launch, launch_linear, launch_student, scale
from minitron_kernels.ops.kl_loss.operands import TokenMetrics


def triton_kernels():
    forward, backward = launch.kl_loss_forward, launch.kl_loss_backward
    metrics = launch.kl_loss_forward_metrics
    return Kernels("triton", "cuda", forward, backward, triton_epilogues(), metrics)


@pytest.fixture
def kernels():
    return triton_kernels()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(launch, "FORWARD_BLOCK", 128)
    monkeypatch.setattr(launch, "GRAD_BLOCK", 128)
    monkeypatch.setattr(launch_student, "STATS_BLOCK", 128)
    monkeypatch.setattr(launch_student, "GRAD_BLOCK", 128)
    monkeypatch.setattr(launch_linear, "FINISH_BLOCK", 32)
    blocks = launch_linear.LinearBlocks(16, 32, 32, 4, 2, group=2)
    monkeypatch.setattr(launch_linear, "linear_blocks", lambda *_: blocks)
    monkeypatch.setattr(launch_linear, "processors", lambda device: 12)
    monkeypatch.setattr(scale, "BLOCK", 128)
    monkeypatch.setattr(scale, "PROGRAMS", 3)
    if torch.version.cuda is None and torch.version.hip is None:
        monkeypatch.setattr(gemm_gpu, "matmul", matmul_fp32)


def test_no_float64(kernels):
    with pytest.raises((TypeError, RuntimeError), match="must be float32, bfloat16 or float16"):
        rows(kernels, torch.zeros(1, 4).double(), torch.zeros(1, 4).double())
    with pytest.raises(
        (TypeError, RuntimeError), match="teacher_logits must be float32, bfloat16 or float16"
    ):
        rows(kernels, torch.zeros(1, 4), torch.zeros(1, 4).double())


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("beta", BETAS)
def test_linear_fused_statistics(kernels, beta, dtype):
    """No gradient: fused kernel, several splits; and the same from tiles of logits."""
    tensors = problem(kernels, dtype, padded=PADDED)
    tensors[1][V:], tensors[3][V:] = math.nan, math.nan
    bias = torch.linspace(-9, 9, PADDED, device=kernels.device)
    bias[:64] = -INF  # the first split's tiles are empty
    mask = torch.tensor([True, False], device=kernels.device).repeat(N, 1)[:, 0]  # with a stride
    mask[3] = False
    tensors[0][3], tensors[2][3] = math.nan, math.nan
    setup = {"beta": beta, "options": CAPPED, "biases": (bias, bias * 0.5), "vocab_size": V}
    nothing = {"needs_grad": (False, False, False), "mask": mask}
    assert launch_linear.splits_for(N, V, launch_linear.linear_blocks(False), 12) == 2
    fused = linear(kernels, tensors, **setup, **nothing)
    unfused = replace(kernels.epilogues, linear_stats=None)
    tiled = linear(kernels, tensors, budget=BUDGET["recompute"], epilogues=unfused, **setup, **nothing)
    truth = truth_of(tensors, **setup)[0]
    for outputs in (fused, tiled):
        loss = numpy_of(outputs[0])
        assert loss[3] == 0 and (outputs[1][3] == 0).all()
        np.testing.assert_allclose(np.delete(loss, 3), np.delete(truth, 3), rtol=1e-5)
    torch.testing.assert_close(fused[1], tiled[1], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("beta", "width", "teacher_width"), [(0.0, 64, 96), (1.0, 64, 72), (0.3, 72, 64)])
def test_linear_fused_widths(kernels, beta, width, teacher_width):
    """Widths that are multiples of the block, on both sides or on one; each tensor a part of a wider one."""
    tensors = []
    for x in make_linear(33, width, teacher_width, 200, torch.bfloat16, distance=0.2):
        wide = torch.full((len(x), x.shape[1] + 8 * len(tensors) + 8), math.nan, dtype=x.dtype)
        wide[:, : x.shape[1]] = x
        tensors.append(wide.to(kernels.device)[:, : x.shape[1]])
    loss = linear(kernels, tensors, beta=beta, needs_grad=(False, False, False))[0]
    truth = oracle_linear(*map(numpy_of, tensors), beta=beta)[0]
    np.testing.assert_allclose(numpy_of(loss), truth, rtol=1e-5)


# Of the metrics too, a choice: which of tau, softcap, label smoothing and divergence meet.
@pytest.mark.parametrize(("beta", "setting"), [(0.0, "plain"), (1.0, "all smooth"), (0.3, "capped")])
def test_metrics_of_rows(kernels, beta, setting):
    metric_cases.test_metrics_of_rows(kernels, beta, setting)


def test_metrics_of_rows_in_16_bit(kernels):
    metric_cases.test_metrics_of_rows_in_16_bit(kernels, 0.0, torch.bfloat16)


def test_metrics_of_rows_that_do_not_count(kernels):
    metric_cases.test_metrics_of_rows_that_do_not_count(kernels, 1.0)


@pytest.mark.parametrize(("beta", "setting"), [(1.0, "plain"), (0.0, "warm"), (0.3, "smooth")])
def test_metrics_of_masked_out_tokens(kernels, beta, setting):
    metric_cases.test_metrics_of_masked_out_tokens(kernels, beta, setting)


@pytest.mark.parametrize(("beta", "setting"), [(0.0, "smooth"), (1.0, "capped")])
def test_metrics_of_tiles(kernels, beta, setting):
    metric_cases.test_metrics_of_tiles(kernels, beta, setting)


def test_metrics_of_whole_rows(kernels):
    metric_cases.test_metrics_of_whole_rows(kernels, 0.3, "smooth")


@pytest.mark.parametrize(
    ("schedule", "beta", "dtype"),
    [("store", 0.3, DTYPES[2]), ("recompute", 1.0, DTYPES[1])],
)
def test_linear_with_metrics(kernels, monkeypatch, schedule, beta, dtype):
    metric_cases.test_linear_with_metrics(kernels, monkeypatch, schedule, beta, dtype)


@pytest.mark.parametrize(("beta", "setting"), [(0.0, "plain"), (1.0, "warm"), (0.3, "smooth")])
def test_metrics_of_fused_statistics(kernels, beta, setting):
    """The fused kernel: several splits, whose first has no token; labels in each of them and in none."""
    tensors = problem(kernels, torch.bfloat16, padded=PADDED)
    bias = torch.linspace(-9, 9, PADDED, device=kernels.device)
    bias = -bias if beta else bias  # the last split has the maximum, or the first
    bias[:64] = -INF
    mask = torch.arange(N, device=kernels.device) != 3
    labels = torch.where(mask, metric_cases.labels_for(N, V, kernels.device), -1)
    labels[:3] = torch.tensor([127, V, 10**12], device=kernels.device)
    options, metrics = metric_cases.SETTINGS[setting], torch.full((N, 4), math.nan, device=kernels.device)
    of_tokens = TokenMetrics(labels, metrics)
    setup = {"beta": beta, "options": options, "biases": (bias, None), "vocab_size": V, "mask": mask}
    loss = linear(kernels, tensors, needs_grad=(False, False, False), of_tokens=of_tokens, **setup)[0]
    plain = linear(kernels, tensors, needs_grad=(False, False, False), **setup)[0]
    np.testing.assert_allclose(numpy_of(loss), numpy_of(plain), rtol=1e-5)
    logits = tensors[0].double() @ tensors[1][:V].double().T + bias[:V].double()
    known = mask.clone()
    known[1:3] = False
    if setting == "smooth":  # a token that is masked out
        assert (metrics[known, 1] == INF).all()
    truth = metric_cases.metrics_truth(logits[known], labels[known], options)
    for column in (2, 3) if setting == "smooth" else (1, 2, 3):
        found = numpy_of(metrics[known, column])
        np.testing.assert_allclose(found, truth[column - 1], rtol=1e-5, atol=1e-5)
    assert (metrics[1:3, 1] == INF).all() and (metrics[1:3, 3] == -INF).all() and (metrics[3] == 0).all()


@pytest.mark.parametrize(("setting", "tile"), [("plain", 301), ("smooth", 64), ("capped", 64)])
def test_student_stats(kernels, setting, tile):
    student_cases.test_student_stats(kernels, setting, tile)


@pytest.mark.parametrize(
    ("setting", "dtype"), [("plain", DTYPES[0]), ("capped", DTYPES[1]), ("warm", DTYPES[2])]
)
def test_student_grad(kernels, setting, dtype):
    student_cases.test_student_grad(kernels, setting, dtype)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_kl_loss(kernels, divergence):
    """kl_loss as the user calls it: pick(), custom op, autograd."""
    beta = {"forward_kl": 0.0, "jsd": 0.5}[divergence]
    labels = torch.zeros(N, dtype=torch.int64, device=kernels.device)
    labels[:5] = -100
    options = {"labels": labels, "divergence": divergence, "backend": kernels.backend}
    student, teacher = (x.to(kernels.device) for x in make_rows(N, 200, torch.float32))
    student.requires_grad_()
    rows_ = mk.kl_loss(student, teacher, reduction="none", **options)
    rows_.backward(torch.full_like(rows_, 2.0))
    true_loss, true_grad = oracle_rows(numpy_of(student), numpy_of(teacher), beta=beta)
    counts = numpy_of(labels == 0)
    np.testing.assert_allclose(numpy_of(rows_), true_loss * counts, rtol=3e-6)
    assert_near(student.grad, 2.0 * true_grad * counts[:, None], 4e-6, 1e-6)


# A choice of what CUDA C++ is tested with: ttsem is slow, and the GPU schedule is the same.
EDGES = [(0.0, 1.0), (1.0, 0.005), (0.3, 1.0), (1e-9, 0.005), (1 - 1e-9, 100.0)]  # beta, temperature


@pytest.mark.parametrize(("beta", "temperature"), EDGES)
def test_rows_at_edges(kernels, beta, temperature):
    first = EDGES.index((beta, temperature))
    few = some(finite_rows(200, 128), first, len(EDGES))
    for edges in (finite_rows(1, 1), few, masked_out_rows(200, 128)):
        check_rows_at_edges(kernels, edges, beta, temperature)


@pytest.mark.parametrize(("beta", "temperature"), EDGES[:3])
def test_fused_at_edges(kernels, beta, temperature):
    """The fused kernel: blocks of 32 tokens, 4 a split."""
    first = EDGES.index((beta, temperature))
    edges = some(finite_rows(270, 128 if first else 32), first, 3)
    check_evaluation_at_edges(kernels, edges, beta, temperature, torch.bfloat16)


def test_dtypes_of_rows(kernels):
    pairs = [(torch.bfloat16, torch.float16), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)]
    check_dtypes_of_rows(kernels, 0.3, pairs)


def test_dtypes_of_linear(kernels):
    """The fused kernel where both sides are of 16 bit, else tiles; all dtypes in every place."""
    a, b, c = DTYPES
    quadruples = [(b, b, c, c), (c, c, b, b), (b, c, b, b), (a, a, c, c), (c, b, a, a), (b, a, c, b)]
    evaluation = {"beta": 0.0, "needs_grad": (False, False, False), "budget": 3 << 14}
    check_dtypes_of_linear(kernels, quadruples, [evaluation])
    check_dtypes_of_linear(kernels, quadruples[2:3], [{"beta": 0.3, "schedule": "store", "budget": 3 << 14}])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_grad(dtype):
    """Sizes of no, one and more blocks than programs."""
    check_scaling(scale.scale_grad_, dtype, "cuda", (0, 1, 100, 128, 129, 300, 640, 1000), starts=(0, 3))


def test_bad_input_of_scale_grad():
    good, one = torch.zeros(4, 4, device="cuda"), torch.ones((), device="cuda")
    for grad, factor in ((good.t()[:, :2], one), (good, one[None])):
        with pytest.raises(ValueError, match="grad must be contiguous and factor without dimensions"):
            scale.scale_grad_(grad, factor)
    for grad, factor in ((good.double(), one), (good, one.double())):
        with pytest.raises(TypeError, match="grad must be float32, bfloat16 or float16"):
            scale.scale_grad_(grad, factor)
