"""The student's side alone by the CUDA kernels, run on the host by the shim: the cases of every backend, what
is read and written, the order of threads; and planted faults, which these must find.
"""

import math

import numpy as np
import pytest
import torch

from kl_loss.cases import PLAIN
from kl_loss.faults import CUDA_STUDENT
from kl_loss.metric_cases import SETTINGS, labels_for, weights_for
from kl_loss.shim_tiles import (  # noqa: F401
    COLUMNS,
    ORDERS,
    ROWS,
    kernels_fixture,
    kernels_of,
    poisoned_memory_fixture,
    shim_fixture,
    tiles,
    without_cublas_fixture,
)
from kl_loss.student_cases import *  # noqa: F403
from kl_loss.student_cases import test_student_grad, test_student_of_no_weight_and_nan, test_student_stats
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

OPTIONS = (0.0, *SETTINGS["smooth"])
WEIGHT, CE_WEIGHT = weights_for(ROWS, "cpu")
LSE, LSE_Y = torch.full((ROWS,), 12.0), torch.full((ROWS,), 13.0)


def check_traffic(shim):
    """Each logit once, 16 bytes at a time, of a label one more; each gradient once."""
    student, _, bias, _ = tiles(bias=True)
    labels, epilogues = labels_for(ROWS, COLUMNS, "cpu"), kernels_of(shim).epilogues
    state, metric_state = torch.zeros(2, ROWS), torch.zeros(4, ROWS)
    given = {"student": student, "bias": bias, "labels": labels}
    matrix = student.nelement() * 4
    for more, extra in (({}, 0), ({"labels": labels, "metric_state": metric_state}, ROWS)):
        with shim.trace(**given, state=state, metric_state=metric_state) as trace:
            epilogues.student_stats(student, bias, None, state, False, OPTIONS, **more)
            loads = trace.loads("student")
            assert (loads.bytes, loads.narrow) == (matrix + 4 * extra, extra)
            assert trace.loads("state").bytes == trace.take_stores(state).bytes == 8 * ROWS
            assert trace.take_stores(metric_state).bytes == 16 * extra
            assert trace.take_stores(metric_state).elsewhere == 0
    of_ce = {"labels": labels, "lse_y": LSE_Y, "ce_weight": CE_WEIGHT}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for more in ({}, of_ce):
            grad = torch.empty(ROWS, COLUMNS, dtype=dtype)
            with shim.trace(**given, weight=WEIGHT, lse=LSE, lse_y=LSE_Y, ce_weight=CE_WEIGHT) as trace:
                epilogues.student_grad(student, bias, None, WEIGHT, LSE, grad, COLUMNS, OPTIONS, **more)
                loads, stores = trace.loads("student"), trace.take_stores(grad)
            assert (loads.bytes, loads.narrow) == (matrix, 0)
            assert (stores.bytes, stores.narrow, stores.elsewhere) == (grad.nbytes, 0, 0)


def test_student_traffic(shim):
    check_traffic(shim)


@pytest.mark.parametrize("start", [0, 1])
def test_only_rows_and_columns_that_count_are_read(shim, kernels, start):
    """Rows that begin anywhere; what is not to be read holds NaN; what is due is written once."""
    columns, mask = 161, torch.tensor([True, False, True, False, True])
    wide = torch.full((ROWS, 192), math.nan)
    student = wide[:, start : start + columns]
    student.copy_(tiles(columns)[0])
    state, metric_state = torch.zeros(2, ROWS), torch.full((4, ROWS), math.nan)
    labels, epilogues = labels_for(ROWS, columns, "cpu"), kernels.epilogues
    allowed = {"student": student[::2], "mask": mask, "labels": labels}
    with shim.trace(**allowed) as trace:
        more = {"labels": labels, "metric_state": metric_state}
        epilogues.student_stats(student, None, mask, state, True, OPTIONS, **more)
        stores = [trace.take_stores(x) for x in (state, metric_state)]
    assert all(x.never == x.twice == 0 for x in stores) and stores[-1].elsewhere == 0
    dz = torch.full((ROWS, 192), math.nan, dtype=torch.bfloat16)[:, : columns + 3]
    with shim.trace(**allowed, weight=WEIGHT, lse=LSE, lse_y=LSE_Y, ce_weight=CE_WEIGHT) as trace:
        more = {"labels": labels, "lse_y": LSE_Y, "ce_weight": CE_WEIGHT}
        epilogues.student_grad(student, None, mask, WEIGHT, LSE, dz, columns, OPTIONS, **more)
        stores = trace.take_stores(dz)
    assert stores.never == stores.twice == stores.elsewhere == 0
    assert (dz[:, columns:] == 0).all() and (dz[1::2] == 0).all() and dz[::2].isfinite().all()


def test_order_of_threads_changes_no_bit_of_the_student(shim, kernels):
    student, labels, results = tiles()[0], labels_for(ROWS, COLUMNS, "cpu"), []
    for order in ORDERS:
        with shim.order(order):
            state, metric_state = torch.zeros(2, ROWS), torch.zeros(4, ROWS)
            more = {"labels": labels, "metric_state": metric_state}
            kernels.epilogues.student_stats(student, None, None, state, True, OPTIONS, **more)
            results.append((state, metric_state))
    for other in results[1:]:
        for x, first in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(x.numpy(), first.numpy())


def test_bad_student_input(kernels):
    good, labels, epilogues = tiles(40)[0], labels_for(ROWS, 40, "cpu"), kernels.epilogues
    state, options = torch.zeros(2, ROWS), (0.0, *PLAIN)

    def stats(student=good, bias=None, state=state, **more):
        epilogues.student_stats(student, bias, None, state, True, options, **more)

    def grad(weight=WEIGHT, lse=LSE, columns=40, dtype=torch.float32, vocab_size=40, **more):
        dz = torch.empty(ROWS, columns, dtype=dtype)
        epilogues.student_grad(good, None, None, weight, lse, dz, vocab_size, options, **more)

    for call, arguments, message in [
        (stats, {"student": good.bfloat16()}, "student_logits must be float32 out of the GEMM"),
        (stats, {"bias": torch.zeros(39)}, "student_bias must be float32"),
        (stats, {"state": torch.zeros(5, ROWS)}, "state must be float32"),
        (stats, {"metric_state": torch.zeros(3, ROWS)}, "metric_state must be float32"),
        (stats, {"labels": labels[1:]}, r"labels must be int64 \[N\]"),
        (grad, {"weight": torch.ones(4)}, r"weight must be float32 \[N\]"),
        (grad, {"lse": torch.ones(4)}, r"lse must be float32 \[N\]"),
        (grad, {"columns": 39}, "grad has 39 columns, vocab_size is 40"),
        (grad, {"vocab_size": 41, "columns": 41}, "vocab_size 41 is not in"),
        (grad, {"dtype": torch.float64}, "grad must be float32, bfloat16 or float16"),
        (grad, {"ce_weight": CE_WEIGHT, "labels": labels}, "ce_weight needs labels and lse_y"),
        (grad, {"ce_weight": CE_WEIGHT, "lse_y": LSE_Y}, "ce_weight needs labels and lse_y"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(**arguments)


# ---- planted faults: what these tests are to see, they see

CHECKS = {
    "stats": lambda shim: test_student_stats(kernels_of(shim), "capped", 64),
    "grad": lambda shim: test_student_grad(kernels_of(shim), "capped", torch.float32),
    "nothing": lambda shim: test_student_of_no_weight_and_nan(kernels_of(shim)),
    "traffic": check_traffic,
}


@pytest.mark.skipif(SANITIZE, reason="the faults are planted in the plain build")
@pytest.mark.parametrize("name", some(CUDA_STUDENT))
def test_planted_fault_is_found(shim, name):
    key, fault, message = CUDA_STUDENT[name]
    broken = load("kl_loss", fault, WITHOUT_HALF, WITHOUT_BFLOAT16)
    assert_fault_is_found(CHECKS[key], shim, broken, message)


@pytest.mark.skipif(SANITIZE, reason="this is the child")
def test_student_under_sanitizers():
    assert_clean_under_sanitizers(__file__, "student_stats or only_rows or no_weight or bad_student")
