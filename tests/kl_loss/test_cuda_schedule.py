"""kl_loss's CUDA kernels, run on the host by the shim: thread order, rows that blocks share, traffic; and
planted faults, which these and the tests of values must find.
"""

import pytest
import torch

from kl_loss.faults import CUDA_ROWS
from kl_loss.shim_rows import (  # noqa: F401
    DTYPES,
    check,
    normal,
    poisoned_memory_fixture,
    run,
    shim_fixture,
)
from tools.faults import some
from tools.host_shim import (
    FORWARD,
    REVERSE,
    SANITIZE,
    WITHOUT_BFLOAT16,
    WITHOUT_HALF,
    assert_fault_is_found,
    load,
    missing_tool,
)

pytestmark = pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))


def test_order_of_threads_changes_no_bit(shim):
    V = 4099
    student, teacher = normal(2, V, dtype=torch.bfloat16), normal(2, V, seed=12)
    for beta in (0.0, 0.5):
        expected = run(shim, student, teacher, beta=beta)
        for order in (REVERSE, 2, 3, 4, 5, 6):
            with shim.order(order):
                actual = run(shim, student, teacher, beta=beta)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_one_row_split_over_blocks(shim):
    """Few rows and a large vocabulary: several blocks of the backward share a row, its padding, and a row
    that does not count.
    """
    V, columns = 40_003, 50_000
    student, teacher = (normal(2, columns, dtype=torch.bfloat16, seed=seed) for seed in (0, 13))
    check(shim, student, teacher, beta=0.0, vocab_size=V)
    mask = torch.tensor([True, False])
    loss, stats, _ = run(shim, student, teacher, mask=mask, vocab_size=V)
    logits = {"student": student[:1, :V], "teacher": teacher[:1, :V]}
    with shim.trace(**logits, stats=stats, loss=loss, mask=mask) as trace:
        grad = shim.ops.kl_loss_backward(
            loss, stats, student, teacher, mask, V, [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
        )
        stores = trace.take_stores(grad)
    assert stores.never == stores.twice == stores.elsewhere == 0
    assert (grad[0, V:] == 0).all() and (grad[1] == 0).all()


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_traffic(shim, student_dtype, teacher_dtype, beta):
    """Forward: each logit once, JSD twice. Backward: each logit and each gradient once. 16 bytes wide."""
    N, V = 3, 4096
    student, teacher = normal(N, V, dtype=student_dtype), normal(N, V, dtype=teacher_dtype, seed=14)
    S, T = N * V * student.element_size(), N * V * teacher.element_size()
    rest = (None, V, [beta, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    passes = 2 if beta == 0.5 else 1
    with shim.trace(student=student, teacher=teacher) as trace:
        loss, stats = shim.ops.kl_loss_forward(student, teacher, *rest)
        assert trace.loads("student").bytes == passes * S and trace.loads("student").narrow == 0
        assert trace.loads("teacher").bytes == passes * T and trace.loads("teacher").narrow == 0
        assert trace.take_stores(loss).bytes == 4 * N
        assert trace.take_stores(stats).bytes == 24 * N
        assert trace.most_shared_bytes() == 640 + (256 if beta == 0.5 else 0)
    with shim.trace(student=student, teacher=teacher, stats=stats, loss=loss) as trace:
        grad = shim.ops.kl_loss_backward(loss, stats, student, teacher, *rest)
        assert trace.loads("student").bytes == S and trace.loads("student").narrow == 0
        assert trace.loads("teacher").bytes == T and trace.loads("teacher").narrow == 0
        stores = trace.take_stores(grad)
        assert stores.bytes == S and stores.narrow == stores.elsewhere == 0
        assert trace.most_shared_bytes() == 0


# ---- the rungs themselves: a planted fault must turn them red


def check_rising(shim):
    rising = torch.linspace(-60.0, 60.0, 16387)[None]
    check(shim, rising, rising.flip(1))


def check_orders(shim):
    student, teacher = normal(1, 4099), normal(1, 4099, seed=15)
    for order in (FORWARD, REVERSE, 2, 3, 4, 5, 6):
        with shim.order(order):
            check(shim, student, teacher)


def check_bounds(shim):
    store = torch.zeros(2, 64)
    view = store[:, :40]
    with shim.trace(student=view, teacher=view):
        shim.ops.kl_loss_forward(view, view, None, 40, [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0])


def check_alignment(shim):
    store = torch.zeros(1, 41)
    run(shim, store[:, 1:], store[:, 1:])


def check_traffic(shim):
    test_traffic(shim, torch.float32, torch.float32, 0.0)


def check_padding(shim):
    student, teacher = normal(2, 90), normal(2, 90, seed=16)
    loss, stats, _ = run(shim, student, teacher, vocab_size=64)
    with shim.trace(student=student, teacher=teacher, stats=stats, loss=loss) as trace:
        grad = shim.ops.kl_loss_backward(
            loss, stats, student, teacher, None, 64, [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
        )
        assert trace.take_stores(grad).never == 0


CHECKS = {
    "rising": check_rising,
    "orders": check_orders,
    "bounds": check_bounds,
    "alignment": check_alignment,
    "traffic": check_traffic,
    "padding": check_padding,
}


@pytest.mark.skipif(SANITIZE, reason="the faults are planted in the plain build")
@pytest.mark.parametrize("name", some(CUDA_ROWS))
def test_planted_fault_is_found(shim, name):
    key, fault, message = CUDA_ROWS[name]
    broken = load("kl_loss", fault, WITHOUT_HALF, WITHOUT_BFLOAT16)
    assert_fault_is_found(CHECKS[key], shim, broken, message)
