"""kl_loss and linear_kl_loss on a real GPU, by CUDA C++ and by Triton: cases that both must pass, and what
only a GPU shows. `python -m pytest -m gpu tests/kl_loss/test_gpu.py` needs nothing but a GPU and the package.
"""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import minitron_kernels as mk
from kl_loss.cases import Kernels, linear, numpy_of, problem
from kl_loss.public_calls import NAMES, Call, assert_as_reference
from kl_loss.triton_cases import *  # noqa: F403
from kl_loss.triton_cases import triton_kernels
from minitron_kernels import _backend
from minitron_kernels.ops.kl_loss.epilogues import native_epilogues
from minitron_kernels.ops.kl_loss.kernel_triton import launch, launch_linear
from minitron_kernels.ops.kl_loss.reference import kl_divergence_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BETAS = (0.0, 1.0, 0.5)
OPTIONS = (1.0, 1.0, 0.0, 1.0, 0.0, 0.0)
EVERYTHING, NOTHING = (True, True, True), (False, False, False)
GIB = 1 << 30


def without(backend):
    """Why this backend cannot be tested here, or None."""
    return _backend.why_not("linear_kl_loss", backend, torch.device("cuda"))


@pytest.fixture(params=["native", "triton"])
def kernels(request):
    if reason := without(request.param):
        pytest.skip(reason)
    if request.param == "triton":
        return triton_kernels()
    ops = torch.ops.minitron_kernels
    return Kernels("native", "cuda", ops.kl_loss_forward, ops.kl_loss_backward, native_epilogues())


@pytest.fixture
def full_blocks(monkeypatch):
    """The sizes that are shipped, in place of small_blocks."""
    monkeypatch.undo()


def needs_memory(nbytes):
    if torch.cuda.mem_get_info()[0] < nbytes:
        pytest.skip(f"needs {nbytes / GIB:.0f} GiB of free GPU memory")


def real_problem(rows=1024, vocab=32000, width=1024, teacher_width=1280, dtype=torch.bfloat16, device="cuda"):
    g = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(device, dtype)

    return [
        normal(rows, width),
        normal(vocab, width, scale=width**-0.5),
        normal(rows, teacher_width),
        normal(vocab, teacher_width, scale=teacher_width**-0.5),
    ]


def reference(tensors, beta, rows):
    """Row losses in float64, of some rows."""
    hidden, head, teacher_hidden, teacher_head = (x.double() for x in tensors)
    return kl_divergence_rows(hidden[rows] @ head.T, teacher_hidden[rows] @ teacher_head.T, beta=beta)


def all_equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("beta", BETAS)
def test_real_sizes(kernels, full_blocks, beta):
    """Shipped tile sizes: no gradient, both schedules; the schedules' gradients agree."""
    tensors = real_problem()
    truth = numpy_of(reference(tensors, beta, slice(128)))
    evaluated = linear(kernels, tensors, beta=beta, needs_grad=NOTHING)
    store = linear(kernels, tensors, beta=beta, schedule="store", budget=GIB)
    recompute = linear(kernels, tensors, beta=beta, schedule="recompute", budget=1 << 26)
    for outputs in (evaluated, store, recompute):
        assert numpy_of(outputs[0][:128]) == pytest.approx(truth, rel=1e-4)
    for a, b in zip(store[2:], recompute[2:], strict=True):
        assert (a.double() - b.double()).norm() <= 5e-3 * a.double().norm()


@pytest.mark.largest
def test_more_than_2_to_the_31_logits(kernels, full_blocks):
    """Offsets of the last rows do not fit into 32 bits."""
    rows, vocab = 17000, 131072
    needs_memory(3 * rows * vocab * 2 + GIB)
    student = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    student[-1] = torch.randn(vocab, device="cuda")
    teacher = student.flip(1)
    loss, stats = kernels.forward(student, teacher, None, vocab, (0.0, *OPTIONS))
    grad = kernels.backward(torch.ones_like(loss), stats, student, teacher, None, vocab, (0.0, *OPTIONS))
    assert (loss[:-1] == 0).all() and loss[-1] > 0.1
    assert (grad[:-1] == 0).all() and (grad[-1] != 0).any()


@pytest.mark.largest
@pytest.mark.parametrize(("schedule", "budget"), [("store", 24 * GIB), ("recompute", GIB // 4)])
def test_linear_more_than_2_to_the_31_logits(kernels, full_blocks, schedule, budget):
    """One chunk of all rows, whose logits need 64-bit offsets; and N V beyond 2^31 in a quarter of a GiB."""
    rows, vocab = 17000, 131072
    needs_memory(budget + 2 * GIB)
    tensors = real_problem(rows, vocab, 32, 48)
    loss, _, grad, *_ = linear(kernels, tensors, schedule=schedule, budget=budget)
    some = slice(rows - 8, rows)
    assert numpy_of(loss[some]) == pytest.approx(numpy_of(reference(tensors, 0.0, some)), rel=1e-4)
    hidden, head, teacher_hidden, teacher_head = (x.double() for x in tensors)
    p_s, p_t = (hidden[some] @ head.T).softmax(1), (teacher_hidden[some] @ teacher_head.T).softmax(1)
    truth = (p_s - p_t) @ head
    assert (grad[some].double() - truth).norm() <= 5e-3 * truth.norm()


@pytest.mark.parametrize("schedule", ["store", "recompute"])
@pytest.mark.parametrize("needs_grad", [NOTHING, EVERYTHING])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_no_host_sync_and_cuda_graph(kernels, full_blocks, schedule, needs_grad, beta):
    """The call runs under set_sync_debug_mode("error"), is captured and replayed on new data."""
    tensors = problem(kernels, torch.bfloat16)
    mask = torch.ones(len(tensors[0]), dtype=torch.bool, device="cuda")
    mask[::3] = False

    def call():
        return linear(kernels, tensors, mask=mask, needs_grad=needs_grad, beta=beta, schedule=schedule)

    expected = call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    assert all_equal(captured, expected)
    tensors[0].mul_(0.5)
    graph.replay()
    again = call()
    assert all_equal(captured, again)
    assert not torch.equal(again[0], expected[0])


def test_public_functions_in_a_cuda_graph(kernels, full_blocks):
    """A training step of either function, forward and backward, captured and replayed."""
    tensors = real_problem(64, 4096, 64, 96)
    hidden, head = (x.requires_grad_() for x in tensors[:2])
    logits = torch.randn(2, 64, 4096, device="cuda").bfloat16().unbind(0)
    student = logits[0].clone().requires_grad_()
    leaves = (hidden, head, student)

    def step():
        for leaf in leaves:
            leaf.grad = None
        loss = mk.linear_kl_loss(*tensors, backend=kernels.backend)
        (loss + mk.kl_loss(student, logits[1], backend=kernels.backend)).backward()
        return [leaf.grad for leaf in leaves]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [x.clone() for x in step()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all_equal(captured, expected)


@pytest.mark.parametrize("name", NAMES)
def test_steps_with_everything_wait_for_nothing(kernels, full_blocks, name):
    """Labels, weights, a divisor on the GPU and the record, with a teacher's logits or k ids: a step under
    set_sync_debug_mode("error"), and one that is captured and replayed on new data.
    """
    call = Call(name, "cuda")
    expected = call.step(kernels.backend)
    assert_as_reference(expected, call.step("reference"))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.step(kernels.backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call.step(kernels.backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.step(kernels.backend)
    graph.replay()
    torch.cuda.synchronize()
    assert all_equal(captured, expected)
    with torch.no_grad():
        call.leaves[0].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    found = [x.clone() for x in captured]
    again = call.step(kernels.backend)
    assert all_equal(found, again) and not torch.equal(again[0], expected[0])


@pytest.mark.parametrize("schedule", ["store", "recompute"])
@pytest.mark.parametrize("needs_grad", [NOTHING, EVERYTHING])
def test_other_streams(kernels, full_blocks, schedule, needs_grad):
    """Everything goes to the current stream: the operands arrive there late, after a long wait."""
    tensors = problem(kernels, torch.bfloat16)
    expected = linear(kernels, tensors, needs_grad=needs_grad, schedule=schedule)
    logits = torch.randn(2, 64, 4096, device="cuda").unbind(0)
    expected_rows = kernels.forward(*logits, None, 4096, (0.0, *OPTIONS))
    late, late_logits = ([torch.zeros_like(x) for x in group] for group in (tensors, logits))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles
        for target, source in zip((*late, *late_logits), (*tensors, *logits), strict=True):
            target.copy_(source)
        outputs = linear(kernels, late, needs_grad=needs_grad, schedule=schedule)
        rows = kernels.forward(*late_logits, None, 4096, (0.0, *OPTIONS))
    side.synchronize()
    assert all_equal(outputs, expected) and all_equal(rows, expected_rows)


@pytest.mark.skipif(bool(without("triton")), reason=str(without("triton")))
def test_no_recompilation(full_blocks):
    """New N and V, of the same divisibility, launch what is there."""
    sizes = [(64, 4096), (33, 4096 + 16), (128, 8192 - 16), (1, 4096)]
    launched = (
        launch.forward_kernel,
        launch.grad_kernel,
        launch.tile_stats_kernel,
        launch_linear.linear_kernel,
    )
    counts = []
    for rows, vocab in sizes:
        x = torch.randn(rows, vocab, device="cuda")
        loss, stats = launch.kl_loss_forward(x, x, None, vocab, (0.0, *OPTIONS))
        launch.kl_loss_backward(loss, stats, x, x, None, vocab, (0.0, *OPTIONS))
        tensors = real_problem(rows, vocab, 64, 96)
        for needs_grad in (NOTHING, EVERYTHING):
            linear(triton_kernels(), tensors, needs_grad=needs_grad, schedule="recompute")
        counts.append([sum(len(c[0]) for c in kernel.device_caches.values()) for kernel in launched])
    assert all(count == counts[0] for count in counts[1:])


def loss_and_grads(function, tensors, dtype, **options):
    hidden, head, *teacher = (x.to(dtype) for x in tensors)
    hidden.requires_grad_(), head.requires_grad_()
    loss = function(hidden, head, *teacher, **options)
    loss.sum().backward()
    return loss.detach(), hidden.grad, head.grad


@pytest.mark.compiled
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_public_functions_compiled(kernels, full_blocks, divergence, reduction):
    """Against the reference in float64, through autograd and torch.compile without a graph break."""
    tensors = real_problem(256, 4096, 256, 320)
    options = {"divergence": divergence, "reduction": reduction}
    truth = loss_and_grads(mk.linear_kl_loss, tensors, torch.float64, backend="reference", **options)
    for function in (mk.linear_kl_loss, torch.compile(mk.linear_kl_loss, fullgraph=True)):
        loss, *grads = loss_and_grads(function, tensors, torch.bfloat16, backend=kernels.backend, **options)
        assert numpy_of(loss) == pytest.approx(numpy_of(truth[0]), rel=1e-4)
        for grad, expected in zip(grads, truth[1:], strict=True):
            assert (grad.double() - expected).norm() <= 5e-3 * expected.norm()
    for function in (mk.kl_loss, torch.compile(mk.kl_loss, fullgraph=True)):
        student, teacher = torch.randn(2, 64, 4096, device="cuda").bfloat16().unbind(0)
        student.requires_grad_()
        function(student, teacher, backend=kernels.backend, **options).sum().backward()
        exact = student.detach().double().requires_grad_()
        mk.kl_loss(exact, teacher.double(), backend="reference", **options).sum().backward()
        assert (student.grad.double() - exact.grad).norm() <= 4e-3 * exact.grad.norm()


def test_evaluation_and_autocast(kernels, full_blocks):
    """Under no_grad; and fp32 parameters under autocast, which the GEMMs then get in bf16."""
    tensors = real_problem(256, 4096, 256, 320, torch.float32)
    truth = mk.linear_kl_loss(*(x.double() for x in tensors), backend="reference").item()
    with torch.no_grad():
        assert mk.linear_kl_loss(*tensors, backend=kernels.backend).item() == pytest.approx(truth, rel=1e-3)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        _, *grads = loss_and_grads(mk.linear_kl_loss, tensors, torch.float32, backend=kernels.backend)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def test_auto_takes_the_first_backend_there_is():
    expected = next(name for name in ("native", "triton", "reference") if without(name) is None)
    assert _backend.pick("linear_kl_loss", torch.device("cuda"), "auto") == expected


def test_opcheck(kernels):
    """Schemas and fake kernels of the ops, on this device."""
    student, teacher = torch.randn(2, 6, 50, device="cuda").unbind(0)
    ops, numbers = torch.ops.minitron_kernels, [0.5, *OPTIONS]
    for given in ((numbers, None), ([], torch.tensor(numbers, dtype=torch.float64))):
        options = (50, *given, kernels.backend)
        torch.library.opcheck(ops.kl_rows_forward.default, (student, teacher, None, *options))
        loss, stats = ops.kl_rows_forward(student, teacher, None, *options)
        gradient = (torch.ones_like(loss), stats, student, teacher, None, *options)
        torch.library.opcheck(ops.kl_rows_backward.default, gradient)


def test_second_gpu(kernels, full_blocks):
    """Tensors of another device than the current one, for every kernel."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here, there = (real_problem(64, 4096, 64, 96, device=f"cuda:{i}") for i in range(2))
    for options in ({"divergence": "jsd"}, {"schedule": "store"}, {"schedule": "recompute"}):
        with torch.cuda.device(0):
            expected = loss_and_grads(
                mk.linear_kl_loss, here, torch.bfloat16, backend=kernels.backend, **options
            )
            found = loss_and_grads(
                mk.linear_kl_loss, there, torch.bfloat16, backend=kernels.backend, **options
            )
        assert all(x.device.index == 1 for x in found)
        assert all_equal([x.cpu() for x in found], [x.cpu() for x in expected])
    student, teacher = torch.randn(2, 8, 512, device="cuda:1").unbind(0)
    with torch.cuda.device(0):
        loss, _ = kernels.forward(student, teacher, None, 512, (0.0, *OPTIONS))
        assert loss.device == student.device and (loss > 0).all()
        with torch.no_grad():
            mk.linear_kl_loss(*there, backend=kernels.backend)
        assert torch.cuda.current_device() == 0
