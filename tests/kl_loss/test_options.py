"""All options of the losses at once, in pairs and more, against the definition in float64."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minitron_kernels as mk
from kl_loss.oracle import oracle_linear, oracle_rows
from kl_loss.problems import BETA, make_linear, to_numpy
from minitron_kernels.ops.kl_loss import options, plan_cpu
from minitron_kernels.ops.kl_loss.blocks_cpu import CHAIN, PANEL
from minitron_kernels.ops.kl_loss.divergence import (
    METRIC_CE,
    NUM_METRIC_STATE,
    NUM_METRICS,
    NUM_STATS,
    STAT_KL,
    Divergence,
)

pytestmark = pytest.mark.native
LOSS_BOUND = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-5}
GRADIENT_BOUND = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 8e-3}


@dataclass
class Case:
    """What is passed, and what the definition makes of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    tensors: list[torch.Tensor]
    options: dict = field(default_factory=dict)
    biases: dict = field(default_factory=dict)
    counted: np.ndarray = None
    vocab_size: int = 0
    factor: torch.Tensor = None  # the gradient that comes in

    def definition(self):
        """Keywords of the oracle."""
        options, names = self.options, {}
        for side in ("student", "teacher"):
            names[f"{side}_scale"] = float(options.get(f"{side}_logit_scale", 1.0))
            names[f"{side}_softcap"] = float(options.get(f"{side}_softcap") or 0.0)
        divergence = options.get("divergence", "forward_kl")
        beta = float(BETA.get(divergence, divergence))
        return {**names, "beta": beta, "inv_tau": 1 / float(options.get("temperature", 1.0))}

    def row_weight(self):
        """Each row's factor in the loss as it is returned."""
        options = self.options
        tau = float(options.get("temperature", 1.0)) if options.get("temperature_squared") else 1.0
        weight = self.counted * tau**2
        if options.get("reduction", "mean") == "mean":
            items = options.get("num_items")
            weight = weight / (max(self.counted.sum(), 1) if items is None else float(items))
        return weight


SOME = st.sampled_from
NUMBER = SOME([0.25, 0.7, 1.0, 1.6, 3.0])


@st.composite
def cases(draw):
    dtype = draw(SOME([torch.float64, torch.float64, torch.float32, torch.bfloat16]))
    shape = draw(SOME([(1,), (5,), (64,), (65,), (2, 3), (130,), (1, 4, 5)]))
    N, seed = int(np.prod(shape)), draw(st.integers(0, 99))
    H, Ht, V = draw(SOME([1, 8, 33])), draw(SOME([1, 8, 20])), draw(SOME([1, 2, 63, 64, 65, 200]))
    padding = draw(SOME([(0, 0), (0, 0), (3, 0), (0, 5), (2, 7)]))
    g = torch.Generator().manual_seed(seed)
    tensors = make_linear(N, H, Ht, V, dtype, distance=1.0, seed=seed)
    for i, more in zip((1, 3), padding, strict=True):
        tensors[i] = torch.cat([tensors[i], torch.full((more, tensors[i].shape[1]), 7.0, dtype=dtype)])
    case = Case(dtype, shape, [x.clone() for x in tensors], vocab_size=V)
    options = case.options
    if any(padding) or draw(st.booleans()):
        options["vocab_size"] = V
    counted = torch.ones(N, dtype=torch.bool)
    if draw(st.booleans()):
        mask = torch.rand(N, generator=g) < draw(SOME([0.0, 0.6, 1.0]))
        options["mask"], counted = mask.reshape(shape), counted & mask
        if draw(st.booleans()):
            options["mask"] = torch.stack([options["mask"], ~options["mask"]], -1)[..., 0]  # with strides
    if draw(st.booleans()):
        ignored = draw(SOME([-100, -1, 0]))
        labels = torch.randint(0, V, (N,), generator=g, dtype=draw(SOME([torch.int64, torch.int32])))
        labels[torch.rand(N, generator=g) < 0.3] = ignored
        options["labels"], counted = labels.reshape(shape), counted & (labels != ignored)
        if ignored != -100:
            options["ignore_index"] = ignored
    case.counted = counted.numpy().astype(np.float64)
    for name, value in {
        "temperature": NUMBER,
        "temperature_squared": st.booleans(),
        "divergence": SOME(["forward_kl", "reverse_kl", "jsd", 0, 1, 0.05, 0.8]),
        "student_softcap": SOME([None, 3.0, 20]),
        "teacher_softcap": SOME([None, 4, 15.0]),
        "student_logit_scale": NUMBER,
        "teacher_logit_scale": NUMBER,
        "reduction": SOME(["mean", "mean", "sum", "none"]),
    }.items():
        if draw(st.booleans()):
            options[name] = draw(value)
    if options.get("reduction", "mean") == "mean":
        items = draw(SOME([None, 7, 0.5, torch.tensor(9), torch.tensor([2.5])]))
        if items is not None:
            options["num_items"] = items
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    masked_out = torch.rand(V, generator=g) < 0.2
    masked_out[draw(st.integers(0, V - 1))] = False  # one token at least is possible
    for side, more in zip(("student", "teacher"), padding, strict=True):
        if draw(st.booleans()):
            bias = torch.randn(V + more, generator=g).to(draw(SOME([wide, dtype])))
            case.biases[f"{side}_bias"] = bias
    if len(case.biases) == 2 and draw(st.booleans()):
        for bias in case.biases.values():
            bias[:V][masked_out] = -float("inf")
    loss_shape = shape if options.get("reduction") == "none" else ()
    case.factor = torch.ones(loss_shape, dtype=wide) * draw(SOME([1.0, 0.3]))
    if draw(st.booleans()):
        case.factor *= 0.1 + torch.rand(loss_shape, dtype=wide, generator=g)
    return case


def assert_close(actual, truth, bound, floor):
    actual = actual.detach().double().reshape(truth.shape).numpy()
    allowed = bound * np.linalg.norm(truth) + floor
    assert np.linalg.norm(actual - truth) <= allowed, (actual, truth)


def check(case, loss, rows, grads, truth_grads, size, added=0.0):
    """A loss and the gradients to what learns against rows and gradients of the definition.

    `size` is that of terms that cancel, `added` the rounding of sums with what a lent buffer held.
    """
    weight = case.row_weight()
    expected = weight * rows if case.options.get("reduction") == "none" else (weight * rows).sum()
    floor = (1e-13 if case.dtype == torch.float64 else 1e-6) * max(np.abs(weight).max(), 1e-30)
    assert loss.shape == case.factor.shape and loss.dtype == case.factor.dtype
    assert_close(loss, np.asarray(expected), LOSS_BOUND[case.dtype], floor * len(rows))
    incoming = np.abs(case.factor.double().numpy()).max()
    for grad, truth in zip(grads, truth_grads, strict=True):
        assert_close(grad, truth, GRADIENT_BOUND[case.dtype], floor * size * max(incoming, 1e-30) + added)


def incoming_weight(case):
    return case.row_weight() * case.factor.double().reshape(-1).numpy()


@settings(max_examples=200)
@given(
    case=cases(),
    schedule=SOME(["auto", "store", "recompute"]),
    learns=SOME([(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)]),
    buffer=st.booleans(),
    backend=SOME(["native", "native", "native", "reference"]),
)
def test_linear(case, schedule, learns, buffer, backend):
    tensors = [x.clone() for x in case.tensors]
    biases = {name: bias.clone() for name, bias in case.biases.items()}
    learning = [tensors[0], tensors[1], biases.get("student_bias")]
    learning = [
        x.requires_grad_() if x is not None and yes else None for x, yes in zip(learning, learns, strict=True)
    ]
    V, wide = case.vocab_size, case.factor.dtype
    sides = [x.reshape(*case.shape, -1) if i % 2 == 0 else x for i, x in enumerate(tensors)]
    options = {**case.options, **biases, "backend": backend}
    if backend == "native":
        options["schedule"] = schedule
        if buffer:
            options["grad_head_accumulator"] = torch.full(tensors[1].shape, 2.0, dtype=wide)
    loss = mk.linear_kl_loss(*sides, **options)
    cut = {name: to_numpy(bias)[0][:V] for name, bias in case.biases.items()}
    X, W, Y, U = to_numpy(*case.tensors)
    rows, *truths = oracle_linear(
        X, W[:V], Y, U[:V], **cut, row_weight=incoming_weight(case), **case.definition()
    )
    with torch.no_grad():
        evaluated = mk.linear_kl_loss(*sides, **options)
    size = 4.0 * max(np.abs(X).max(), np.abs(W).max(), 1.0) * len(rows) ** 0.5
    check(case, evaluated, rows, [], [], size)
    if not any(x is not None for x in learning):
        return check(case, loss, rows, [], [], size)
    loss.backward(case.factor)
    padded = [truths[0], *(np.zeros(x.shape) for x in (W, W[:, 0]))]
    padded[1][:V], padded[2][:V] = truths[1:]
    lent, added = options.get("grad_head_accumulator"), 0.0
    pairs = [
        (x.grad, t) for x, t in zip(learning, padded, strict=True) if x is not None and x.grad is not None
    ]
    if lent is not None:
        assert tensors[1].grad is None
        pairs.append((lent - 2.0, padded[1]))
        added = torch.finfo(wide).eps * 2.0 * lent.numel() ** 0.5
    assert len(pairs) >= sum(x is not None for x in learning)
    check(case, loss, rows, *zip(*pairs, strict=True), size, added)


@settings(max_examples=120)
@given(case=cases(), backend=SOME(["native", "native", "reference"]), strided=st.booleans())
def test_logits(case, backend, strided):
    wide = case.factor.dtype
    zs, zt = (
        (x.to(wide) @ w.to(wide).T + case.biases.get(f"{side}_bias", torch.zeros(()))).to(case.dtype)
        for side, x, w in (("student", *case.tensors[:2]), ("teacher", *case.tensors[2:]))
    )
    if strided:
        zs, zt = zs.T.contiguous().T, torch.stack([zt, zt], 1)[:, 1]
    rows, dz = oracle_rows(*to_numpy(zs, zt), vocab_size=case.vocab_size, **case.definition())
    learning = zs.reshape(*case.shape, -1).detach().requires_grad_()
    arguments = (learning, zt.reshape(*case.shape, -1))
    loss = mk.kl_loss(*arguments, backend=backend, **case.options)
    with torch.no_grad():
        assert torch.equal(mk.kl_loss(*arguments, backend=backend, **case.options), loss)
    loss.backward(case.factor)
    check(case, loss, rows, [learning.grad], [dz * incoming_weight(case)[:, None]], 4.0)


def test_numbers_that_both_languages_know():
    """Columns of stats, schedules and operands' types are counted alike in Python and in C++."""
    constant = torch.ops.minitron_kernels.kl_loss_constant
    assert constant("num_stats") == NUM_STATS and constant("stat_kl") == STAT_KL
    metrics = tuple(map(constant, ("num_metrics", "metric_ce", "num_metric_state")))
    assert metrics == (NUM_METRICS, METRIC_CE, NUM_METRIC_STATE)
    assert (constant("panel"), constant("max_chain")) == (PANEL, CHAIN)
    named = {**plan_cpu._SCHEDULE_CODES, **plan_cpu._IMPLEMENTATION_CODES}
    assert all(constant(name) == code for name, code in named.items())
    codes = {str(dtype).removeprefix("torch."): code for dtype, code in plan_cpu._OPERAND_CODES.items()}
    assert all(constant(name) == code for name, code in codes.items())
    assert all(constant(divergence.name.lower()) == divergence.value for divergence in Divergence)


def test_every_divergence_has_a_name_and_is_tested():
    """BETA is what the tests of every backend go through."""
    names = {divergence.name.lower(): divergence for divergence in Divergence}
    assert set(names) == set(options._DIVERGENCES) == set(BETA)
    for name, divergence in names.items():
        assert Divergence.of(options._DIVERGENCES[name]) is divergence
