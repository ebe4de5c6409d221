"""linear_kl_loss with a vocabulary over several ranks: cases that each rank of a group runs, and what starts
the ranks: processes of this machine, joined by gloo.
"""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import time
import traceback
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from kl_loss.cases import matmul_fp32
from kl_loss.oracle import oracle_linear, oracle_metrics
from kl_loss.problems import BETA, GRADIENT_BOUND, make_linear, relative, to_numpy
from minitron_kernels import linear_kl_loss
from minitron_kernels.ops.kl_loss import gemm_gpu, linear_gpu, linear_op, vocab_parallel
from minitron_kernels.ops.kl_loss.epilogues import native_epilogues
from tools.host_shim import load

N, H, HT, V = 36, 40, 72, 269
SHAPE = (12, 3)  # of the tokens, N in all; the first dimension is cut by sequence parallelism
COLLECTIVES = (vocab_parallel._all_gather, vocab_parallel._reduce_scatter, "all_reduce")


def even(world, total=V):
    return [total * (r + 1) // world - total * r // world for r in range(world)]


@contextmanager
def gpu_schedule(**numbers):
    """The schedules of GPUs, on CPU tensors: with the CUDA kernels that the shim runs, and plans of these
    numbers. Gives the plans and calls that are made.
    """
    made, calls, plan, begin = [], [], linear_gpu.plan, linear_gpu.Call.__init__

    def planned(*arguments):
        own = plan(*arguments)
        made.append(dataclasses.replace(own, **numbers) if own.schedule != "forward" else own)
        return made[-1]

    def begun(self, *arguments):
        begin(self, *arguments)
        calls.append(self)

    kernels = native_epilogues(load("kl_loss").ops)
    with ExitStack() as stack:
        for where, name, what in (
            (linear_op, "_on_gpu", lambda x: True),
            (linear_op, "EPILOGUES", {"native": lambda: kernels}),
            (gemm_gpu, "matmul", matmul_fp32),
            (linear_gpu, "plan", planned),
            (linear_gpu.Call, "__init__", begun),
        ):
            stack.enter_context(mock.patch.object(where, name, what))
        yield made, calls


class Problem:
    """One set of tensors on all ranks, cut into shards with padding of NaN."""

    def __init__(
        self, group, widths, dtype=torch.float32, padding=None, biased=False, distance=3.0, masked=0.2
    ):
        self.rank, self.widths = group.rank(), widths
        starts = np.cumsum([0, *widths])
        self.range = int(starts[self.rank]), int(starts[self.rank + 1])
        self.total, self.dtype = int(starts[-1]), dtype
        tensors = make_linear(N, H, HT, self.total, dtype, distance=distance)
        self.hidden, self.head, self.teacher_hidden, self.teacher_head = tensors
        g = torch.Generator().manual_seed(7)
        self.mask = torch.rand(N, generator=g) >= masked
        self.labels = torch.randint(0, self.total, (N,), generator=g)
        self.bias = [torch.randn(self.total, generator=g).to(dtype) if biased else None for _ in range(2)]
        if biased:  # raises the maximum from shard to shard, and one shard may have no token
            self.bias[0] += torch.linspace(-9, 9, self.total).to(dtype)
        if biased and biased != "finite":
            self.bias[0][: self.total // 8] = -torch.inf
            self.bias[1][: self.total // 8] = -torch.inf
        self.padding = padding or [(0, 0)] * len(widths)  # of student and teacher, rows behind each shard

    def shard(self, x, side):
        if x is None:
            return None
        rows = self.padding[self.rank][side]
        own = x[self.range[0] : self.range[1]]
        return torch.cat((own, own.new_full((rows, *own.shape[1:]), torch.nan)))

    def truth(self, row_weight=None, **options):
        tensors = to_numpy(self.hidden, self.head, self.teacher_hidden, self.teacher_head)
        student_bias, teacher_bias = to_numpy(*self.bias)
        return oracle_linear(
            *tensors, student_bias=student_bias, teacher_bias=teacher_bias, row_weight=row_weight, **options
        )

    def logits(self):
        """The student's, before scale and softcap."""
        hidden, head, bias = to_numpy(self.hidden, self.head, self.bias[0])
        return hidden @ head.T + (0.0 if bias is None else bias)


def same_on_all_ranks(x, group):
    """To the bit."""
    parts = [None] * group.size()
    dist.all_gather_object(parts, x.detach().double().tolist(), group=group)
    assert all(str(part) == str(parts[0]) for part in parts), f"the ranks differ: {parts}"


ORACLE = {"student_logit_scale": "student_scale"}
NOT_OF_LOSS = ("schedule", "workspace_bytes", "ce_weight", "return_parts", "label_smoothing", "temperature")


def check(
    group,
    widths=None,
    dtype=torch.float32,
    divergence="forward_kl",
    padding=None,
    explicit=False,
    sequence_parallel=False,
    biased=False,
    reduction="mean",
    frozen=(),
    accumulator=False,
    masked=0.2,
    gpu=None,
    **options,
):
    """Loss, parts and gradients of one call against float64 NumPy."""
    world, rank, wide = group.size(), group.rank(), dtype == torch.float64
    p = Problem(group, widths or even(world), dtype, padding, biased, masked=masked)
    rows = slice(rank * N // world, (rank + 1) * N // world) if sequence_parallel else slice(None)
    cut, own = slice(*p.range), (-1, *SHAPE[1:])
    hidden = p.hidden[rows].reshape(*own, H).requires_grad_("hidden" not in frozen)
    head = p.shard(p.head, 0).requires_grad_("head" not in frozen and not accumulator)
    bias = p.shard(p.bias[0], 0)
    if bias is not None:
        bias.requires_grad_("bias" not in frozen)
    buffer = (
        torch.full(head.shape, 2.0, dtype=torch.float64 if wide else torch.float32) if accumulator else None
    )
    given = {"vocab_range": p.range} if explicit else {"vocab_size": p.total} if padding else {}
    if "ce_weight" in options or "return_parts" in options:
        given["labels"] = torch.where(p.mask, p.labels, -100).view(SHAPE)
    keep = p.mask.numpy().astype(float)
    per_token = reduction == "none"
    weight = np.linspace(0.5, 1.5, N) * keep if per_token else keep / max(keep.sum(), 1.0)

    with gpu_schedule(**gpu) if gpu is not None else nullcontext():
        result = linear_kl_loss(
            hidden, head, p.teacher_hidden[rows].reshape(*own, HT), p.shard(p.teacher_head, 1),
            mask=p.mask.view(SHAPE), student_bias=bias, teacher_bias=p.shard(p.bias[1], 1),
            divergence=divergence, reduction=reduction, tp_group=group, sequence_parallel=sequence_parallel,
            grad_head_accumulator=buffer, **given, **options,
        )  # fmt: skip
        loss = result.loss if "return_parts" in options else result
        if loss.requires_grad:
            incoming = np.linspace(0.5, 1.5, N).reshape(SHAPE) if per_token else np.array(1.0)
            loss.backward(torch.from_numpy(incoming).to(loss.dtype))

    beta = divergence if isinstance(divergence, float) else BETA[divergence]
    told = {ORACLE.get(name, name): x for name, x in options.items() if name not in NOT_OF_LOSS}
    told |= {"beta": beta, "inv_tau": 1 / options.get("temperature", 1.0)}
    told["label_smoothing"] = options.get("label_smoothing", 0.0)
    labels, factor = np.where(keep > 0, p.labels.numpy(), -1), options.get("ce_weight", 0.0)
    of_ce = {"labels": labels, "ce_weight": weight * factor} if factor else {}
    kl, true_hidden, true_head, true_bias = p.truth(weight, **of_ce, **told)
    ce, entropy, label_logprob, _ = oracle_metrics(p.logits(), labels, **told)

    def reduced(x):
        return x * keep if per_token else (np.where(keep > 0, x, 0.0) * weight).sum()

    parts = [("loss", loss, kl + factor * ce if factor else kl)]
    if "return_parts" in options:
        parts += [("kl", result.kl, kl), ("ce", result.ce, ce), ("entropy", result.entropy, entropy)]
        parts += [("label_logprob", result.label_logprob, label_logprob)]
        assert result.num_tokens == keep.sum()
    for name, x, truth in parts:
        same_on_all_ranks(x, group)
        found, expected = x.detach().double().numpy().reshape(-1), np.reshape(reduced(truth), -1)
        np.testing.assert_allclose(found, expected, rtol=1e-12 if wide else 1e-5, atol=1e-30, err_msg=name)
    bound = GRADIENT_BOUND[dtype]
    for name, x, truth in (
        ("hidden", hidden, true_hidden[rows].reshape(*hidden.shape)),
        ("head", head, true_head[cut]),
        ("bias", bias, true_bias[cut]),
        ("accumulator", buffer, true_head[cut]),
    ):
        grad = buffer - 2.0 if name == "accumulator" and accumulator else None if x is None else x.grad
        wanted = x is not None and (x.requires_grad or name == "accumulator")
        assert (grad is not None) == wanted, name
        if wanted:
            assert (grad[len(truth) :] == 0).all(), f"padding of {name}"
            error, size = relative(grad[: len(truth)], truth), np.abs(truth).max(initial=0.0)
            assert error <= bound or size < 1e-20, f"{name}: error {error:.3g}, allowed {bound:.3g}"


PARTS = {"return_parts": True, "ce_weight": 0.7, "label_smoothing": 0.1}
STORE = {"chunk_rows": 7, "dz_rows": 15}
RECOMPUTE = {"chunk_rows": 7, "dz_rows": 15, "tile": 64}


def value_cases(world):
    """Names of cases, and what check() gets."""
    uneven = [V - 40 * (world - 1), *[40] * (world - 1)]
    nothing = [*even(world - 1), 0]
    pads = [(3 * r, 5 - r) for r in range(world)]
    behind = [*[(0, 0)] * (world - 1), (7, 2)]
    small = {"workspace_bytes": 400_000}
    return {
        "forward": {},
        "reverse": {"divergence": "reverse_kl"},
        "jsd": {"divergence": "jsd"},
        "skewed_jsd_bf16": {"divergence": 0.3, "dtype": torch.bfloat16, "student_softcap": 6.0, "biased": True},
        "double": {"dtype": torch.float64, "divergence": "reverse_kl", "biased": True, "student_softcap": 6.0},
        "double_jsd": {"dtype": torch.float64, "divergence": "jsd", "widths": uneven, "temperature": 2.0},
        "bias_forward": {"biased": True, "teacher_softcap": 9.0, "student_logit_scale": 1.2},
        "bias_reverse": {"biased": True, "divergence": "reverse_kl", "widths": uneven},
        "bias_jsd": {"biased": True, "divergence": "jsd", "widths": uneven, "reduction": "none"},
        "uneven": {"widths": uneven, "dtype": torch.bfloat16},
        "padding_inside": {"padding": pads, "explicit": True, "widths": uneven},
        "padding_behind": {"padding": behind},
        "padding_only": {"widths": nothing, "padding": [*[(0, 0)] * (world - 1), (6, 4)], "divergence": "jsd"},
        "padding_only_reverse": {"widths": [0, *even(world - 1)], "explicit": True, "divergence": "reverse_kl",
                                 "padding": [(5, 2), *[(0, 0)] * (world - 1)], "sequence_parallel": True},
        "all_masked": {"masked": 2.0, "divergence": "reverse_kl"},
        "sequence": {"sequence_parallel": True, "divergence": "reverse_kl"},
        "sequence_bf16_none": {"sequence_parallel": True, "dtype": torch.bfloat16, "reduction": "none"},
        "store": {"schedule": "store", "dtype": torch.bfloat16, "divergence": "reverse_kl"} | small,
        "recompute": {"schedule": "recompute", "divergence": "jsd", "sequence_parallel": True} | small,
        "none_accumulator": {"reduction": "none", "accumulator": True, "divergence": "jsd"},
        "accumulator_bf16": {"accumulator": True, "dtype": torch.bfloat16, "sequence_parallel": True},
        "frozen_head": {"frozen": ("head",)},
        "frozen_hidden": {"frozen": ("hidden",), "divergence": "reverse_kl"},
        "fp16": {"dtype": torch.float16, "divergence": "reverse_kl"},
        "parts": PARTS | {"biased": "finite", "widths": uneven, "temperature": 2.0},
        "parts_jsd_none": PARTS | {"divergence": "jsd", "reduction": "none", "sequence_parallel": True},
        "parts_double": PARTS | {"dtype": torch.float64, "divergence": "reverse_kl", "student_softcap": 6.0},
        "parts_unsmoothed": {"return_parts": True, "ce_weight": 0.5, "dtype": torch.bfloat16, "widths": nothing,
                             "padding": [*[(1, 0)] * (world - 1), (6, 4)], "explicit": True},
        "parts_accumulator": PARTS | {"accumulator": True, "padding": pads, "explicit": True},
        "gpu_parts_store": PARTS | {"gpu": STORE, "schedule": "store", "temperature": 2.0, "widths": uneven},
        "gpu_parts_jsd": PARTS | {"gpu": STORE, "schedule": "store", "divergence": "jsd", "widths": nothing,
                                  "padding": [*[(1, 0)] * (world - 1), (6, 4)], "explicit": True},
        "gpu_parts_recompute": PARTS | {"gpu": RECOMPUTE, "schedule": "recompute", "biased": "finite",
                                        "divergence": "reverse_kl", "dtype": torch.bfloat16},
        "gpu_parts_none": PARTS | {"gpu": STORE, "schedule": "store", "reduction": "none"},
        "gpu_parts_forward": PARTS | {"gpu": {}, "frozen": ("hidden", "head"), "sequence_parallel": True},
        "gpu_store": {"gpu": STORE, "dtype": torch.bfloat16, "schedule": "store"},
        "gpu_store_jsd": {"gpu": STORE, "divergence": 0.3, "schedule": "store", "biased": True,
                          "student_softcap": 6.0, "widths": uneven},
        "gpu_store_reverse": {"gpu": STORE, "divergence": "reverse_kl", "schedule": "store", "biased": True,
                              "padding": pads, "explicit": True, "sequence_parallel": True},
        "gpu_store_fp16": {"gpu": STORE, "divergence": "reverse_kl", "schedule": "store", "dtype": torch.float16},
        "gpu_one_chunk": {"gpu": {}, "dtype": torch.float16, "temperature": 2.0},
        "gpu_recompute": {"gpu": RECOMPUTE, "schedule": "recompute", "dtype": torch.bfloat16, "widths": uneven,
                          "divergence": "reverse_kl", "sequence_parallel": True, "biased": True},
        "gpu_recompute_jsd": {"gpu": RECOMPUTE, "schedule": "recompute", "divergence": "jsd", "biased": True},
        "gpu_forward": {"gpu": {}, "frozen": ("hidden", "head"), "divergence": "jsd", "widths": uneven},
        "gpu_none": {"gpu": STORE, "schedule": "store", "reduction": "none", "divergence": "jsd",
                     "accumulator": True, "dtype": torch.bfloat16},
        "gpu_padding_only": {"gpu": STORE, "schedule": "store", "divergence": "jsd", "explicit": True,
                             "widths": nothing, "padding": [*[(0, 0)] * (world - 1), (6, 4)]},
        "gpu_padding_only_recompute": {"gpu": RECOMPUTE, "schedule": "recompute", "divergence": "reverse_kl",
                                       "widths": nothing, "padding": [*[(1, 0)] * (world - 1), (6, 4)],
                                       "explicit": True, "sequence_parallel": True},
        "gpu_all_masked": {"gpu": STORE, "schedule": "store", "masked": 2.0, "dtype": torch.float16},
    }  # fmt: skip


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
    wrong(group, ValueError, "reference leaves", backend="reference")
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
    """Store makes the next chunk's logits between the start of an exchange and its end; and what is on its way
    is neither read nor written.
    """
    product = matmul_fp32

    def logged(a, b, out, accumulate):
        Late.late.append("gemm")
        product(a, b, out, accumulate)

    for divergence in ("forward_kl", "jsd"):
        Late.late.clear()
        late = mock.patch.object(vocab_parallel, "Gathered", Late)
        gemms = mock.patch.dict(globals(), {"matmul_fp32": logged})
        with late, gemms:
            check(group, gpu={"chunk_rows": 9, "dz_rows": N}, schedule="store", divergence=divergence)
        log = Late.late[2:]  # after the exchange of how the ranks call
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
        with gpu_schedule(**STORE), Counted() as sent:
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
    first = vocab_parallel.find_shard(*arguments, waits=False)
    reads = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten._to_copy):
                reads.append(str(func))
            return func(*args, **(kwargs or {}))

    fewer = (*arguments[:4], 5, *arguments[5:])  # other tokens: no reason to read
    vocab_parallel.find_shard(*fewer, waits=False)
    with Counted() as sent, Reads():
        again = [vocab_parallel.find_shard(*a, waits=False) for a in (arguments, fewer)]
    assert again == [first, first] and not reads and [nbytes for _, nbytes in sent.calls] == [64, 64]
    try:
        other = (*arguments[:4], 6 + (rank == 0), *arguments[5:])
        vocab_parallel.find_shard(*other, waits=False)
    except RuntimeError as e:
        assert "different tokens" in str(e)
    else:
        raise AssertionError("no error")


# ---- the processes


def runs(world, name):
    """Groups of more than two run what depends on their size."""
    many = {
        "uneven",
        "parts",
        "gpu_parts_store",
        "padding_inside",
        "padding_behind",
        "bias_jsd",
        "bias_reverse",
        "what_is_sent",
    }
    most = {
        "padding_only",
        "gpu_padding_only",
        "parts_jsd_none",
        "padding_only_reverse",
        "double_jsd",
        "recompute",
        "what_does_not_fit",
    }
    return name in {2: {*value_cases(2), *CASES}, 3: many, 4: most}[world]


def run_all(rank, ranks, folder, names):
    """All cases on groups of each size up to `ranks`; what went wrong on this rank goes into a file."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    reports = {}
    for world in range(2, ranks + 1):
        members = list(range(ranks - world, ranks))  # so that ranks of the group are not those of the world
        group = dist.new_group(members)
        if rank in members:
            cases = {name: (check, options) for name, options in value_cases(world).items()}
            cases |= {name: (f, {}) for name, f in CASES.items()}
            for name, (f, options) in cases.items():
                if not (name in names if names else runs(world, name)):
                    continue
                try:
                    f(group, **options)
                    reports[f"{world}-{name}"] = None
                except Exception:
                    reports[f"{world}-{name}"] = traceback.format_exc()[-3000:]
                dist.barrier(group)
        dist.barrier()
    (Path(folder) / f"report{rank}.json").write_text(json.dumps(reports))
    dist.destroy_process_group()


def start(ranks, folder, names=(), timeout=120):
    """Reports of all ranks: by case, the errors by rank."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    code = f"from kl_loss.vocab_parallel_cases import run_all; import sys; run_all(int(sys.argv[1]), {ranks}, {str(folder)!r}, {list(names)!r})"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    errors = []
    try:
        for rank, process in enumerate(processes):
            _, text = process.communicate(timeout=timeout)
            if process.returncode:
                errors.append(f"rank {rank}: {text[-3000:]}")
    finally:
        for process in processes:
            process.kill()
    assert not errors, "\n".join(errors)
    found = {}
    for rank in range(ranks):
        for name, error in json.loads((Path(folder) / f"report{rank}.json").read_text()).items():
            found.setdefault(name, {})[rank] = error
    return found


if __name__ == "__main__":
    import shutil
    import tempfile

    folder = tempfile.mkdtemp()
    reports = start(int(sys.argv[1]), folder, sys.argv[2:])
    shutil.rmtree(folder)
    for name, errors in reports.items():
        bad = {rank: error for rank, error in errors.items() if error}
        print(name, "ok" if not bad else list(bad.values())[0][-700:])
