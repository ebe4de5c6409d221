"""gather's kernels on a real GPU: the cases of gather/triton_cases.py, and what only a GPU shows."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import minitron_kernels as mk
from gather.problems import DTYPES, KINDS, assert_gathered, keep_some, make_weight
from gather.triton_cases import *  # noqa: F403
from minitron_kernels._backend import why_not
from minitron_kernels.ops.gather import kernel_triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(params=["native", "triton"])
def backend(request, monkeypatch):
    """Each backend that serves this GPU, with the sizes that are shipped in place of small_blocks."""
    monkeypatch.undo()
    if reason := why_not("gather", request.param, torch.device("cuda")):
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_bits(backend, dtype, kind):
    for shape in ((3, 70, 1040), (129, 4097), (2, 5, 16)):
        weight = make_weight(*shape, dtype=dtype, device="cuda")
        R, C = shape[-2:]
        rows, cols = keep_some(R, R // 2, kind), keep_some(C, C // 16 * 8, kind)
        for keep in ((rows, cols), (rows, None), (None, cols), (None, None)):
            for x in (weight, weight[..., 1:], weight.mT.contiguous().mT):
                kept = (keep[0], None if keep[1] is None else keep[1].clamp(max=x.shape[-1] - 1))
                assert_gathered(mk.gather_channels(x, *kept, backend=backend), x, *kept)


def test_real_sizes(backend):
    """The weight of an MLP, random columns and whole blocks, against torch's own indexing."""
    weight = torch.randn(14336, 5120, dtype=torch.bfloat16, device="cuda")
    rows = keep_some(14336, 11520)
    for cols in (keep_some(5120, 4096), torch.arange(512, 4608)):
        out = torch.full((11520, 4096), -1.0, dtype=torch.bfloat16, device="cuda")
        mk.gather_channels(weight, mk.ChannelIndex(rows, 14336), cols, out=out, backend=backend)
        assert torch.equal(out, weight[rows.cuda()[:, None], cols.cuda()])


@pytest.mark.largest
def test_more_than_2_to_the_31_elements(backend):
    experts, R, C = 3, 60_000, 14336
    if torch.cuda.mem_get_info()[0] < 2 * experts * R * C + (1 << 30):
        pytest.skip("needs 7 GiB of free memory")
    weight = torch.zeros(experts, R, C, dtype=torch.int8, device="cuda")
    weight[2, -1, -1] = 7
    result = mk.gather_channels(weight, cols=torch.arange(16, C), backend=backend)
    assert result[2, -1, -1] == 7 and result.sum() == 7


def test_no_host_sync_streams_and_cuda_graph(backend):
    """With a ChannelIndex that has been used once, the call runs under set_sync_debug_mode("error")."""
    weight = torch.randn(200, 512, device="cuda")
    rows = mk.ChannelIndex(keep_some(200, 120), 200)
    cols = mk.ChannelIndex(keep_some(512, 320, "runs"), 512)
    out = torch.zeros(120, 320, device="cuda")

    def call():
        return mk.gather_channels(weight, rows, cols, out=out, backend=backend)

    expected = call().clone()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        weight.mul_(2.0)  # a kernel on another stream would not wait for this
        assert torch.equal(call(), 2.0 * expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    weight.mul_(2.0)
    graph.replay()
    assert torch.equal(out, 4.0 * expected)


def test_an_index_from_the_gpu_on_other_streams_and_in_a_graph(backend):
    """Made on one stream, used on another and in a capture without waiting; a capture makes no copy."""
    weight = torch.randn(200, 512, device="cuda")
    keep = keep_some(512, 320).cuda()
    expected = weight[:, keep]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10_000_000)
        cols = mk.ChannelIndex(keep, 512)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.equal(mk.gather_channels(weight, cols=cols, backend=backend), expected)
    rows = mk.ChannelIndex(keep_some(200, 120), 200)
    out = torch.zeros(200, 320, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mk.gather_channels(weight, cols=cols, out=out, backend=backend)
        with pytest.raises(RuntimeError, match="no copy on cuda"):
            mk.gather_channels(weight, rows, backend=backend)
        with pytest.raises(RuntimeError, match="cannot be checked while a CUDA graph is captured"):
            mk.ChannelIndex(keep, 512)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.compiled
def test_compiled(backend):
    """Without a break; a bad index is a device-side assertion, which would end the process: not tried."""
    weight = torch.randn(40, 96, device="cuda")
    rows, cols = keep_some(40, 20).cuda(), keep_some(96, 70).cuda()

    def call(weight, rows, cols):
        return mk.gather_channels(weight, rows, cols, backend=backend) * 1.0

    assert_gathered(torch.compile(call, fullgraph=True)(weight, rows, cols), weight, rows, cols)


def test_no_recompilation(monkeypatch):
    """New numbers of rows, columns and matrices launch what is there."""
    monkeypatch.undo()
    counts = []
    for R, C, rows, cols in ((64, 1024, 33, 640), (1000, 4096, 999, 4080), (7, 512, 5, 272)):
        for weight in (torch.zeros(R, C, device="cuda"), torch.zeros(3, R, C, device="cuda")):
            mk.gather_channels(weight, keep_some(R, rows), keep_some(C, cols, "shuffled"), backend="triton")
        counts.append(sum(len(c[0]) for c in kernel_triton.gather_kernel.device_caches.values()))
    assert counts == counts[:1] * 3


def test_second_gpu(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    weight, rows = torch.randn(20, 64, device="cuda:1"), keep_some(20, 9)
    with torch.cuda.device(0):
        result = mk.gather_channels(weight, rows, backend=backend)
    assert result.device == weight.device
    assert_gathered(result, weight, rows)
