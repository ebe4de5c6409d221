"""linear_kl_loss's CUDA kernels, run on the host by the shim, one at a time: tiles of logits to the loss,
bounds, traffic, bad input; and planted faults, which these tests must find.
"""

import itertools
import math
import mmap
from functools import partial

import numpy as np
import pytest
import torch

from kl_loss.cases import DTYPES, PLAIN, numpy_of, rows
from kl_loss.edge_cases import EDGE_BETAS, check_dtypes_of_rows, check_rows_at_edges
from kl_loss.edges import TEMPERATURES, finite_rows, masked_out_rows
from kl_loss.faults import CUDA_LINEAR
from kl_loss.oracle import oracle_rows
from kl_loss.problems import make_rows
from kl_loss.shim_tiles import (  # noqa: F401
    BETAS,
    COLUMNS,
    ORDERS,
    ROWS,
    kernels_fixture,
    kernels_of,
    outputs,
    poisoned_memory_fixture,
    readable,
    run_tiles,
    shim_fixture,
    tiles,
    true_loss,
    without_cublas_fixture,
)
from minitron_kernels import _native
from tools.faults import some
from tools.host_shim import (
    SANITIZE,
    WITHOUT_BFLOAT16,
    WITHOUT_HALF,
    assert_fault_is_found,
    load,
    missing_tool,
)

pytestmark = pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))


BOTH_KINDS = (finite_rows, masked_out_rows)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("size", [1, 7, 64, 301, 5000])
def test_any_tiles_give_the_rows(kernels, beta, size):
    """One token a tile, odd tiles, one tile; with biases at odd addresses; as forward() gives them."""
    logits = tiles(301, bias=True)
    loss, stats = run_tiles(kernels.epilogues, logits, None, beta, size)
    np.testing.assert_allclose(numpy_of(loss), true_loss(logits, beta), rtol=4e-6)
    whole = outputs()
    kernels.epilogues.forward(logits, None, *whole, 301, (beta, *PLAIN))
    torch.testing.assert_close(whole[0], loss, rtol=4e-6, atol=0)
    torch.testing.assert_close(whole[1], stats, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_splits_merge(kernels, beta):
    """States of parts of the vocabulary, made apart, then finished together; a part without any token too."""
    epilogues, options = kernels.epilogues, (beta, *PLAIN)
    logits = tiles(300)
    logits[0][1, :100] = logits[1][1, :100] = -math.inf
    cuts = [slice(0, 100), slice(100, 140), slice(140, 300)]
    states, sums = torch.full((3, 5, ROWS), math.nan), torch.full((3, 2, ROWS), math.nan)
    for cut, state in zip(cuts, states, strict=True):
        epilogues.tile_stats((*(x[:, cut] for x in logits[:2]), None, None), None, state, True, options)
    loss, stats = outputs()
    epilogues.finish_stats(states, None, loss, stats, options)
    if 0 < beta < 1:
        for cut, part in zip(cuts, sums, strict=True):
            tile = (*(x[:, cut] for x in logits[:2]), None, None)
            epilogues.tile_mixture(tile, None, stats, part, True, options)
        epilogues.finish_mixture(sums, None, loss, stats, options)
    np.testing.assert_allclose(numpy_of(loss), true_loss(logits, beta), rtol=4e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_rising_tiles_and_extreme_logits(kernels, beta):
    """Every tile raises the maximum of one side, none that of the other; tiles of finfo.min, of -inf."""
    rising = torch.linspace(-60.0, 60.0, 600).expand(3, 600)
    student, teacher = rising.clone(), rising.flip(1).clone()
    teacher[1, :200] = -math.inf
    if beta != 1.0:
        teacher[2, :200] = torch.finfo(torch.float32).min
    logits = (student, teacher, None, None)
    loss, _ = run_tiles(kernels.epilogues, logits, None, beta, 100)
    np.testing.assert_allclose(numpy_of(loss), true_loss(logits, beta), rtol=4e-6)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("bias", [False, True])
def test_bounds_and_masked_rows(shim, kernels, beta, bias):
    """Only the tile's columns, its biases and the rows that count are read; all that is due is written."""
    columns, options, epilogues = 161, (beta, *PLAIN), kernels.epilogues
    logits = tiles(columns, bias)
    mask = torch.tensor([True, False, True, False, True])
    allowed = partial(readable, (logits[0][::2], logits[1][::2], *logits[2:]), mask=mask)
    state, sums = torch.full((5, ROWS), math.nan), torch.full((2, ROWS), math.nan)
    loss, stats = outputs()

    def complete(trace, *written):
        taken = [trace.take_stores(x) for x in written]
        assert all(stores.never == stores.twice == 0 for stores in taken)
        assert taken[-1].elsewhere == 0

    with shim.trace(**allowed()) as trace:
        epilogues.tile_stats(logits, mask, state, True, options)
        complete(trace, state)
    with shim.trace(**allowed(state=state)) as trace:
        epilogues.tile_stats(logits, mask, state, False, options)
        complete(trace, state)
    with shim.trace(mask=mask, state=state) as trace:
        epilogues.finish_stats(state[None], mask, loss, stats, options)
        complete(trace, loss, stats)
    with shim.trace(**allowed(stats=stats)) as trace:
        epilogues.tile_mixture(logits, mask, stats, sums, True, options)
        complete(trace, sums)
    with shim.trace(mask=mask, sums=sums) as trace:
        epilogues.finish_mixture(sums[None], mask, loss, stats, options)
        complete(trace, loss, stats[:, 5])
    with shim.trace(**allowed()) as trace:
        epilogues.forward(logits, mask, loss, stats, columns, options)
        complete(trace, loss, stats)
    weight = torch.tensor([0.5])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        dz = torch.full((ROWS, 192), math.nan, dtype=dtype)[:, : columns + 3]
        with shim.trace(**allowed(stats=stats, weight=weight)) as trace:
            epilogues.grad(logits, mask, weight.expand(ROWS), stats, dz, columns, options)
            complete(trace, dz)
        assert (dz[:, columns:] == 0).all() and (dz[1::2] == 0).all() and (dz[::2, :columns] != 0).any()


@pytest.mark.parametrize("beta", BETAS)
def test_traffic(shim, kernels, beta):
    """Bytes per logit: 4 + 4 by stats and by JSD's terms, 4 + 4 + dz's by the gradient; 16 at a time."""
    options, epilogues = (beta, *PLAIN), kernels.epilogues
    logits = tiles()
    matrix = 4 * ROWS * COLUMNS
    state, sums, (loss, stats), weight = torch.zeros(5, ROWS), torch.zeros(2, ROWS), outputs(), torch.ones(1)

    def passes(trace, count):
        for side in ("student", "teacher"):
            loads = trace.loads(side)
            assert (loads.bytes, loads.narrow) == (count * matrix, 0)

    def updates(trace, name, x):
        assert trace.loads(name).bytes == trace.take_stores(x).bytes == 4 * x.numel()

    epilogues.tile_stats(logits, None, state, True, options)
    with shim.trace(**readable(logits, state=state)) as trace:
        epilogues.tile_stats(logits, None, state, False, options)
        passes(trace, 1)
        updates(trace, "state", state)
        assert trace.most_shared_bytes() == 640
    with shim.trace(**readable(logits)) as trace:
        epilogues.forward(logits, None, loss, stats, COLUMNS, options)
        passes(trace, 2 if 0 < beta < 1 else 1)
        assert trace.take_stores(loss).bytes + trace.take_stores(stats).bytes == 28 * ROWS
    with shim.trace(**readable(logits, stats=stats, sums=sums)) as trace:
        epilogues.tile_mixture(logits, None, stats, sums, False, options)
        passes(trace, 1)
        updates(trace, "sums", sums)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        dz = torch.empty(ROWS, COLUMNS, dtype=dtype)
        with shim.trace(**readable(logits, stats=stats, weight=weight)) as trace:
            epilogues.grad(logits, None, weight.expand(ROWS), stats, dz, COLUMNS, options)
            passes(trace, 1)
            stores = trace.take_stores(dz)
            assert (stores.bytes, stores.narrow, stores.elsewhere) == (dz.nbytes, 0, 0)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("count", [1, 127, 128, 129])
def test_rows_of_a_finishing_block(shim, kernels, beta, count):
    """Below, at and above the threads of a block; a mask with a stride."""
    logits = (*make_rows(count, 5, torch.float32), None, None)
    wide = torch.stack([torch.arange(count) % 3 > 0, torch.arange(count) < 0], dim=1)
    with shim.trace(student=logits[0], teacher=logits[1], mask=wide.view(torch.uint8)) as trace:
        loss, stats = run_tiles(kernels.epilogues, logits, wide[:, 0], beta, 5)
        written = trace.take_stores(loss), trace.take_stores(stats)
    assert all(stores.never == 0 for stores in written)
    counts = numpy_of(wide[:, 0])
    np.testing.assert_allclose(numpy_of(loss), np.where(counts, true_loss(logits, beta), 0.0), rtol=4e-6)
    grad = torch.full((count, 5), math.nan)
    kernels.epilogues.grad(logits, wide[:, 0], torch.ones(count), stats, grad, 5, (beta, *PLAIN))
    true_grad = oracle_rows(*map(numpy_of, logits[:2]), beta=beta)[1] * counts[:, None]
    np.testing.assert_allclose(numpy_of(grad), true_grad, atol=2e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_rows_beyond_32_bit_offsets(kernels, beta):
    """The second row begins 2^31 + 8 elements after the first, in memory that is never touched between."""
    stride, columns = 2**31 + 8, 40
    holes = [mmap.mmap(-1, 4 * (stride + columns)) for _ in range(3)]
    far = [
        torch.frombuffer(hole, dtype=torch.float32).as_strided((2, columns), (stride, 1)) for hole in holes
    ]
    near = make_rows(2, columns, torch.float32)
    for view, values in zip(far, near, strict=False):
        view.copy_(values)
    options = (beta, *PLAIN)
    true_loss_, true_grad = oracle_rows(*map(numpy_of, near), beta=beta)
    for loss, stats in (
        kernels.forward(*far[:2], None, columns, options),
        run_tiles(kernels.epilogues, (*far[:2], None, None), None, beta, columns),
    ):
        np.testing.assert_allclose(numpy_of(loss), true_loss_, rtol=4e-6)
        kernels.epilogues.grad((*far[:2], None, None), None, torch.ones(2), stats, far[2], columns, options)
        np.testing.assert_allclose(numpy_of(far[2]), true_grad, atol=2e-6)
        far[2].fill_(math.nan)


@pytest.mark.parametrize("beta", [1e-40, 1e-320, 1 - 2**-53])
def test_the_smallest_shares(kernels, beta):
    """Shares that fp32 does not hold: as good as 0, not NaN or infinite."""
    for edges in (finite_rows(37, 16), masked_out_rows(37, 16)):
        loss, _, grad = rows(kernels, edges.student, edges.teacher, beta=beta)
        none = torch.isneginf(edges.student).all(1) | torch.isneginf(edges.teacher).all(1)
        assert loss[none].isnan().all() and grad[~none].isfinite().all()
        assert (loss[~none].abs() < 1e-12).all() and (grad[~none].abs() < 1e-12).all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("beta", EDGE_BETAS)
def test_rows_at_edges(kernels, beta, temperature):
    """One and two tokens, one run, the borders of runs and of what the threads of a block take at once."""
    small = [finite_rows(1, 1), finite_rows(2, 1)]
    for edges in (*small, *(make(V, tile) for V, tile in ((37, 16), (600, 512)) for make in BOTH_KINDS)):
        check_rows_at_edges(kernels, edges, beta, temperature)


@pytest.mark.parametrize("beta", BETAS)
def test_dtypes_of_rows(kernels, beta):
    check_dtypes_of_rows(kernels, beta, itertools.product(DTYPES, repeat=2))


@pytest.mark.native
def test_native_epilogues_are_registered_for_cuda():
    """The names that native_epilogues() calls, with the schemas of the library, have CUDA kernels."""
    names = ("forward_", "grad_", "forward_grad_", "stats_", "mixture_")
    names = [f"kl_tile_{name}" for name in names] + ["kl_finish_stats_", "kl_finish_mixture_"]
    for name in names:
        assert getattr(torch.ops.minitron_kernels, name).default._schema.is_mutable
        if _native.build_info()["cuda_archs"]:
            full = f"minitron_kernels::{name}"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(full, "CUDA")


def test_bad_input(kernels):
    epilogues, options = kernels.epilogues, (0.0, *PLAIN)
    good = tiles(40)
    loss, stats = outputs()

    def forward(student=good[0], teacher=good[1], bias=None, loss=loss, stats=stats, vocab_size=40):
        epilogues.forward((student, teacher, bias, None), None, loss, stats, vocab_size, options)

    def grad(columns=40, dtype=torch.float32, rows=ROWS):
        dz, weight = torch.empty(ROWS, columns, dtype=dtype), torch.ones(rows)
        epilogues.grad(good, None, weight, stats, dz, 40, options)

    def state(x):
        epilogues.tile_stats(good, None, x, True, options)

    for call, arguments, message in [
        (forward, {"student": good[0].bfloat16()}, "student_logits must be float32 out of the GEMM"),
        (forward, {"teacher": good[1][:2]}, "teacher_logits has 2 rows, student_logits 5"),
        (forward, {"bias": torch.zeros(39)}, "student_bias must be float32"),
        (forward, {"bias": torch.zeros(40).bfloat16()}, "student_bias must be float32"),
        (forward, {"loss": torch.zeros(4)}, "loss must be float32"),
        (forward, {"stats": torch.zeros(ROWS, 12)[:, ::2]}, "stats must be the contiguous"),
        (forward, {"vocab_size": 41}, "vocab_size 41 is not in"),
        (grad, {"columns": 39}, "grad has 39 columns, vocab_size is 40"),
        (grad, {"dtype": torch.float64}, "grad must be float32, bfloat16 or float16"),
        (grad, {"rows": 4}, r"weight must be float32 \[N\]"),
        (state, {"x": torch.zeros(4, ROWS)}, "state must be float32"),
        (partial(epilogues.finish_stats, torch.zeros(1, 4, ROWS), None, loss, stats, options), {}, "states"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(**arguments)


# ---- planted faults: what these tests are to see, they see


def check_tiles(shim, beta=0.0, columns=301, size=64):
    logits = tiles(columns, bias=True)
    loss, _ = run_tiles(kernels_of(shim).epilogues, logits, None, beta, size)
    np.testing.assert_allclose(numpy_of(loss), true_loss(logits, beta), rtol=4e-6)


def check_orders(shim):
    for order in ORDERS:
        with shim.order(order):
            check_tiles(shim, columns=4096, size=2048)  # four warps


def check_bounds(shim):
    test_bounds_and_masked_rows(shim, kernels_of(shim), 0.0, False)


def check_traffic(shim):
    test_traffic(shim, kernels_of(shim), 0.0)


def check_edges(shim):
    check_rows_at_edges(kernels_of(shim), finite_rows(37, 16), 0.0, 1.0)
    check_rows_at_edges(kernels_of(shim), masked_out_rows(37, 16), 0.0, 0.005)


def check_finish(shim):
    test_rows_of_a_finishing_block(shim, kernels_of(shim), 0.0, 129)


CHECKS = {
    "edges": check_edges,
    "finish": check_finish,
    "tiles": check_tiles,
    "tiles by JSD": partial(check_tiles, beta=0.3),
    "orders": check_orders,
    "bounds": check_bounds,
    "traffic": check_traffic,
}


@pytest.mark.skipif(SANITIZE, reason="the faults are planted in the plain build")
@pytest.mark.parametrize("name", some(CUDA_LINEAR))
def test_planted_fault_is_found(shim, name):
    key, fault, message = CUDA_LINEAR[name]
    broken = load("kl_loss", fault, WITHOUT_HALF, WITHOUT_BFLOAT16)
    assert_fault_is_found(CHECKS[key], shim, broken, message)
