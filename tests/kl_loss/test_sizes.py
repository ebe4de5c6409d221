"""linear_kl_loss and kl_loss below, at and above every constant of the CPU kernels, and at a real shape."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import minitron_kernels as mk
from kl_loss.oracle import oracle_linear, oracle_rows
from kl_loss.problems import (
    BETA,
    GRADIENT_BOUND,
    HAS_BF16,
    force_operands,
    force_plan,
    make_linear,
    make_rows,
    relative,
    threads,
    to_numpy,
)

pytestmark = pytest.mark.native
SCHEDULES = ["store", "recompute"]
ENGINES = [
    (torch.float32, None),
    (torch.bfloat16, "bf16"),
    (torch.bfloat16, "portable_bf16"),
    (torch.float16, None),
    (torch.float64, None),
]
TILED = [(torch.bfloat16, "portable_amx"), (torch.bfloat16, "portable_avx512_bf16")]
# One element may be rounded by half an ulp, and a gradient of few elements with it; bf16 ones twice.
BOUND = {**GRADIENT_BOUND, torch.bfloat16: 2.0**-7}


def check(N, H, Ht, V, dtype, *, schedule, divergence="forward_kl", seed=0, weight=None, mask=None):
    """Loss per token with gradients, sum with gradients, and loss without, against float64."""
    tensors = make_linear(N, H, Ht, V, dtype, seed=seed)
    bias = torch.linspace(-3, 3, V, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    counts = np.ones(N) if mask is None else mask.double().numpy()
    loss, *truth = oracle_linear(
        *to_numpy(*tensors), student_bias=to_numpy(bias)[0], row_weight=counts, beta=BETA[divergence]
    )
    options = {"divergence": divergence, "mask": mask, "schedule": schedule}
    with torch.no_grad():
        alone = mk.linear_kl_loss(*tensors, student_bias=bias, reduction="none", **options)
    near = {"rtol": 2e-5, "atol": 1e-6}  # the logits of a row are those of an fp32 GEMM
    np.testing.assert_allclose(alone.numpy(), loss * counts, **near)
    for reduction in ("none", "sum"):
        hidden, head, own_bias = (x.clone().requires_grad_() for x in (*tensors[:2], bias))
        made = mk.linear_kl_loss(
            hidden, head, *tensors[2:], student_bias=own_bias, reduction=reduction, **options
        )
        made.sum().backward()
        np.testing.assert_allclose(made.sum().item(), (loss * counts).sum(), **near)
        for name, x, expected in zip(
            ("hidden", "head", "bias"), (hidden, head, own_bias), truth, strict=True
        ):
            # where one token has all the mass the gradient is what rounding leaves of two probabilities of 1,
            # in each row
            error = relative(x.grad, expected) * max(np.linalg.norm(expected), 1e-300)
            left = max(1e-14, 4 * N * 2.0**-52) if dtype == torch.float64 else 1e-5
            allowed = BOUND[x.dtype] * np.linalg.norm(expected) + left
            assert error <= allowed, f"{name}, {reduction}"


BASE = {"N": 70, "H": 40, "Ht": 44, "V": 200}
AROUND = [
    # lanes, pairs, panels, blocks of dX, the chain of products
    *(
        {"H": H}
        for H in (0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 258, 511, 512, 515)
    ),
    *({"Ht": Ht} for Ht in (0, 1, 2, 3, 63, 64, 65, 255, 256, 257, 258, 513)),
    # panels, the chain of dW, blocks of rows
    *({"N": N} for N in (1, 2, 63, 64, 65, 128, 129, 255, 256, 257, 319, 321, 511, 512, 513, 577)),
    # tiles of 64, of 128 and of 256
    *({"V": V} for V in (1, 2, 3, 63, 64, 65, 127, 128, 129, 193, 1023, 1024, 1025, 1151, 1153)),
    *({"N": 3, "H": 5, "Ht": 4, "V": V} for V in (16383, 16384, 16385, 16641)),
]


@pytest.mark.parametrize("dtype,engine", ENGINES)
def test_around_every_constant(monkeypatch, dtype, engine):
    force_operands(monkeypatch, engine)
    divergences = ("forward_kl", "reverse_kl", "jsd")
    for i, change in enumerate(AROUND):
        sizes = {**BASE, **change}
        for j, schedule in enumerate(SCHEDULES):
            check(**sizes, dtype=dtype, schedule=schedule, divergence=divergences[(i + j) % 3])


@pytest.mark.parametrize("H,Ht,V", [(576, 640, 49152)])
@pytest.mark.parametrize("dtype,engine,schedule", [
    (torch.float32, None, "store"),
    (torch.bfloat16, "portable_bf16", "recompute"),
])  # fmt: skip
def test_a_real_shape(monkeypatch, dtype, engine, schedule, H, Ht, V):
    """The hidden sizes and the vocabulary of SmolLM2 135M, and a teacher a little wider."""
    force_operands(monkeypatch, engine)
    check(9, H, Ht, V, dtype, schedule=schedule)


PLANS = {
    "tile": st.sampled_from([2, 4, 62, 64, 66, 128]),
    "chunk_rows": st.sampled_from([1, 63, 64, 65, 128, 192, 512, 576]),
    "tile_group": st.integers(1, 5),
    "stored_tiles": st.integers(0, 9),
}


@settings(deadline=None, max_examples=80)
@given(
    N=st.sampled_from([1, 5, 64, 65, 150, 193]),
    H=st.sampled_from([1, 7, 64, 131, 260]),
    Ht=st.sampled_from([1, 6, 65, 259]),
    V=st.sampled_from([1, 2, 63, 64, 65, 130, 195]),
    case=st.sampled_from([case for case in [*ENGINES, *TILED] if case[1] != "bf16" or HAS_BF16]),
    schedule=st.sampled_from(SCHEDULES),
    divergence=st.sampled_from(list(BETA)),
    masked=st.booleans(),
    count=st.sampled_from([1, 2, 3]),
    numbers=st.fixed_dictionaries(PLANS),
)
# a tile group that begins among the stored tiles and holds all of the others
@example(
    N=65, H=260, Ht=65, V=195, case=(torch.float32, None), schedule="store", divergence="forward_kl",
    masked=False, count=1, numbers={"tile": 64, "chunk_rows": 192, "tile_group": 4, "stored_tiles": 2},
)  # fmt: skip
def test_any_plan(N, H, Ht, V, case, schedule, divergence, masked, count, numbers):
    """Chunks, tiles, groups and stored tiles of every kind, also such as the planner never chooses."""
    mask = torch.arange(N) % 3 != 1 if masked else None
    if case in TILED:  # which refuse smaller ones
        numbers = {**numbers, "tile": max(numbers["tile"], 32)}
    with pytest.MonkeyPatch.context() as patch, threads(count):
        force_operands(patch, case[1])
        force_plan(patch, **numbers)
        check(N, H, Ht, V, case[0], schedule=schedule, divergence=divergence, mask=mask)


@pytest.mark.parametrize("divergence", [*BETA])
def test_rows_of_every_length(divergence, simd_level):
    """Every remainder of vectors and of four chains of them, and of blocks of 1024."""
    for V in (*range(1, 140), 1022, 1023, 1024, 1025, 1039, 2047, 2048, 2049):
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher = make_rows(2, V, dtype, seed=V)
            student.requires_grad_()
            loss = mk.kl_loss(student, teacher, divergence=divergence, reduction="none")
            (grad,) = torch.autograd.grad(loss.sum(), student)
            truth, expected = oracle_rows(*to_numpy(student, teacher), beta=BETA[divergence])
            np.testing.assert_allclose(loss.detach().numpy(), truth, rtol=2e-6, atol=2e-7)
            error = np.linalg.norm(grad.double().numpy() - expected)
            assert error <= BOUND[dtype] * np.linalg.norm(expected) + 1e-6


def test_rows_that_share_a_task_or_fill_one():
    """A task is as many rows as have 65536 logits: more rows than one, one, and less than one."""
    for N, V in ((700, 300), (5, 30000), (5, 32768), (3, 65535), (3, 65536), (3, 65537), (2, 140000)):
        student, teacher = make_rows(N, V, torch.float32)
        mask = torch.arange(N) % 3 != 1
        results = []
        for count in (1, 2, 8):
            with threads(count):
                own = student.clone().requires_grad_()
                loss = mk.kl_loss(own, teacher, mask=mask, reduction="none")
                (grad,) = torch.autograd.grad(loss.sum(), own)
                results.append((loss.detach(), grad))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        truth, expected = oracle_rows(*to_numpy(student, teacher))
        kept = mask.double().numpy()
        np.testing.assert_allclose(results[0][0].numpy(), truth * kept, rtol=2e-6)
        assert relative(results[0][1], expected * kept[:, None]) <= 1e-5
