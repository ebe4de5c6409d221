"""Sizes below, at and above every constant of the CPU kernels, one real shape, and what the plan counts.

256 K chain (kMaxChain) · 64 panel of tokens and of columns (kPanel) · 512 tokens of a row block (kRowBlock) ·
128 columns of dX (kHiddenBlock) · tiles of 64, 128 and 256 tokens of the vocabulary · pairs of bf16 columns
"""

import numpy as np
import pytest
import torch
from _oracle import oracle_linear
from _problems import GRADIENT_BOUND, HAS_BF16, force_operands, make_linear, relative, to_numpy

import minitron_kernels as mk

pytestmark = pytest.mark.native
ENGINES = {"f32": torch.float32, "portable": torch.float32, "portable_bf16": torch.bfloat16}
if HAS_BF16:
    ENGINES["bf16"] = torch.bfloat16
# tokens, hidden sizes of student and teacher, vocabulary: each number a border or beside one
SHAPES = [
    (1, 1, 1, 1),
    (63, 255, 256, 63),
    (64, 256, 257, 64),
    (65, 257, 513, 65),
    (129, 127, 511, 1023),
    (511, 63, 65, 129),
    (512, 64, 255, 127),
    (513, 129, 63, 1025),
    (577, 65, 31, 191),
]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(monkeypatch, engine, shape, schedule, threads, budget=None):
    force_operands(monkeypatch, engine)
    dtype = ENGINES[engine]
    tensors = make_linear(*shape, dtype, distance=1.0, seed=shape[0])
    hidden, head = (x.requires_grad_() for x in tensors[:2])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        loss = mk.linear_kl_loss(*tensors, schedule=schedule, workspace_bytes=budget)
        loss.backward()
    finally:
        torch.set_num_threads(before)
    rows, *grads = oracle_linear(*to_numpy(*tensors), row_weight=np.full(shape[0], 1 / shape[0]))
    assert loss.item() == pytest.approx(rows.mean(), rel=1e-5, abs=1e-7), shape
    for x, truth in zip((hidden, head), grads, strict=False):
        if np.linalg.norm(truth) > 0:
            assert relative(x.grad, truth) <= GRADIENT_BOUND[dtype], shape


@pytest.mark.parametrize("schedule", ["store", "recompute"])
@pytest.mark.parametrize("engine", ENGINES)
def test_borders(monkeypatch, engine, schedule):
    for number, shape in enumerate(SHAPES):
        check(monkeypatch, engine, shape, schedule, 1 + number % 3)


@pytest.mark.parametrize("engine", ["f32", "portable_bf16"])
def test_a_real_shape(monkeypatch, engine):
    """SmolLM2's head, a teacher's that is wider; in chunks of the vocabulary that end anywhere."""
    check(monkeypatch, engine, (70, 576, 640, 49152), "auto", 2)


@pytest.mark.parametrize("engine", ["portable", "portable_bf16"])
def test_chunks_whose_sizes_do_not_divide(monkeypatch, engine):
    N, H, Ht, V = 600, 65, 33, 1300
    plan = mk.plan_linear_kl_loss(N, V, H, Ht, schedule="store", workspace_bytes=5 << 20, engine=engine)
    assert plan.num_chunks > 1 and N % plan.chunk_rows
    check(monkeypatch, engine, (N, H, Ht, V), "store", 1, 5 << 20)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_tile_of_masked_out_tokens_alone(monkeypatch, engine):
    """Its largest logit is −inf, its sum of exponentials 0: neither may make a NaN."""
    force_operands(monkeypatch, engine)
    N, H, V = 66, 20, 300
    tensors = make_linear(N, H, H, V, ENGINES[engine])
    bias = torch.zeros(V)
    bias[64:192] = -torch.inf
    hidden, head = (x.requires_grad_() for x in tensors[:2])
    loss = mk.linear_kl_loss(*tensors, student_bias=bias, teacher_bias=bias, reduction="sum")
    loss.backward()
    rows, *grads = oracle_linear(
        *to_numpy(*tensors), student_bias=to_numpy(bias)[0], teacher_bias=to_numpy(bias)[0]
    )
    assert loss.item() == pytest.approx(rows.sum(), rel=1e-5)
    for x, truth in zip((hidden, head), grads, strict=False):
        assert relative(x.grad, truth) <= GRADIENT_BOUND[ENGINES[engine]]


@pytest.mark.parametrize("engine", ["f32", "portable_bf16"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_the_plan_counts_what_is_multiplied(monkeypatch, one_thread, engine, divergence):
    """Flops, with sizes that nothing pads; bytes are the layout's own, which the kernel checks."""
    force_operands(monkeypatch, engine)
    N, H, Ht, V = 128, 64, 128, 2048
    count = torch.ops.minitron_kernels.count_gemm_flops
    # with one thread, most tiles are kept but not all, in two chunks
    partly = {"f32": 1300 << 10, "portable_bf16": 1180 << 10}[engine]
    tensors = make_linear(N, H, Ht, V, ENGINES[engine])
    cases = [  # schedule, budget, whether the student learns, whether a buffer is lent
        ("store", 64 << 20, True, False),
        ("store", partly, True, False),
        ("store", partly, True, True),
        ("recompute", 64 << 20, True, False),
        ("recompute", 64 << 20, True, True),
        ("auto", 64 << 20, False, False),
    ]
    seen = set()
    for schedule, budget, learns, lent in cases:
        plan = mk.plan_linear_kl_loss(
            N,
            V,
            H,
            Ht,
            dtype=ENGINES[engine],
            grad_hidden=learns,
            grad_head=learns,
            grad_head_accumulator=lent,
            divergence_needs_kl=divergence == "jsd",
            schedule=schedule,
            workspace_bytes=budget,
            engine=engine,
        )
        seen.add((plan.schedule, lent, plan.stored_tiles < V // plan.tile))
        hidden, head = (x.detach().requires_grad_(learns) for x in tensors[:2])
        buffer = torch.zeros(V, H) if lent else None
        count(True)
        loss = mk.linear_kl_loss(
            hidden,
            head,
            *tensors[2:],
            divergence=divergence,
            schedule=schedule,
            workspace_bytes=budget,
            grad_head_accumulator=buffer,
        )
        if learns:
            loss.backward()
        assert count(False) == plan.flops, (schedule, budget, learns, lent)
    assert {("store", False, False), ("store", False, True), ("store", True, True)} <= seen
