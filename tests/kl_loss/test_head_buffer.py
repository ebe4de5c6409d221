"""grad_head_buffer: memory of the caller's in which the gradient to the head is made."""

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import minitron_kernels as mk
from kl_loss.problems import make_linear
from kl_loss.test_memory import allocations
from minitron_kernels.ops.kl_loss.blocks_cpu import Caches

pytestmark = pytest.mark.native
N, H, HT, V = 70, 48, 56, 300


def problem(dtype=torch.float32, seed=0):
    hidden, head, *teacher = make_linear(N, H, HT, V, dtype, seed=seed)
    return hidden.requires_grad_(), head.requires_grad_(), teacher


def expected(tensors, factor=1.0, **options):
    hidden, head, teacher = tensors
    hidden, head = (x.detach().clone().requires_grad_() for x in (hidden, head))
    loss = mk.linear_kl_loss(hidden, head, *teacher, **options)
    (loss.sum() * factor).backward()
    return hidden.grad, head.grad


def poisoned(head):
    return torch.full_like(head, float("nan"), requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [
    {}, {"schedule": "recompute"}, {"reduction": "none"}, {"vocab_size": 290},
    {"temperature": 2.0, "divergence": "jsd"},
    {"mask": torch.arange(N) % 3 > 0}, {"mask": torch.zeros(N, dtype=torch.bool)},
])  # fmt: skip
def test_steps_of_a_loop(dtype, options):
    """The same bits as without, in the buffer, whatever it held; step after step."""
    tensors = problem(dtype)
    hidden, head, teacher = tensors
    buffer = poisoned(head)
    for factor in (1.0, 0.5):
        loss = mk.linear_kl_loss(hidden, head, *teacher, grad_head_buffer=buffer, **options)
        (loss.sum() * factor).backward()
        assert head.grad.data_ptr() == buffer.data_ptr() and head.grad is not buffer
        for actual, wanted in zip(
            (hidden.grad, head.grad), expected(tensors, factor, **options), strict=True
        ):
            assert torch.equal(actual, wanted)
        hidden.grad = head.grad = None
        buffer.fill_(float("nan"))


def test_a_sparse_teacher():
    hidden, head, _ = problem(torch.bfloat16)
    ids = torch.arange(3).expand(N, 3) + torch.arange(N)[:, None]
    teacher = ids, torch.full((N, 3), 0.2).log(), torch.full((N,), 0.4).log()
    mk.linear_sparse_kl_loss(hidden, head, *teacher).backward()
    wanted, head.grad, buffer = head.grad, None, poisoned(head)
    mk.linear_sparse_kl_loss(hidden, head, *teacher, grad_head_buffer=buffer).backward()
    assert torch.equal(head.grad, wanted) and head.grad.data_ptr() == buffer.data_ptr()


def test_no_new_memory_for_the_head():
    hidden, head, *teacher = make_linear(64, 64, 64, 8192, torch.float32)
    head.requires_grad_()
    buffer = poisoned(head)

    def step(**lent):
        head.grad = None
        mk.linear_kl_loss(hidden, head, *teacher, **lent).backward()

    step()
    whole = head.numel() * 4
    assert whole in allocations(step)  # the counter sees it
    assert max(allocations(lambda: step(grad_head_buffer=buffer))) < whole


@pytest.mark.parametrize("rerun", ["non-reentrant", "reentrant"])
def test_checkpoints(rerun):
    tensors = problem()
    hidden, head, teacher = tensors
    buffer = poisoned(head)

    def loss_of(hidden, head):
        return mk.linear_kl_loss(hidden, head, *teacher, grad_head_buffer=buffer)

    for _ in range(2):
        head.grad = None
        checkpoint(loss_of, hidden, head, use_reentrant=rerun == "reentrant").backward()
        assert torch.equal(head.grad, expected(tensors)[1]) and head.grad.data_ptr() == buffer.data_ptr()


def test_a_graph_that_is_kept():
    tensors = problem()
    hidden, head, teacher = tensors
    buffer = poisoned(head)
    loss = mk.linear_kl_loss(hidden, head, *teacher, grad_head_buffer=buffer)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(head.grad, 2 * expected(tensors)[1], rtol=1e-6, atol=0)


def test_tied_weights_add_up():
    tensors = problem()
    hidden, head, teacher = tensors
    buffer = poisoned(head)
    tokens = torch.arange(N) % V
    loss = mk.linear_kl_loss(hidden, head, *teacher, grad_head_buffer=buffer)
    (loss + torch.nn.functional.embedding(tokens, head).sum()).backward()
    wanted = expected(tensors)[1]
    wanted[:N] += 1
    torch.testing.assert_close(head.grad, wanted, rtol=1e-6, atol=1e-7)


def test_no_gradient_leaves_it_alone():
    hidden, head, teacher = problem()
    buffer = torch.full_like(head, 2.0, requires_grad=False)
    with torch.no_grad():
        mk.linear_kl_loss(hidden, head, *teacher, grad_head_buffer=buffer)
    mk.linear_kl_loss(hidden, head.detach(), *teacher, grad_head_buffer=buffer).backward()
    assert (buffer == 2).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_losses_in_flight_are_an_error(reduction):
    """The second one's gradient would be taken for the first one's, or lie under it."""
    hidden, head, teacher = problem()
    buffer = poisoned(head)
    losses = [
        mk.linear_kl_loss(hidden, head, *teacher, grad_head_buffer=buffer, reduction=reduction).sum()
        for _ in range(2)
    ]
    if reduction == "none":
        losses[0].backward()
        losses.pop(0)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|written to between"):
        losses[0].backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("around", ["non-reentrant", "reentrant", "hooks", "save_on_cpu"])
def test_two_losses_in_flight_are_an_error_where_versions_are_not_checked(around, reduction):
    """Under hooks autograd has no versions; a checkpoint writes anew while it adds the gradients up."""
    hidden, head, teacher = problem()
    buffer = poisoned(head)

    def loss_of(hidden, head):
        return mk.linear_kl_loss(hidden, head, *teacher, grad_head_buffer=buffer, reduction=reduction).sum()

    def run(hidden):
        if around in ("non-reentrant", "reentrant"):
            return checkpoint(loss_of, hidden, head, use_reentrant=around == "reentrant")
        with saved_tensors_hooks(*[lambda x: x] * 2) if around == "hooks" else save_on_cpu():
            return loss_of(hidden, head)

    total = run(hidden) + 3 * run(hidden * 2)
    with pytest.raises(RuntimeError, match="a buffer of its own"):
        total.backward()


def test_a_checkpoint_of_a_graph_that_is_kept():
    tensors = problem()
    hidden, head, teacher = tensors
    buffer = poisoned(head)
    loss = checkpoint(
        lambda *x: mk.linear_kl_loss(*x, *teacher, grad_head_buffer=buffer), hidden, head, use_reentrant=False
    )
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(head.grad, 2 * expected(tensors)[1], rtol=1e-6, atol=0)


def test_micro_batches_are_refused():
    hidden, head, teacher = problem()
    buffer = poisoned(head)
    mk.linear_kl_loss(hidden, head, *teacher, grad_head_buffer=buffer).backward()
    before = head.grad.clone()
    with pytest.raises(ValueError, match=r"memory of student_head\.grad"):
        mk.linear_kl_loss(hidden, head, *teacher, grad_head_buffer=buffer)
    mk.linear_kl_loss(hidden, head, *teacher).backward()  # added, without a buffer
    torch.testing.assert_close(head.grad, 2 * before)


def test_what_cannot_be_lent():
    hidden, head, teacher = problem()
    with torch.inference_mode():
        made_in_inference = torch.empty(V, H)
    for buffer, error, message in (
        (3, TypeError, r"grad_head_buffer .* got int"),
        (torch.empty(V, H, dtype=torch.bfloat16), TypeError, r"must be torch.float32 .* got torch.bfloat16"),
        (torch.empty(V, H + 1), ValueError, "student_head's shape"),
        (torch.empty(H, V).T, ValueError, "contiguous"),
        (torch.empty(V, 2 * H)[:, :H], ValueError, "contiguous"),
        (torch.empty(V, H, requires_grad=True), ValueError, "must not require grad"),
        (made_in_inference, ValueError, "inference_mode"),
        (head.detach(), ValueError, "shares memory with an input"),
        (torch.empty(V, H, device="meta"), ValueError, "on cpu"),
    ):
        with pytest.raises(error, match=message):
            mk.linear_kl_loss(hidden, head, *teacher, grad_head_buffer=buffer)
    fine = poisoned(head)
    for options, message in (
        ({"grad_head_accumulator": torch.zeros(V, H)}, "give one"),
        ({"backend": "reference"}, "grad_head_buffer needs native or triton"),
    ):
        with pytest.raises(ValueError, match=message):
            mk.linear_kl_loss(hidden, head, *teacher, grad_head_buffer=fine, **options)
    with pytest.raises(ValueError, match="the parameter itself"):
        mk.linear_kl_loss(hidden, head * 1, *teacher, grad_head_buffer=fine)
    half = [x.half() for x in (hidden, head, *teacher)]
    half[1] = half[1].detach().requires_grad_()
    with pytest.raises(TypeError, match="float16"):
        mk.linear_kl_loss(*(x.detach() for x in half[:1]), *half[1:2], *(x.detach() for x in half[2:]),
                          grad_head_buffer=fine.half())  # fmt: skip
    assert fine.isnan().all()


def test_the_planner_knows_of_it(monkeypatch):
    """A large gradient goes around the caches into lent memory alone; what a call refuses it refuses."""
    monkeypatch.setattr(Caches, "of_this_cpu", staticmethod(Caches))
    shape = (256, 131072, 2048, 2560)
    for options, expected in (
        ({}, False),
        ({"grad_head_buffer": True}, True),
        ({"grad_head_buffer": True, "sparse_ids": 8}, True),
        ({"grad_head_buffer": True, "grad_head": False}, False),
        ({"grad_head_buffer": True, "device": "cuda"}, None),
    ):
        sizes = (*shape[:3], 0) if "sparse_ids" in options else shape
        plan = mk.plan_linear_kl_loss(*sizes, **options)
        assert expected is None or plan.blocks.stream_head == expected
    for options, error in (
        ({"grad_head_accumulator": True}, ValueError),
        ({"dtype": torch.float16}, TypeError),
    ):
        for device in ("cpu", "cuda"):
            with pytest.raises(error, match="grad_head_buffer"):
                mk.plan_linear_kl_loss(*shape, grad_head_buffer=True, device=device, **options)
