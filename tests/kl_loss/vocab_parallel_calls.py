"""linear_kl_loss with a vocabulary over several ranks: what they exchange, when, and what they refuse."""

import itertools
import re
import time
from datetime import timedelta
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from kl_loss import vocab_parallel_cases
from kl_loss.cases import matmul_fp32
from kl_loss.vocab_parallel_cases import HT, STORE, H, N, Problem, V, check, even, gpu_schedule
from minitron_kernels import linear_kl_loss, plan_linear_kl_loss
from minitron_kernels.ops.kl_loss import vocab_parallel
from minitron_kernels.ops.kl_loss.find_shard import find_shard

COLLECTIVES = (vocab_parallel._all_gather, vocab_parallel._reduce_scatter, "all_reduce")

CASES = {}


def case(f):
    CASES[f.__name__] = f
    return f


@case
def close_to_the_teacher(group):
    """KL about 1e-3: as exact as in one process."""
    p = Problem(group, even(group.size()), distance=0.05, masked=0)
    call = {"reduction": "none"}
    truth = p.truth(beta=0.0)[0]
    one = linear_kl_loss(p.hidden, p.head, p.teacher_hidden, p.teacher_head, **call)
    heads = p.shard(p.head, 0), p.shard(p.teacher_head, 1)
    many = linear_kl_loss(p.hidden, heads[0], p.teacher_hidden, heads[1], tp_group=group, **call)
    errors = [np.abs(x.double().numpy() - truth).max() for x in (one, many)]
    assert truth.mean() < 4e-3 and errors[1] <= 2 * errors[0] + 1e-7 * truth.max() ** 0.5, errors


def wrong(group, error, message, heads=(10, 10), **arguments):
    """All ranks raise, and say why."""
    torch.manual_seed(0)
    rank = group.rank()
    rows = [x[rank] if isinstance(x, list) else x for x in heads]
    tokens = arguments.pop("tokens", [6] * group.size())[rank]
    given = {name: x[rank] if isinstance(x, list) else x for name, x in arguments.items()}
    tensors = [torch.randn(size, 8) for size in (tokens, rows[0], tokens, rows[1])]
    if given.pop("frozen", False):
        tensors[0].requires_grad_()
    try:
        linear_kl_loss(*tensors, tp_group=group, **given)
    except error as e:
        assert re.search(message, str(e)), f"{e} is not {message}"
    else:
        raise AssertionError(f"no {error.__name__}: {message}")


@case
def what_does_not_fit(group):
    world = group.size()
    rest = [10] * (world - 1)
    ends = [(10 * r, 10 * r + 10) for r in range(world)]
    wrong(group, ValueError, "19 and|student and teacher have", heads=(10, [9, *rest]))
    wrong(group, ValueError, r"rank 0 has the student's tokens \[0, 10\) and the teacher's \[0, 11\)",
          heads=(10, [11, *rest[1:], 9]))  # fmt: skip
    wrong(group, ValueError, f"from 1 to {10 * world}", vocab_size=10 * world + 1)
    wrong(group, ValueError, "at least 1", vocab_size=0)
    wrong(group, ValueError, "say the same vocab_size", vocab_size=[10 * world - r for r in range(world)])
    wrong(group, ValueError, "same number of tokens", tokens=[6 + r for r in range(world)])
    wrong(group, ValueError, "same gradients", frozen=[r > 0 for r in range(world)])
    wrong(group, ValueError, "follow each other", vocab_range=[(0, 10)] * world)
    wrong(group, ValueError, "follow each other", vocab_range=ends, vocab_size=10 * world - 1)
    wrong(group, ValueError, "on all ranks .* or on none", vocab_range=[*ends[:-1], None])
    wrong(group, ValueError, "rank 0 has vocab_range .* 9 rows of teacher_head", vocab_range=ends,
          heads=(10, [9, *rest]))  # fmt: skip
    wrong(group, TypeError, r"\(start, end\)", vocab_range=7)
    wrong(group, ValueError, "0 <= start", vocab_range=(3, 2))
    for name, value in (("sequence_parallel", True), ("vocab_range", (0, 10))):
        try:
            linear_kl_loss(*[torch.randn(10, 8)] * 4, **{name: value})
        except ValueError as e:
            assert "needs tp_group" in str(e)
        else:
            raise AssertionError(name)


@case
def a_rank_that_raises_alone(group):
    """The others raise too, once the group's timeout is over."""
    members = dist.get_process_group_ranks(group)
    short = dist.new_group(members, use_local_synchronization=True)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), short)
    tensors = [torch.randn(6, 8) for _ in range(4)]
    begin = time.monotonic()
    try:
        linear_kl_loss(*tensors, tp_group=short, temperature=-1.0 if group.rank() == 0 else 1.0)
    except (ValueError, RuntimeError):
        assert time.monotonic() - begin < 20
    else:
        raise AssertionError("no error")


class Counted:
    """What is sent while it is open: by collective, the bytes that this rank contributes to each."""

    def __enter__(self):
        self.calls, self.real = [], {name: getattr(dist, name) for name in COLLECTIVES}
        for name, f in self.real.items():
            setattr(dist, name, self.counting(name, f))
        return self

    def counting(self, name, f):
        def counted(*tensors, **options):
            self.calls.append((name, tensors[-1].nbytes))
            return f(*tensors, **options)

        return counted

    def __exit__(self, *_):
        for name, f in self.real.items():
            setattr(dist, name, f)


@case
def what_is_sent(group):
    """The collectives of a call and their bytes are the documented ones."""
    gather, scatter, reduce = COLLECTIVES
    world = group.size()
    for dtype, divergence, sequence, reduction in itertools.product(
        (torch.bfloat16, torch.float64), ("forward_kl", "jsd"), (False, True), ("mean", "none")
    ):
        size = 8 if dtype == torch.float64 else 4
        p = Problem(group, even(world), dtype, masked=0)
        tokens = N // world if sequence else N
        hidden = p.hidden[:tokens].clone().requires_grad_()
        teacher_hidden = p.teacher_hidden[:tokens]
        states = [(gather, 5 * size * N)] + [(gather, 2 * size * N)] * (divergence == "jsd")
        inputs = [(gather, hidden.nbytes), (gather, teacher_hidden.nbytes)] * sequence
        gradient = (scatter if sequence else reduce, size * N * H)
        call = {"tp_group": group, "sequence_parallel": sequence, "divergence": divergence}
        heads = p.shard(p.head, 0), p.shard(p.teacher_head, 1)
        with Counted() as sent, torch.no_grad():
            linear_kl_loss(hidden, heads[0], teacher_hidden, heads[1], return_parts=True, **call)
        assert sent.calls == [(gather, 64), *inputs, (gather, 9 * size * N), *states[1:]], sent.calls
        for needs_grad in (False, True):
            expected = [(gather, 64), *inputs, *states]
            if needs_grad and reduction == "none":
                expected += [(gather, 64), *inputs]
            expected += [gradient] * needs_grad
            with Counted() as sent, torch.set_grad_enabled(needs_grad):
                loss = linear_kl_loss(hidden, heads[0], teacher_hidden, heads[1], reduction=reduction, **call)
                if needs_grad:
                    loss.sum().backward()
            assert sent.calls == expected, (sent.calls, expected)


@case
def compiled(group):
    """No graph break; the same bits as eager."""
    world, rank = group.size(), group.rank()
    p = Problem(group, even(world))
    rows = slice(rank * N // world, (rank + 1) * N // world)
    hidden, head = p.hidden[rows].requires_grad_(), p.shard(p.head, 0).requires_grad_()
    teacher = p.teacher_hidden[rows], p.shard(p.teacher_head, 1)

    def loss(hidden, head, teacher_hidden, teacher_head, mask, temperature):
        return linear_kl_loss(
            hidden, head, teacher_hidden, teacher_head, mask=mask, temperature=temperature, tp_group=group,
            sequence_parallel=True, vocab_size=V,
        )  # fmt: skip

    def with_grads(f):
        value = f(hidden, head, *teacher, p.mask, 1.5)
        return value.detach(), *torch.autograd.grad(value, (hidden, head))

    fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(with_grads(fast), with_grads(loss), strict=True):
        assert torch.equal(actual, expected)


class Late(vocab_parallel.Gathered):
    """An exchange that comes as late as it may, and sees whether its buffers are left alone until then."""

    late: list = []  # noqa: RUF012

    def __init__(self, part, group):
        super().__init__(part, group)
        self.wait_for = super().wait
        self.real, self.before = super().wait().clone(), part.clone()
        self._parts.fill_(torch.nan if part.is_floating_point() else -1)
        self.late.append("send")

    def wait(self):
        assert torch.equal(self._part.nan_to_num(7.5), self.before.nan_to_num(7.5)), (
            "written while it is sent"
        )
        self._parts.copy_(self.real.view_as(self._parts))
        self.late.append("wait")
        return super().wait()


@case
def gpu_exchange_is_late(group):
    """Store makes the next chunk's logits between the start of an exchange and its end; what is on its way is
    neither read nor written.
    """
    product = matmul_fp32

    def logged(a, b, out, accumulate):
        Late.late.append("gemm")
        product(a, b, out, accumulate)

    for divergence in ("forward_kl", "jsd"):
        Late.late.clear()
        late = mock.patch.object(vocab_parallel, "Gathered", Late)
        gemms = mock.patch.object(vocab_parallel_cases, "matmul_fp32", logged)
        with late, gemms:
            numbers = {"chunk_rows": 9, "dz_rows": N}
            check(group, gpu=numbers, schedule="store", divergence=divergence)
        log = list(Late.late)  # without the exchange of how the ranks call, which find_shard() makes
        gemm = ["gemm", "gemm"]
        if divergence == "forward_kl":
            expected = [*gemm, "send", *([*gemm, "send", "wait"] * 3), "wait"]
        else:
            again = ["wait", "send"]
            expected = [*gemm, "send", *([*gemm, *again, "send", "wait"] * 3), *again, "wait"]
        assert log == [*expected, *gemm], log


@case
def gpu_scratch_is_planned(group):
    """Both buffers of logits are in the plan, which all ranks make alike however wide their shards are."""
    world = group.size()
    uneven = [V - 40 * (world - 1), *[40] * (world - 1)]
    for schedule, budget in itertools.product(("store", "recompute"), (30_000, 1 << 16, None)):
        p = Problem(group, uneven, torch.bfloat16)
        hidden, head = p.hidden.requires_grad_(), p.shard(p.head, 0).requires_grad_()
        rest = {"schedule": schedule, "workspace_bytes": budget, "tp_group": group}
        with gpu_schedule() as (plans, calls):
            linear_kl_loss(hidden, head, p.teacher_hidden, p.shard(p.teacher_head, 1), **rest)
        (plan,), (call,) = plans, calls
        public = plan_linear_kl_loss(
            N,
            max(uneven),
            H,
            HT,
            schedule=schedule,
            workspace_bytes=plan.budget_bytes,
            device="cuda",
            tp_size=world,
        )
        assert public == plan
        assert budget is None or plan.workspace_bytes <= budget
        found = sum(x.nbytes for x in call.buffers.values())
        planned = sum(plan.part_bytes[:2])
        assert found == planned if p.rank == 0 else found <= planned, (schedule, budget, found, planned)
        numbers = [None] * world
        dist.all_gather_object(numbers, (plan.chunk_rows, plan.dz_rows, plan.tile), group=group)
        assert len(set(numbers)) == 1


@case
def gpu_what_is_sent(group):
    """One exchange a chunk of rows, JSD two."""
    gather, _, reduce = COLLECTIVES
    p = Problem(group, even(group.size()), torch.bfloat16)
    hidden, head = p.hidden.requires_grad_(), p.shard(p.head, 0).requires_grad_()
    sizes = [7, 7, 1, 7, 7, 1, 6]
    for divergence in ("reverse_kl", "jsd"):
        rest = {"schedule": "store", "divergence": divergence, "tp_group": group}
        with gpu_schedule(**STORE["gpu"]), Counted() as sent:
            linear_kl_loss(hidden, head, p.teacher_hidden, p.shard(p.teacher_head, 1), **rest)
        states = [(gather, 20 * n) for n in sizes] + [(gather, 8 * n) for n in sizes] * (divergence == "jsd")
        assert sorted(sent.calls) == sorted([(gather, 64), *states, (reduce, 4 * N * H)])
        assert sent.calls[-1] == (reduce, 4 * N * H)


@case
def heads_are_exchanged_once(group):
    """Where the host must not wait: what is known is compared, and not read."""
    rank, world = group.rank(), group.size()
    parallel = vocab_parallel.Parallel(group.group_name)
    arguments = (parallel, 10 + rank, 10 + rank, 10 * world, 6, (True, "auto"), 1 << 20, torch.device("cpu"))
    first = find_shard(*arguments, waits=False)
    reads = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten._to_copy):
                reads.append(str(func))
            return func(*args, **(kwargs or {}))

    fewer = (*arguments[:4], 5, *arguments[5:])  # other tokens: no reason to read
    find_shard(*fewer, waits=False)
    with Counted() as sent, Reads():
        again = [find_shard(*a, waits=False) for a in (arguments, fewer)]
    assert again == [first, first] and not reads and [nbytes for _, nbytes in sent.calls] == [64, 64]
    try:
        other = (*arguments[:4], 6 + (rank == 0), *arguments[5:])
        find_shard(*other, waits=False)
    except RuntimeError as e:
        assert "different tokens" in str(e)
    else:
        raise AssertionError("no error")
