"""kl_tile_forward_grad_: loss, stats and gradient of rows of logits by a cluster of blocks a row, run on the
host by the shim; and by the two kernels that stand in for it. With planted faults, which they must find.
"""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch

from kl_loss.cases import CAPPED, PLAIN, assert_loss, assert_near, named, numpy_of
from kl_loss.edge_cases import ROUNDING, check_rows_at_edges
from kl_loss.edges import finite_rows, masked_out_rows
from kl_loss.faults import CUDA_CLUSTERS
from kl_loss.oracle import oracle_rows
from kl_loss.shim_tiles import (  # noqa: F401
    BETAS,
    ORDERS,
    ROWS,
    kernels_of,
    outputs,
    poisoned_memory_fixture,
    readable,
    shim_fixture,
    tiles,
)
from tools.faults import some
from tools.host_shim import (
    SANITIZE,
    WITHOUT_BFLOAT16,
    WITHOUT_HALF,
    assert_clean_under_sanitizers,
    assert_fault_is_found,
    load,
    missing_tool,
)

pytestmark = pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))

FEWEST = 16384  # columns of a row that a cluster takes: one turn of 128 threads a block
WEIGHT = torch.linspace(-0.5, 1.5, ROWS)


def padded(rows, columns, dtype):
    """A gradient whose rows begin at 16 bytes, with padding that is to become 0."""
    return torch.full((rows, -(-columns // 64) * 64 + 64), math.nan, dtype=dtype)[:, : columns + 11]


def aligned_biases(columns):
    return torch.linspace(-3, 3, columns), torch.linspace(2, -1, columns)


def run(shim, logits, beta, *, mask=None, dtype=torch.float32, options=PLAIN, columns=None):
    """Loss, stats, gradient; and whether a cluster made them, since a second kernel would have read stats."""
    rows, columns = logits[0].shape[0], logits[0].shape[1] if columns is None else columns
    (loss, stats), grad = outputs(rows), padded(rows, columns, dtype)
    weight = WEIGHT[:rows]
    given = readable(logits, weight=weight) | ({} if mask is None else {"mask": mask})
    with shim.trace(**given) as trace:
        kernels_of(shim).epilogues.forward_grad(
            logits, mask, weight, loss, stats, grad, columns, (beta, *options)
        )
        stores = [trace.take_stores(x) for x in (loss, stats, grad)]
        assert all(taken.never == taken.twice == 0 for taken in stores) and stores[-1].elsewhere == 0
        by_cluster = trace.scratch_loaded() == 0
    assert (grad[:, columns:] == 0).all()
    return loss, stats, grad[:, :columns], by_cluster


def truth(logits, beta, options=PLAIN):
    full = [x if b is None else x + b for x, b in zip(logits[:2], logits[2:], strict=True)]
    loss, grad = oracle_rows(*map(numpy_of, full), beta=beta, **named(options))
    return loss, grad * numpy_of(WEIGHT[: len(grad)])[:, None]


def check_values(shim, beta=0.0, columns=FEWEST + 7, dtype=torch.float32, options=PLAIN, bias=False):
    logits = tiles(columns)
    if bias:
        logits = (*logits[:2], *aligned_biases(columns))
    loss, stats, grad, by_cluster = run(shim, logits, beta, dtype=dtype, options=options)
    true_loss, true_grad = truth(logits, beta, options)
    assert by_cluster
    assert_loss(loss, true_loss)
    assert_near(grad, true_grad, ROUNDING[dtype] / 2 + 4e-6, 1e-6)
    same = outputs()
    kernels_of(shim).epilogues.forward(logits, None, *same, columns, (beta, *options))
    torch.testing.assert_close(loss, same[0], rtol=4e-6, atol=0)
    torch.testing.assert_close(stats, same[1], rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("columns", [FEWEST, FEWEST + 7, 2 * FEWEST + 4095, 65536 + 521])
def test_values(shim, beta, columns):
    """Every number of threads a block; a turn that is full, and some that are not; against forward() too."""
    check_values(shim, beta, columns)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_of_the_gradient(shim, beta, dtype):
    check_values(shim, beta, dtype=dtype)


@pytest.mark.parametrize("beta", BETAS)
def test_options_and_biases(shim, beta):
    check_values(shim, beta, options=CAPPED, bias=True)
    check_values(shim, beta, options=CAPPED)


@pytest.mark.parametrize("beta", BETAS)
def test_masked_rows(shim, beta):
    """Rows that are not valid are not read, and their outputs are 0."""
    logits, mask = tiles(FEWEST), torch.tensor([True, False, True, False, False])
    true_loss, true_grad = truth(logits, beta)
    for x in logits[:2]:
        x[~mask] = math.nan
    loss, stats, grad, by_cluster = run(shim, logits, beta, mask=mask)
    assert by_cluster and (loss[~mask] == 0).all() and (stats[~mask] == 0).all() and (grad[~mask] == 0).all()
    assert_loss(loss[mask], true_loss[mask])
    assert_near(grad[mask], true_grad[mask], 4e-6, 1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_only_the_vocabulary_is_read(shim, beta):
    """The logits have more columns than tokens; those hold NaN, and are not read."""
    columns = FEWEST + 5
    logits = tiles(columns + 20)
    for x in logits[:2]:
        x[:, columns:] = math.nan
    cut = (*(x[:, :columns] for x in logits[:2]), None, None)
    loss, _, grad, by_cluster = run(shim, cut, beta)
    (wide_loss, wide_stats), wide_grad = outputs(), padded(ROWS, columns, torch.float32)
    forward_grad = kernels_of(shim).epilogues.forward_grad
    forward_grad(logits, None, WEIGHT, wide_loss, wide_stats, wide_grad, columns, (beta, *PLAIN))
    assert by_cluster and torch.equal(wide_loss, loss) and torch.equal(wide_grad[:, :columns], grad)


def check_traffic(shim, beta=0.0):
    matrix, logits, (loss, stats) = 4 * ROWS * FEWEST, tiles(FEWEST), outputs()
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if beta == 0.0 else (torch.float32,):
        grad = torch.empty(ROWS, FEWEST, dtype=dtype)
        with shim.trace(**readable(logits, weight=WEIGHT)) as trace:
            kernels_of(shim).epilogues.forward_grad(
                logits, None, WEIGHT, loss, stats, grad, FEWEST, (beta, *PLAIN)
            )
            for side in ("student", "teacher"):
                loads = trace.loads(side)
                assert (loads.bytes, loads.narrow) == ((3 if 0 < beta < 1 else 2) * matrix, 0)
            stores = trace.take_stores(grad)
            narrow = 0 if dtype == torch.float32 else grad.nbytes // 8  # so that the loads are of whole lines
            assert (stores.bytes, stores.narrow) == (grad.nbytes, narrow)
            assert trace.take_stores(loss).bytes + trace.take_stores(stats).bytes == 28 * ROWS
            assert trace.scratch_loaded() == 0 and trace.most_shared_bytes() < 1536


@pytest.mark.parametrize("beta", BETAS)
def test_traffic(shim, beta):
    """Each logit is read twice, for JSD three times, but the first time out of L2; 16 bytes at a time."""
    check_traffic(shim, beta)


def spread(shim):
    """The shim's kernels, with the gradient of the cluster kernel, on rows of few tokens: these are spread
    over all blocks and threads, among tokens that are masked out in both models.
    """
    made = {}

    def forward(student, teacher, mask, vocab_size, options):
        rows, step = student.shape[0], FEWEST // vocab_size
        tokens = slice(0, vocab_size * step, step)
        wide = torch.full((2, rows, FEWEST), -math.inf)
        wide[0, :, tokens], wide[1, :, tokens] = student, teacher
        (loss, stats), grad = outputs(rows), torch.full((rows, FEWEST), math.nan)
        ops, weight = kernels_of(shim).epilogues, torch.ones(rows)
        ops.forward_grad((*wide, None, None), mask, weight, loss, stats, grad, FEWEST, options)
        made["grad"] = grad[:, tokens]
        return loss, stats

    return dataclasses.replace(kernels_of(shim), forward=forward, backward=lambda *_: made["grad"])


@pytest.mark.parametrize("temperature", [0.005, 1.0])
@pytest.mark.parametrize("beta", BETAS)
def test_rows_at_edges(shim, beta, temperature):
    for edges in (finite_rows(1, 1), finite_rows(37, 16), masked_out_rows(37, 16)):
        check_rows_at_edges(spread(shim), edges, beta, temperature)


@pytest.mark.parametrize("beta", BETAS)
def test_nan_is_never_hidden(shim, beta):
    """A NaN or an infinite logit anywhere makes the row's loss NaN, and that of no other row."""
    for side in (0, 1):
        for column, value in ((0, math.nan), (700, math.inf), (FEWEST + 6, math.nan)):
            logits = tiles(FEWEST + 7)
            logits[side][1, column] = value
            loss, _, grad, by_cluster = run(shim, logits, beta)
            assert by_cluster and loss.isnan().tolist() == [False, True, False, False, False]
            assert grad[1].isnan().any() and grad[[0, 2, 3, 4]].isfinite().all()


def check_orders(shim, beta=0.0):
    """Whatever the order in which the threads of a cluster run, the results are the same bits."""
    check_values(shim, beta)
    logits, results = tiles(FEWEST), []
    for order in ORDERS:
        with shim.order(order):
            results.append(run(shim, logits, beta)[:3])
    for other in results[1:]:
        for x, first in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(numpy_of(x), numpy_of(first))


@pytest.mark.parametrize("beta", BETAS)
def test_orders(shim, beta):
    check_orders(shim, beta)


@pytest.mark.parametrize("beta", BETAS)
def test_what_is_not_for_clusters(shim, beta):
    """Few columns, rows or biases that begin elsewhere, a GPU without clusters: two kernels, as exact."""
    columns = FEWEST + 7
    good, (bias, other_bias) = tiles(columns), aligned_biases(columns)
    shifted = torch.full((ROWS, good[0].stride(0) + 4), math.nan)[:, 1 : 1 + columns]
    shifted.copy_(good[1])
    odd = torch.cat([bias[:1], bias])[1:]
    cases = {
        "few columns": (*(x[:, : FEWEST - 1] for x in good[:2]), None, None),
        "teacher": (good[0], shifted, None, None),
        "stride": (good[0].contiguous(), good[1], None, None),
        "bias": (*good[:2], odd, other_bias),
    }
    for name, logits in cases.items():
        loss, _, grad, by_cluster = run(shim, logits, beta)
        assert not by_cluster, name
        true_loss, true_grad = truth(logits, beta)
        assert_loss(loss, true_loss)
        assert_near(grad, true_grad, 4e-6, 1e-6)
    with shim.without_clusters():
        assert not run(shim, good, beta)[3]
    assert run(shim, good, beta)[3]


def test_bad_input(shim):
    good, forward_grad = tiles(40), kernels_of(shim).epilogues.forward_grad
    loss, stats = outputs()

    def call(weight=WEIGHT, loss=loss, stats=stats, grad=None, vocab_size=40):
        grad = torch.empty(ROWS, 40) if grad is None else grad
        forward_grad(good, None, weight, loss, stats, grad, vocab_size, (0.0, *PLAIN))

    for arguments, message in [
        ({"weight": torch.ones(4)}, r"weight must be float32 \[N\]"),
        ({"loss": torch.zeros(4)}, "loss must be float32"),
        ({"stats": torch.zeros(ROWS, 12)[:, ::2]}, "stats must be the contiguous"),
        ({"grad": torch.empty(ROWS, 39)}, "grad has 39 columns, vocab_size is 40"),
        ({"grad": torch.empty(ROWS, 40).double()}, "grad must be float32, bfloat16 or float16"),
        ({"vocab_size": 41}, "vocab_size 41 is not in"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(**arguments)


# ---- planted faults: what these tests are to see, they see

CHECKS = {
    "values": check_values,
    "values by JSD": partial(check_values, beta=0.3),
    "orders": check_orders,
    "traffic": check_traffic,
}


@pytest.mark.skipif(SANITIZE, reason="the faults are planted in the plain build")
@pytest.mark.parametrize("name", some(CUDA_CLUSTERS))
def test_planted_fault_is_found(shim, name):
    key, fault, message = CUDA_CLUSTERS[name]
    broken = load("kl_loss", fault, WITHOUT_HALF, WITHOUT_BFLOAT16)
    assert_fault_is_found(CHECKS[key], shim, broken, message)


@pytest.mark.skipif(SANITIZE, reason="this is the child")
def test_under_sanitizers():
    assert_clean_under_sanitizers(__file__, "masked_rows or not_for_clusters")
