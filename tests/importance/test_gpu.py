"""importance's kernels on a real GPU: the cases of importance/triton_cases.py, and what only a GPU shows."""

import itertools

import numpy as np
import pytest
import torch

from importance import oracle

pytest.importorskip("triton", reason="triton is not installed")

import minitron_kernels as mk
from importance.problems import activations, check_moments, numpy_of
from importance.triton_cases import *  # noqa: F403
from minitron_kernels._backend import why_not
from minitron_kernels.ops.importance import kernel_triton
from minitron_kernels.ops.importance.moments import moments_of, rows_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(params=["native", "triton"])
def backend(request, monkeypatch):
    """Each backend that serves this GPU, with the sizes that are shipped in place of short_pieces."""
    monkeypatch.undo()
    if reason := why_not("importance", request.param, torch.device("cuda")):
        pytest.skip(reason)
    return request.param


def inputs(B=4, S=2048, C=14336, dtype=torch.bfloat16):
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(B, S, C, generator=g, device="cuda").to(dtype)
    mask = torch.rand(B, S, generator=g, device="cuda") < 0.9
    return x, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_heads", [0, 8])
def test_values(backend, dtype, num_heads):
    """Padding, holes, several pieces, packed sequences, strides."""

    def run(*arguments):
        return moments_of(*arguments, backend)[:2]

    for shape in ((3, 700, 1048), (1, 130, 264), (2, 8, 8), (5, 33, 2048)):
        x = activations(*shape, dtype=dtype).cuda()
        mask = torch.arange(shape[0] * shape[1], device="cuda").reshape(shape[:2]) % 5 > 0
        check_moments(run, x, num_heads=num_heads, kinds_of_sums=(1, 7))
        check_moments(run, x.masked_fill(~mask[..., None], torch.nan), mask=mask, num_heads=num_heads)
        check_moments(run, x[:, ::2, 8:-8], num_heads=num_heads, kinds_of_sums=(7,))
        check_moments(run, x[:, :, 1:-7], num_heads=num_heads, kinds_of_sums=(7,))
    packed, borders = activations(700, 1024, dtype=dtype).cuda(), [0, 0, 17, 129, 129, 600, 601, 700]
    check_moments(run, packed, cu_seqlens=borders, num_heads=num_heads)


def test_real_sizes(backend):
    """[4, 2048, 14336] and a sequence of 200,000 tokens, against float64 on the GPU."""
    x, mask = inputs()
    counted = mask[..., None]
    values, counts = moments_of(x, mask, None, 0, 7, backend)[:2]
    assert torch.equal(counts, mask.sum(1))
    wide = x.double()
    truth = torch.stack([(wide.abs() * counted).sum(1), (wide.square() * counted).sum(1)])
    assert ((values[:2] - truth).abs() <= 1e-6 * truth).all()
    mean = (wide * counted).sum(1) / counts[:, None]
    m2 = ((wide - mean[:, None]).square() * counted).sum(1)
    assert ((values[3] - m2).abs() <= 2e-6 * m2).all()
    long = torch.randn(200_000, 64, device="cuda") + 1.0
    borders = torch.tensor([0, len(long)], device="cuda")
    for values in (
        moments_of(long[None], None, None, 0, 1, backend).values,
        moments_of(long, None, borders, 0, 1, backend).values,
    ):
        assert (values[0, 0] / long.double().abs().sum(0) - 1).abs().max() < 1e-6


@pytest.mark.largest
def test_more_than_2_to_the_31_elements(backend):
    B, S, C = 3, 50_000, 14336
    if torch.cuda.mem_get_info()[0] < B * S * C * 2 + (1 << 30):
        pytest.skip("needs 5 GiB of free memory")
    x = torch.ones(B, S, C, dtype=torch.bfloat16, device="cuda")
    x[2, -1, -1] = -3.0
    values, counts = moments_of(x, None, None, 0, 1, backend)[:2]
    assert (counts == S).all() and (values[:, :2] == S).all()
    assert values[0, 2, -1] == S + 2 and (values[0, 2, :-1] == S).all()
    norms = rows_of(x.view(-1, C), None, backend)
    assert norms.min() == norms[0] and norms.argmax() == B * S - 1


def test_rows(backend):
    for dtype, width in itertools.product((torch.float32, torch.bfloat16), (1, 77, 128, 4096, 16384)):
        x = activations(300, width, dtype=dtype).cuda()
        y = x + activations(300, width, dtype=dtype, seed=1).cuda()
        norms, distance = rows_of(x, None, backend), rows_of(x, y, backend)
        truth = oracle.cosine_distance(numpy_of(x), numpy_of(y))
        np.testing.assert_allclose(numpy_of(norms), np.linalg.norm(numpy_of(x), axis=-1), rtol=1e-6)
        np.testing.assert_allclose(numpy_of(distance), truth, atol=1e-6)


def test_experts_are_summed_in_a_fixed_order(backend):
    """Bitwise the same in every call, and what the CPU finds."""
    out, index = activations(60_000, 64).cuda(), torch.arange(60_000, device="cuda") * 7919 % 128
    states = [mk.TokenMeanState(128, device="cuda") for _ in range(5)]
    for state in states:
        mk.accumulate_expert_importance_(state, out, index, backend=backend)
        assert torch.equal(state.sums, states[0].sums)
    on_cpu = mk.accumulate_expert_importance_(mk.TokenMeanState(128), out.cpu(), index.cpu())
    assert torch.equal(on_cpu.counts, states[0].counts.cpu())
    torch.testing.assert_close(states[0].sums.cpu(), on_cpu.sums, rtol=4e-6, atol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_no_host_sync_streams_and_cuda_graph(backend, packed):
    """The public call runs under set_sync_debug_mode("error"), on a side stream, and is captured."""
    x, mask = inputs(2, 300, 1024)
    borders = torch.tensor([0, 100, 600], device="cuda") if packed else None
    if packed:
        x, mask = x.view(600, 1024), mask.view(600)
    state = mk.ImportanceState(1024, seq=("mean", "L2", "var"), device="cuda")

    def call(heads=None, into=state):
        options = {"mask": mask, "cu_seqlens": borders, "num_heads": heads, "backend": backend}
        return mk.accumulate_importance_(into, x, **options)

    def fresh(heads=None):
        of_heads = mk.ImportanceState(heads or 1024, seq=state.seq, device="cuda")
        return call(heads, of_heads).sums.clone()

    expected, of_heads = fresh(), fresh(8)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        call(8, mk.ImportanceState(8, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        late = x.clone()
        x.copy_(late)  # a kernel on another stream would not wait for this
        assert torch.equal(fresh(8), of_heads)
    torch.cuda.synchronize()
    state.sums.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(3):
        graph.replay()
    assert torch.allclose(state.sums, 3 * expected, rtol=1e-12)
    state.sums.zero_()
    x.mul_(2.0)
    graph.replay()
    assert torch.equal(state.sums, fresh()) and not torch.equal(state.sums, expected)


def test_no_recompilation():
    """New B, S and T launch what is there."""
    kernels = (
        kernel_triton.importance_pieces_kernel,
        kernel_triton.importance_finish_kernel,
        kernel_triton.importance_rows_kernel,
    )
    counts = []
    for B, S in ((1, 64), (2, 64), (3, 1037), (16, 1), (1, 1)):
        x, mask = inputs(B, S, 1024)
        moments_of(x, mask, None, 0, 7, "triton")
        moments_of(x, mask, None, 8, 7, "triton")
        moments_of(x.view(-1, 1024), None, torch.tensor([0, B * S], device="cuda"), 0, 7, "triton")
        rows_of(x.view(-1, 1024), None, "triton")
        counts.append([sum(len(c[0]) for c in kernel.device_caches.values()) for kernel in kernels])
    assert all(count == counts[0] for count in counts)


@pytest.mark.compiled
def test_compiled(backend):
    """torch.compile without a break, in all three public functions."""
    x, mask = inputs(2, 100, 512)
    y = x + 0.1 * x.roll(1, -1)
    index = torch.arange(200, device="cuda") % 4

    def step(state, blocks, experts):
        mk.accumulate_importance_(state, x, mask=mask, backend=backend)
        mk.accumulate_block_importance_(blocks, 0, x, y, mask=mask, backend=backend)
        mk.accumulate_expert_importance_(experts, x.view(200, 512), index, backend=backend)
        return state, blocks, experts

    def states():
        tokens = (mk.TokenMeanState(n, device="cuda") for n in (1, 4))
        return mk.ImportanceState(512, seq=("mean", "L2", "var"), device="cuda"), *tokens

    eager, compiled = step(*states()), torch.compile(step, fullgraph=True)(*states())
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a.sums, b.sums, rtol=1e-12, atol=0)


def test_second_gpu(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(2, 50, 256, device="cuda:1")
    with torch.cuda.device(0):
        values = moments_of(x, None, None, 0, 1, backend).values
    assert values.device == x.device and torch.allclose(values[0], x.abs().sum(1))
