"""The Triton kernels on a real GPU: the cases of _triton_cases_kl_loss.py, and what only a GPU shows."""

import pytest
import torch
from _triton_cases_kl_loss import *  # noqa: F403
from _triton_cases_kl_loss import linear, numpy_of, problem

import minitron_kernels as mk
from minitron_kernels.ops.kl_loss import kernel_triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BETAS = (0.0, 1.0, 0.5)


@pytest.fixture
def full_blocks(monkeypatch):
    """The sizes that are shipped, in place of small_blocks."""
    monkeypatch.undo()


def real_problem(rows=1024, vocab=32000, width=1024, teacher_width=1280, dtype=torch.bfloat16):
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, device="cuda") * scale).to(dtype)

    return [
        normal(rows, width),
        normal(vocab, width, scale=width**-0.5),
        normal(rows, teacher_width),
        normal(vocab, teacher_width, scale=teacher_width**-0.5),
    ]


def reference(tensors, beta, rows):
    """Row losses in float64, of the first rows."""
    from minitron_kernels.ops.kl_loss.reference import kl_divergence_rows

    hidden, head, teacher_hidden, teacher_head = (x.double() for x in tensors)
    return kl_divergence_rows(hidden[:rows] @ head.T, teacher_hidden[:rows] @ teacher_head.T, beta=beta)


@pytest.mark.parametrize("beta", BETAS)
def test_real_sizes(full_blocks, beta):
    """Shipped tile sizes: fused statistics, both schedules."""
    tensors = real_problem()
    truth = numpy_of(reference(tensors, beta, 128))
    fused = linear(tensors, beta=beta, wants=(False, False, False))
    store = linear(tensors, beta=beta, schedule="store", budget=1 << 30)
    recompute = linear(tensors, beta=beta, schedule="recompute", budget=1 << 26)
    for outputs in (fused, store, recompute):
        assert numpy_of(outputs[0][:128]) == pytest.approx(truth, rel=1e-4)
    for a, b in zip(store[2:], recompute[2:], strict=True):
        assert (a.double() - b.double()).norm() <= 5e-3 * a.double().norm()


def test_more_than_2_to_the_31_logits(full_blocks):
    rows, vocab = 17000, 131072
    if torch.cuda.mem_get_info()[0] < 3 * rows * vocab * 2 + (1 << 30):
        pytest.skip("needs 14 GiB of free memory")
    student = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    student[-1] = torch.randn(vocab, device="cuda")
    teacher = student.flip(1)
    options = (vocab, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0)
    loss, stats = kernel_triton.kl_loss_forward(student, teacher, None, *options)
    grad = kernel_triton.kl_loss_backward(torch.ones_like(loss), stats, student, teacher, None, *options)
    assert (loss[:-1] == 0).all() and loss[-1] > 0.1
    assert (grad[:-1] == 0).all() and (grad[-1] != 0).any()


@pytest.mark.parametrize("wants", [(False, False, False), (True, True, True)])
def test_no_host_sync_and_cuda_graph(full_blocks, wants):
    """The call runs under set_sync_debug_mode("error"), is captured and replayed on new data."""
    tensors = problem(torch.bfloat16)
    mask = torch.ones(len(tensors[0]), dtype=torch.bool, device="cuda")
    mask[::3] = False

    def call():
        return linear(tensors, mask=mask, wants=wants)

    expected = call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    tensors[0].mul_(0.5)
    graph.replay()
    again = call()
    assert all(torch.equal(a, b) for a, b in zip(captured, again, strict=True))
    assert not torch.equal(again[0], expected[0])


def test_no_recompilation(full_blocks):
    """New N and V, of the same divisibility, launch what is there."""
    sizes = [(64, 4096), (33, 4096 + 16), (128, 8192 - 16)]
    kernels = (kernel_triton.forward_kernel, kernel_triton.grad_kernel)
    counts = []
    for rows, vocab in sizes:
        x = torch.randn(rows, vocab, device="cuda")
        options = (vocab, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0)
        loss, stats = kernel_triton.kl_loss_forward(x, x, None, *options)
        kernel_triton.kl_loss_backward(loss, stats, x, x, None, *options)
        counts.append([sum(len(c[0]) for c in kernel.device_caches.values()) for kernel in kernels])
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_public_functions_compiled(full_blocks, divergence):
    """backend="triton" against the reference, through autograd and torch.compile."""
    tensors = real_problem(256, 4096, 256, 320)

    def loss_and_grads(function, backend, dtype=torch.bfloat16):
        hidden, head, *teacher = (x.to(dtype) for x in tensors)
        hidden.requires_grad_(), head.requires_grad_()
        loss = function(hidden, head, *teacher, divergence=divergence, backend=backend)
        loss.backward()
        return loss.detach(), hidden.grad, head.grad

    truth = loss_and_grads(mk.linear_kl_loss, "reference", torch.float64)
    for function in (mk.linear_kl_loss, torch.compile(mk.linear_kl_loss, fullgraph=True)):
        loss, *grads = loss_and_grads(function, "triton")
        assert loss.item() == pytest.approx(truth[0].item(), rel=1e-4)
        for grad, expected in zip(grads, truth[1:], strict=True):
            assert (grad.double() - expected).norm() <= 5e-3 * expected.norm()
    student, teacher = torch.randn(2, 64, 4096, device="cuda").bfloat16().unbind(0)
    student.requires_grad_()
    mk.kl_loss(student, teacher, divergence=divergence, backend="triton").backward()
    actual, student.grad = student.grad, None
    exact = student.detach().double().requires_grad_()
    mk.kl_loss(exact, teacher.double(), divergence=divergence, backend="reference").backward()
    assert (actual.double() - exact.grad).norm() <= 4e-3 * exact.grad.norm()


def test_second_gpu(full_blocks):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    student, teacher = torch.randn(2, 8, 512, device="cuda:1").unbind(0)
    with torch.cuda.device(0):
        loss, _ = kernel_triton.kl_loss_forward(student, teacher, None, 512, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0)
    assert loss.device == student.device and (loss > 0).all()
