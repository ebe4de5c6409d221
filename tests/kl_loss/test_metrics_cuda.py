"""Metrics and cross-entropy by the CUDA kernels, run on the host by the shim: the cases of every backend,
whole rows by clusters, what is read and written, the order of threads; and planted faults, which these must
find.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch

from kl_loss.cases import PLAIN
from kl_loss.faults import CUDA_METRICS
from kl_loss.metric_cases import *  # noqa: F403
from kl_loss.metric_cases import (
    SETTINGS,
    assert_dz,
    assert_metrics,
    labels_for,
    metrics_truth,
    test_metrics_of_masked_out_tokens,
    test_metrics_of_rows,
    test_metrics_of_tiles,
    test_metrics_of_unknown_labels,
    test_metrics_of_whole_rows,
    weights_for,
)
from kl_loss.shim_tiles import (  # noqa: F401
    BETAS,
    ORDERS,
    ROWS,
    kernels_fixture,
    kernels_of,
    outputs,
    poisoned_memory_fixture,
    readable,
    shim_fixture,
    tiles,
    without_cublas_fixture,
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

FEWEST = 16384  # columns of a row that a cluster takes
WEIGHT, CE_WEIGHT = weights_for(ROWS, "cpu")


def fresh_metrics(rows=ROWS):
    return torch.full((rows, 4), math.nan)


# ---- loss, metrics and gradient of whole rows by a cluster of blocks a row


def run_clusters(shim, logits, labels, options, beta, *, mask=None, dtype=torch.float32):
    """Loss, stats, metrics, gradient; all written once, by a cluster, since two kernels would read stats."""
    columns = logits[0].shape[1]
    (loss, stats), metrics = outputs(), fresh_metrics()
    grad = torch.full((ROWS, -(-columns // 64) * 64 + 64), math.nan, dtype=dtype)[:, : columns + 11]
    given = readable(logits, weight=WEIGHT, ce_weight=CE_WEIGHT, labels=labels)
    with shim.trace(**given | ({} if mask is None else {"mask": mask})) as trace:
        arguments = (mask, WEIGHT, loss, stats, grad, columns, (beta, *options))
        more = {"labels": labels, "metrics": metrics, "ce_weight": CE_WEIGHT}
        kernels_of(shim).epilogues.forward_grad(logits, *arguments, **more)
        stores = [trace.take_stores(x) for x in (loss, stats, metrics, grad)]
        assert all(taken.never == taken.twice == 0 for taken in stores) and stores[-1].elsewhere == 0
        assert trace.scratch_loaded() == 0, "not by a cluster"
    assert (grad[:, columns:] == 0).all()
    return loss, stats, metrics, grad[:, :columns]


def check_clusters(shim, beta=0.0, setting="capped", columns=FEWEST + 7, dtype=torch.float32):
    options, logits, labels = SETTINGS[setting], tiles(columns), labels_for(ROWS, columns, "cpu")
    loss, stats, metrics, grad = run_clusters(shim, logits, labels, options, beta, dtype=dtype)
    assert_metrics(metrics, stats, logits[0], metrics_truth(logits[0], labels, options), options)
    assert_dz(grad, *logits[:2], WEIGHT, CE_WEIGHT, labels, beta=beta, options=options)
    (plain, same_stats), arguments = outputs(), (None, columns, (beta, *options))
    kernels_of(shim).epilogues.forward(logits, None, plain, same_stats, *arguments[1:])
    torch.testing.assert_close(loss, plain, rtol=4e-6, atol=0)
    torch.testing.assert_close(stats, same_stats, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("setting", ["smooth", "capped"])
@pytest.mark.parametrize("beta", BETAS)
def test_metrics_by_clusters(shim, beta, setting):
    check_clusters(shim, beta, setting)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_metrics_by_clusters_in_16_bit(shim, dtype):
    check_clusters(shim, columns=2 * FEWEST + 4095, dtype=dtype)


@pytest.mark.parametrize("beta", BETAS)
def test_masked_rows_by_clusters(shim, beta):
    logits, mask = tiles(FEWEST), torch.tensor([True, False, True, False, False])
    labels, options = torch.where(mask, labels_for(ROWS, FEWEST, "cpu"), -1), SETTINGS["smooth"]
    for x in logits[:2]:
        x[~mask] = math.nan
    made = run_clusters(shim, logits, labels, options, beta, mask=mask)
    assert all((x[~mask] == 0).all() for x in made)
    known = [x[mask] for x in (*logits[:2], WEIGHT, CE_WEIGHT, labels)]
    assert_metrics(made[2][mask], None, known[0], metrics_truth(known[0], known[4], options), options)
    assert_dz(made[3][mask], *known, beta=beta, options=options)


# ---- what is read and written, and in which order


def check_traffic(shim, beta=0.0):
    """As without metrics, and of the student one element a row. Nothing is written twice."""
    columns, options = FEWEST, (beta, *SETTINGS["smooth"])
    logits, labels = tiles(columns), labels_for(ROWS, columns, "cpu")
    epilogues, (loss, stats), metrics = kernels_of(shim).epilogues, outputs(), fresh_metrics()
    state, metric_state = torch.zeros(5, ROWS), torch.full((4, ROWS), -1e30)
    grad = torch.empty(ROWS, columns)
    mine = {"labels": labels, "metrics": metrics}
    of_ce = {**mine, "ce_weight": CE_WEIGHT}
    tiled = {"labels": labels, "metric_state": metric_state}
    for name, arguments, more in (
        ("tile_stats", (state, False, options), tiled),
        ("forward", (loss, stats, columns, options), mine),
        ("forward_grad", (WEIGHT, loss, stats, grad, columns, options), of_ce),
        (
            "grad",
            (WEIGHT, stats, grad, columns, options),
            {**of_ce, "first_token": 0, "total_vocab": columns},
        ),
    ):
        seen = []
        for with_metrics in (False, True):
            given = {"weight": WEIGHT, "state": state, "stats": stats, **(of_ce | tiled)}
            with shim.trace(**readable(logits, **given)) as trace:
                getattr(epilogues, name)(logits, None, *arguments, **(more if with_metrics else {}))
                loads = [trace.loads(side) for side in ("student", "teacher")]
                seen.append([(x.bytes, x.narrow) for x in loads])
                written = [trace.take_stores(x) for x in (loss, stats, grad, state, metrics, metric_state)]
                assert all(x.twice == 0 for x in written) and written[-1].elsewhere == 0
                assert trace.scratch_loaded() == 0
        (student, teacher), (student_with, teacher_with) = seen
        label = 0 if name == "grad" else ROWS
        assert (student_with[0] - student[0], student_with[1]) == (4 * label, label), name
        assert teacher_with == teacher and student[1] == 0, name


@pytest.mark.parametrize("beta", BETAS)
def test_metrics_add_no_traffic(shim, beta):
    check_traffic(shim, beta)


@pytest.mark.parametrize("beta", BETAS)
def test_order_of_threads_changes_no_bit_of_metrics(shim, kernels, beta):
    options, numbers = SETTINGS["capped"], (beta, *SETTINGS["capped"])
    logits, labels, results = tiles(4096), labels_for(ROWS, 4096, "cpu"), []
    wide, wide_labels = tiles(FEWEST), labels_for(ROWS, FEWEST, "cpu")
    for order in ORDERS:
        with shim.order(order):
            made = run_clusters(shim, wide, wide_labels, options, beta) if order < 4 else ()
            state, metric_state = torch.zeros(5, ROWS), torch.full((4, ROWS), math.nan)
            more = {"labels": labels, "metric_state": metric_state}
            kernels.epilogues.tile_stats(logits, None, state, True, numbers, **more)
            _, stats, metrics = kernels.forward_metrics(*logits[:2], None, labels, 4096, numbers)
            grad = kernels.backward(
                WEIGHT, stats, *logits[:2], None, 4096, numbers, labels, metrics, CE_WEIGHT
            )
            results.append((state, metric_state, metrics, grad, *made))
    for other in results[1:]:
        for x, first in zip(other, results[0], strict=False):
            np.testing.assert_array_equal(x.numpy(), first.numpy())


def test_bad_metric_input(shim, kernels):
    good, labels, epilogues, options = (
        tiles(40),
        labels_for(ROWS, 40, "cpu"),
        kernels.epilogues,
        (0.0, *PLAIN),
    )
    (loss, stats), metrics = outputs(), fresh_metrics()
    grad, state = torch.empty(ROWS, 40), torch.zeros(5, ROWS)

    def forward(**more):
        epilogues.forward(
            good, None, loss, stats, 40, options, **{"labels": labels, "metrics": metrics, **more}
        )

    def backward(**more):
        more = {"labels": labels, "metrics": metrics, "ce_weight": CE_WEIGHT, **more}
        epilogues.grad(good, None, WEIGHT, stats, grad, 40, options, **more)

    def tile(**more):
        epilogues.tile_stats(good, None, state, True, options, **more)

    def finish(**more):
        more = {"metric_states": torch.zeros(1, 4, ROWS), "metrics": metrics, "total_vocab": 40, **more}
        epilogues.finish_stats(state[None], None, loss, stats, options, **more)

    for call, arguments, message in [
        (forward, {"labels": labels.int()}, r"labels must be int64 \[N\]"),
        (forward, {"labels": labels[1:]}, r"labels must be int64 \[N\]"),
        (forward, {"metrics": torch.zeros(ROWS, 8)[:, ::2]}, "metrics must be contiguous"),
        (forward, {"metrics": torch.zeros(ROWS, 3)}, "metrics must be contiguous"),
        (backward, {"ce_weight": torch.ones(4)}, r"ce_weight must be float32 \[N\]"),
        (backward, {"labels": None}, "ce_weight needs labels and metrics"),
        (backward, {"metrics": None}, "ce_weight needs labels and metrics"),
        (tile, {"metric_state": torch.zeros(3, ROWS)}, "metric_state must be float32"),
        (finish, {"metric_states": None}, "metrics need metric_states and total_vocab"),
        (finish, {"total_vocab": 0}, "metrics need metric_states and total_vocab"),
        (finish, {"metric_states": torch.zeros(2, 4, ROWS)}, "metric_states has 2 splits, states 1"),
        (finish, {"metric_states": torch.zeros(1, 5, ROWS)}, "metric_states must be contiguous"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(**arguments)


# ---- planted faults: what these tests are to see, they see


def of_kernels(check, *arguments):
    return lambda shim: check(kernels_of(shim), *arguments)


CHECKS = {
    "rows": of_kernels(test_metrics_of_rows, 0.0, "capped"),
    "whole rows": of_kernels(test_metrics_of_whole_rows, 0.0, "smooth"),
    "tiles": of_kernels(test_metrics_of_tiles, 0.0, "capped"),
    "masked out": of_kernels(test_metrics_of_masked_out_tokens, 0.0, "warm"),
    "unknown": of_kernels(test_metrics_of_unknown_labels),
    "clusters": partial(check_clusters, beta=0.3),
    "traffic": check_traffic,
}


@pytest.mark.skipif(SANITIZE, reason="the faults are planted in the plain build")
@pytest.mark.parametrize("name", some(CUDA_METRICS))
def test_planted_fault_is_found(shim, name):
    key, fault, message = CUDA_METRICS[name]
    broken = load("kl_loss", fault, WITHOUT_HALF, WITHOUT_BFLOAT16)
    assert_fault_is_found(CHECKS[key], shim, broken, message)


@pytest.mark.skipif(SANITIZE, reason="this is the child")
def test_metrics_under_sanitizers():
    assert_clean_under_sanitizers(__file__, "of_tiles or masked_rows or unknown or bad_metric")
