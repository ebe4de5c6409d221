"""linear_kl_loss with a vocabulary over several ranks: values, as each rank of a group checks them."""

import dataclasses
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from kl_loss.cases import matmul_fp32
from kl_loss.oracle import oracle_linear, oracle_metrics
from kl_loss.problems import BETA, GRADIENT_BOUND, make_linear, relative, to_numpy
from minitron_kernels import linear_kl_loss
from minitron_kernels.ops.kl_loss import gemm_gpu, linear_gpu, linear_op
from minitron_kernels.ops.kl_loss.epilogues import native_epilogues
from tools.host_shim import load

N, H, HT, V = 36, 40, 72, 269
SHAPE = (12, 3)  # of the tokens, N in all; the first dimension is cut by sequence parallelism


def even(world, total=V):
    return [total * (r + 1) // world - total * r // world for r in range(world)]


@contextmanager
def gpu_schedule(fused=False, **numbers):
    """The schedules of GPUs, on CPU tensors: with the CUDA kernels that the shim runs, and plans of these
    numbers. Gives the plans and calls that are made. `fused`: stats come as of a fused kernel.
    """
    made, calls, plan, begin = [], [], linear_gpu.plan, linear_gpu.Call.__init__

    def planned(*arguments):
        own = plan(*arguments)
        made.append(dataclasses.replace(own, **numbers) if own.schedule != "forward" else own)
        return made[-1]

    def begun(self, *arguments):
        begin(self, *arguments)
        calls.append(self)

    kernels = native = native_epilogues(load("kl_loss").ops)

    def linear_stats(student, teacher, mask, loss, stats, vocab_size, options):
        nothing, frozen = loss.new_empty(0, student[0].shape[1]), (False, False, False)
        arguments = (mask, None, None, None, frozen, vocab_size, options, "auto", 1 << 29, native)
        linear_gpu.linear_kl_loss_((loss, stats, *[nothing] * 3), student, teacher, *arguments)

    if fused:
        kernels = dataclasses.replace(native, linear_stats=linear_stats)
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
        if biased is True:
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
NOT_OF_LOSS = (
    "schedule",
    "workspace_bytes",
    "backend",
    "ce_weight",
    "return_parts",
    "label_smoothing",
    "temperature",
)


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


REVERSE, JSD = {"divergence": "reverse_kl"}, {"divergence": "jsd"}
BF16, FP16, FP64 = ({"dtype": x} for x in (torch.bfloat16, torch.float16, torch.float64))
SEQUENCE, BIASED, EXPLICIT = {"sequence_parallel": True}, {"biased": True}, {"explicit": True}
PARTS = {"return_parts": True, "ce_weight": 0.7, "label_smoothing": 0.1}
REFERENCE = {"backend": "reference", "dtype": torch.float64}
# several chunks of rows, groups of them and tiles
STORE = {"gpu": {"chunk_rows": 7, "dz_rows": 15}, "schedule": "store"}
FUSED = {"gpu": {"fused": True}, "frozen": ("hidden", "head", "bias")}
RECOMPUTE = {"gpu": {"chunk_rows": 7, "dz_rows": 15, "tile": 64}, "schedule": "recompute"}


def value_cases(world):
    """Names of cases, and what check() gets."""
    uneven = {"widths": [V - 40 * (world - 1), *[40] * (world - 1)]}
    full = [(0, 0)] * (world - 1)
    inside = EXPLICIT | {"padding": [(3 * r, 5 - r) for r in range(world)]}
    nothing = {"widths": [*even(world - 1), 0], "padding": [*full, (6, 4)]}
    first_nothing = EXPLICIT | {"widths": [0, *even(world - 1)], "padding": [(5, 2), *full]}
    masked_out = {"widths": [V // 8, *even(world - 1, V - V // 8)]}  # with a bias: all of the first shard
    small = {"workspace_bytes": 400_000}
    capped = BIASED | {"student_softcap": 6.0}
    return {
        "forward": {},
        "reverse": REVERSE,
        "jsd": JSD,
        "skewed_jsd_bf16": BF16 | capped | {"divergence": 0.3},
        "double": FP64 | REVERSE | capped,
        "double_jsd": FP64 | JSD | uneven | {"temperature": 2.0},
        "bias_forward": BIASED | {"teacher_softcap": 9.0, "student_logit_scale": 1.2},
        "bias_reverse": BIASED | REVERSE | uneven,
        "bias_jsd": BIASED | JSD | uneven | {"reduction": "none"},
        "masked_out": BIASED | masked_out,
        "masked_out_reverse": REVERSE | masked_out | {"biased": "student", "reduction": "none"},
        "masked_out_in_student": masked_out | {"biased": "student"},
        "gpu_masked_out": STORE | BIASED | masked_out,
        "gpu_masked_out_in_student": STORE | masked_out | {"biased": "student"},
        "uneven": BF16 | uneven,
        "padding_inside": uneven | inside,
        "padding_behind": {"padding": [*full, (7, 2)]},
        "padding_only": JSD | nothing,
        "padding_only_reverse": REVERSE | SEQUENCE | first_nothing,
        "all_masked": REVERSE | {"masked": 2.0},
        "sequence": REVERSE | SEQUENCE,
        "sequence_bf16_none": BF16 | SEQUENCE | {"reduction": "none"},
        "store": BF16 | REVERSE | small | {"schedule": "store"},
        "recompute": JSD | SEQUENCE | small | {"schedule": "recompute"},
        "none_accumulator": JSD | {"reduction": "none", "accumulator": True},
        "accumulator_bf16": BF16 | SEQUENCE | {"accumulator": True},
        "frozen_head": {"frozen": ("head",)},
        "frozen_hidden": REVERSE | {"frozen": ("hidden",)},
        "reference": REFERENCE | REVERSE | SEQUENCE | uneven | inside | BIASED,
        "reference_parts": REFERENCE | PARTS | JSD | nothing | {"reduction": "none"},
        "fp16": FP16 | REVERSE,
        "parts": PARTS | uneven | {"biased": "finite", "temperature": 2.0},
        "parts_jsd_none": PARTS | JSD | SEQUENCE | {"reduction": "none"},
        "parts_double": PARTS | FP64 | REVERSE | {"student_softcap": 6.0},
        "parts_unsmoothed": BF16 | nothing | {"return_parts": True, "ce_weight": 0.5},
        "parts_alone": uneven | {"return_parts": True, "label_smoothing": 0.1},
        "gpu_parts_alone": STORE | JSD | {"return_parts": True},
        "parts_accumulator": PARTS | inside | {"accumulator": True},
        "gpu_store": STORE | BF16,
        "gpu_store_jsd": STORE | uneven | capped | {"divergence": 0.3},
        "gpu_store_reverse": STORE | REVERSE | BIASED | SEQUENCE | inside,
        "gpu_store_fp16": STORE | REVERSE | FP16,
        "gpu_one_chunk": FP16 | {"gpu": {}, "temperature": 2.0},
        "gpu_recompute": RECOMPUTE | REVERSE | BF16 | SEQUENCE | BIASED | uneven,
        "gpu_recompute_jsd": RECOMPUTE | JSD | BIASED,
        "gpu_forward": JSD | uneven | {"gpu": {}, "frozen": ("hidden", "head")},
        "gpu_fused": BF16 | BIASED | masked_out | FUSED,
        "gpu_fused_reverse": BF16 | REVERSE | masked_out | FUSED | {"biased": "student"},
        "gpu_fused_infinite": BF16 | masked_out | FUSED | {"biased": "student"},
        "gpu_none": STORE | JSD | BF16 | {"reduction": "none", "accumulator": True},
        "gpu_padding_only": STORE | JSD | nothing,
        "gpu_padding_only_recompute": RECOMPUTE | REVERSE | SEQUENCE | first_nothing,
        "gpu_all_masked": STORE | FP16 | {"masked": 2.0},
        "gpu_parts_store": PARTS | STORE | uneven | {"temperature": 2.0},
        "gpu_parts_jsd": PARTS | STORE | JSD | nothing,
        "gpu_parts_recompute": PARTS | RECOMPUTE | REVERSE | BF16 | {"biased": "finite"},
        "gpu_parts_none": PARTS | STORE | {"reduction": "none"},
        "gpu_parts_forward": PARTS | SEQUENCE | {"gpu": {}, "frozen": ("hidden", "head")},
    }
