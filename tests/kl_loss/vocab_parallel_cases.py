"""linear_kl_loss with a vocabulary over several ranks: cases that each rank of a group runs, and what starts
the ranks: processes of this machine, joined by gloo.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from kl_loss.oracle import oracle_linear
from kl_loss.problems import BETA, GRADIENT_BOUND, make_linear, relative, to_numpy
from minitron_kernels import linear_kl_loss
from minitron_kernels.ops.kl_loss import vocab_parallel

N, H, HT, V = 36, 40, 72, 269
SHAPE = (12, 3)  # of the tokens, N in all; the first dimension is cut by sequence parallelism
COLLECTIVES = (vocab_parallel._all_gather, vocab_parallel._reduce_scatter, "all_reduce")


def even(world, total=V):
    return [total * (r + 1) // world - total * r // world for r in range(world)]


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


def same_on_all_ranks(x, group):
    """To the bit."""
    parts = [None] * group.size()
    dist.all_gather_object(parts, x.detach().double().tolist(), group=group)
    assert all(str(part) == str(parts[0]) for part in parts), f"the ranks differ: {parts}"


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
    distance=3.0,
    **options,
):
    """Loss and gradients of one call against float64 NumPy."""
    world, rank = group.size(), group.rank()
    p = Problem(group, widths or even(world), dtype, padding, biased, distance, masked)
    rows = slice(rank * N // world, (rank + 1) * N // world) if sequence_parallel else slice(None)
    own = (-1, *SHAPE[1:])
    hidden = p.hidden[rows].reshape(*own, H).requires_grad_("hidden" not in frozen)
    head = p.shard(p.head, 0).requires_grad_("head" not in frozen and not accumulator)
    bias = p.shard(p.bias[0], 0)
    if bias is not None:
        bias.requires_grad_()
    buffer = None
    if accumulator:
        buffer = torch.full(head.shape, 2.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    given = {}
    if explicit:
        given["vocab_range"] = p.range
    elif padding:
        given["vocab_size"] = p.total
    loss = linear_kl_loss(
        hidden, head, p.teacher_hidden[rows].reshape(*own, HT), p.shard(p.teacher_head, 1),
        mask=p.mask.view(SHAPE), student_bias=bias, teacher_bias=p.shard(p.bias[1], 1), divergence=divergence,
        reduction=reduction, tp_group=group, sequence_parallel=sequence_parallel, grad_head_accumulator=buffer,
        **given, **options,
    )  # fmt: skip
    same_on_all_ranks(loss, group)
    keep = p.mask.numpy().astype(float)
    if reduction == "none":
        weight = np.linspace(0.5, 1.5, N) * keep
        incoming = torch.linspace(0.5, 1.5, N, dtype=torch.float64).view(SHAPE).to(loss.dtype)
    else:
        weight, incoming = keep / max(keep.sum(), 1.0), torch.tensor(1.0, dtype=loss.dtype)
    beta = divergence if isinstance(divergence, float) else BETA[divergence]
    names = {"temperature": "inv_tau", "student_logit_scale": "student_scale"}
    told = {
        names.get(k, k): 1 / v if k == "temperature" else v
        for k, v in options.items()
        if k not in ("schedule", "workspace_bytes")
    }
    true_loss, true_hidden, true_head, true_bias = p.truth(weight, beta=beta, **told)
    expected = true_loss * keep if reduction == "none" else (true_loss * weight).sum()
    wide = dtype == torch.float64
    found = loss.detach().double().numpy().reshape(np.shape(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-12 if wide else 1e-5, atol=1e-30)
    loss.backward(incoming)
    bound = GRADIENT_BOUND[dtype]
    cut = slice(*p.range)
    for name, x, truth, padded in (
        ("hidden", hidden, true_hidden[rows].reshape(*hidden.shape), False),
        ("head", head, true_head[cut], True),
        ("bias", bias, true_bias[cut], True),
    ):
        if x is None or not x.requires_grad:
            assert x is None or x.grad is None
            continue
        grad = x.grad
        if padded:
            assert (grad[len(truth) :] == 0).all(), f"padding of {name}"
            grad = grad[: len(truth)]
        if truth.size:
            error = relative(grad, truth)
            size = np.abs(truth).max()
            assert error <= bound or size < 1e-20, f"{name}: error {error:.3g}, allowed {bound:.3g}"
    if accumulator:
        added, truth = buffer - 2.0, true_head[cut]
        assert (added[len(truth) :] == 0).all()
        if truth.size:
            assert relative(added[: len(truth)], truth) <= max(bound, 1e-5 if not wide else 0)


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
    many = {"uneven", "padding_inside", "padding_behind", "bias_jsd", "bias_reverse", "what_is_sent"}
    most = {"padding_only", "padding_only_reverse", "double_jsd", "recompute", "what_does_not_fit"}
    return name in {2: {*value_cases(2), *CASES}, 3: many, 4: most}[world]


def run_all(rank, ranks, folder, names):
    """All cases on groups of each size up to `ranks`; what went wrong on this rank goes into a file."""
    torch.set_num_threads(1)
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
