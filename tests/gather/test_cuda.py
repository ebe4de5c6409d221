"""gather's CUDA kernel, run on the host by the shim: bits, bounds, traffic, thread order, faults."""

import mmap

import pytest
import torch

from gather.faults import CUDA
from gather.problems import KINDS, WIDTHS, assert_gathered, keep_some, make_weight
from tools.faults import some
from tools.host_shim import (
    REVERSE,
    SANITIZE,
    assert_clean_under_sanitizers,
    assert_fault_is_found,
    assert_overrun_is_found,
    load,
    missing_tool,
)

pytestmark = pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))

DTYPES = (*WIDTHS, torch.float8_e4m3fn, torch.bool)


@pytest.fixture(scope="module")
def shim():
    return load("gather", sanitize=SANITIZE)


def make_out(weight, rows, cols):
    shape = list(weight.shape)
    if rows is not None:
        shape[-2] = len(rows)
    if cols is not None:
        shape[-1] = len(cols)
    return make_weight(*shape, dtype=weight.dtype, seed=99)


def check(shim, weight, rows=None, cols=None, out=None):
    out = make_out(weight, rows, cols) if out is None else out
    shim.ops.gather_channels_(out, weight, rows, cols)
    assert_gathered(out, weight, rows, cols)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_bits(shim, dtype, kind):
    """Rows and columns that fill no block, runs that lie and that do not lie at multiples of 16 bytes."""
    weight = make_weight(37, 240, dtype=dtype)
    for count in (1, 13, 64, 168):
        rows, cols = keep_some(37, 21, kind), keep_some(240, count, kind, seed=count)
        for keep in ((rows, cols), (rows, None), (None, cols), (None, None)):
            check(shim, weight, *keep)
    check(shim, weight, cols=torch.arange(3, 227))
    # one column more than whole blocks have, whatever the width
    check(shim, make_weight(3, 5000, dtype=dtype), cols=keep_some(5000, 4097, kind))


@pytest.mark.parametrize("dtype", WIDTHS)
def test_layouts(shim, dtype):
    """Rows that begin anywhere; nothing is read but the weight, nothing written but the result, once."""
    base, room = make_weight(9, 96, dtype=dtype), make_weight(9, 96, dtype=dtype, seed=1)
    rows = keep_some(9, 7)
    for start, length, to in ((0, 64, 0), (1, 64, 0), (0, 64, 3), (5, 61, 2), (7, 1, 8), (16, 17, 16)):
        weight = base[:, start : start + length]
        for cols in (None, keep_some(length, max(1, length // 2)), torch.arange(length // 2, length)):
            out = room[:7, to : to + (length if cols is None else len(cols))]
            allowed = {"weight": weight, "rows": rows} | ({} if cols is None else {"cols": cols})
            with shim.trace(**allowed) as trace:
                shim.ops.gather_channels_(out, weight, rows, cols)
                stores = trace.take_stores(out)
            assert stores.never == stores.twice == stores.elsewhere == 0
            assert_gathered(out, weight, rows, cols)


@pytest.mark.parametrize("dtype", WIDTHS)
def test_strides(shim, dtype):
    x = make_weight(4, 30, 80, dtype=dtype)
    for weight in (
        x[..., ::3],
        x.mT.contiguous().mT,
        x.transpose(0, 1),
        x.permute(1, 2, 0),
        x[:, :1].expand(4, 12, 80),
        x.view(2, 2, 1, 5, 6, 80).transpose(0, 3),
        x.view(2, 2, 2, 3, 5, 80).permute(3, 0, 2, 1, 4, 5),
        x[2],
        x[1, 2],
    ):
        cols = keep_some(weight.shape[-1], weight.shape[-1] // 2 + 1)
        rows = keep_some(weight.shape[-2], weight.shape[-2] // 2 + 1) if weight.dim() > 1 else None
        for keep in ((rows, cols), (rows, None), (None, cols)):
            check(shim, weight, *keep)
            out = make_out(weight, *keep)
            if weight.dim() > 1:
                check(shim, weight, *keep, out=out.mT.contiguous().mT)
            check(shim, weight, *keep, out=torch.stack([out, out], -1)[..., 0])


def test_leads_that_join_in_one_tensor_only(shim):
    weight = make_weight(2, 3, 5, 24, dtype=torch.float32)
    # with room behind it for what a wrong stride would reach
    swapped = make_weight(12, 2, 5, 24, dtype=torch.float32).transpose(0, 1)[:, :3]
    check(shim, weight, out=swapped)
    check(shim, swapped, out=torch.empty(2, 3, 5, 24))
    # dimensions of one, whose strides mean nothing, are not counted
    check(shim, weight.as_strided((1, 2, 1, 1, 3, 1, 1, 1, 5, 24), (5, 360, 7, 11, 120, 13, 17, 19, 24, 1)))


def test_rows_at_16_bytes_in_the_first_matrix_only(shim):
    near, store = make_weight(2, 3, 16, dtype=torch.float32), torch.zeros(100)
    apart = store.as_strided((2, 3, 16), (49, 16, 1))
    check(shim, near, out=apart)
    check(shim, apart)
    check(shim, apart, cols=torch.arange(4, 12))


@pytest.mark.parametrize("shape", [(2, 40), (2, 1, 40)])
def test_offsets_beyond_32_bits(shim, shape):
    """The second row, or matrix, begins 2^32 + 8 elements after the first; nothing between is touched."""
    step, near = 2**32 + 8, make_weight(*shape, dtype=torch.int8)
    strides = (step, 40, 1) if len(shape) == 3 else (step, 1)
    source, out = (
        torch.frombuffer(mmap.mmap(-1, step + 40), dtype=torch.int8).as_strided(shape, strides)
        for _ in range(2)
    )
    check(shim, source.copy_(near), out=out)
    assert_gathered(out, near)


def test_empty_and_one(shim):
    none, one = torch.empty(0, dtype=torch.int64), torch.tensor([0])
    weight = make_weight(3, 5, 7)
    for w, rows, cols in ((weight, none, one), (weight, one, none), (weight[:0], one, one)):
        check(shim, w, rows, cols)
    check(shim, weight[:1, :1, :1], one, one)


def test_order_of_threads_changes_nothing(shim):
    weight, cols = make_weight(20, 700), keep_some(700, 501, "repeated")
    for order in (REVERSE, 2, 3):
        with shim.order(order):
            check(shim, weight, keep_some(20, 17), cols)


def traffic(shim, dtype, kind):
    """Bytes of 40 of 50 rows, 512 of 1024 columns: loads of weight, rows and cols, stores of out."""
    weight, rows = make_weight(50, 1024, dtype=dtype), keep_some(50, 40)
    cols = None if kind is None else keep_some(1024, 512, kind)
    if kind == "runs":
        cols = torch.arange(256, 768)
    out = make_out(weight, rows, cols)
    regions = {"weight": weight, "rows": rows} | ({} if cols is None else {"cols": cols})
    with shim.trace(**regions) as trace:
        shim.ops.gather_channels_(out, weight, rows, cols)
        loads = {name: trace.loads(name) for name in regions}
        return loads, trace.take_stores(out), out


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("kind", ["sorted", "runs", None])
def test_traffic(shim, dtype, kind):
    """Each kept element is read once and written once; 16 bytes at a time but for single columns."""
    loads, stores, out = traffic(shim, dtype, kind)
    size = out.nbytes
    assert loads["weight"].bytes == size and stores.bytes == size
    assert stores.narrow == stores.never == stores.twice == stores.elsewhere == 0
    if kind != "sorted" or dtype == torch.complex128:
        # complex128 is loaded as elements, which are 16 bytes wide
        assert loads["weight"].narrow == 0
    if kind is not None:  # the indices of a column once for 16 rows: 40 rows are 3 runs
        assert loads["cols"].bytes == 3 * 512 * 8


def test_bad_input(shim):
    weight, keep = make_weight(4, 6), torch.tensor([0, 1])
    for arguments, message in (
        ((make_weight(2, 5), weight, keep, None), "out must have weight's shape"),
        ((make_weight(2, 6).view(torch.int16), weight, keep, None), "and its dtype"),
        ((make_weight(2, 6), weight, keep.int(), None), "rows must be a contiguous int64 vector"),
        ((make_weight(4, 2), weight, None, keep[None]), "cols must be a contiguous int64 vector"),
        ((make_weight(2), weight[0], keep, None), "weight must be a vector without rows"),
    ):
        with pytest.raises(RuntimeError, match=message):
            shim.ops.gather_channels_(*arguments)
    many = torch.zeros(2, 3, 2, 3, 2, 3, 2, 3, 1, 1)
    order = (7, 6, 5, 4, 3, 2, 1, 0, 8, 9)
    with pytest.raises(RuntimeError, match="at most 6: make them contiguous"):
        shim.ops.gather_channels_(many, many.permute(order).contiguous().permute(order), None, None)


# ---- the rungs themselves: a planted fault must turn them red


def check_sorted(shim):
    check(shim, make_weight(37, 240), keep_some(37, 21), keep_some(240, 170))


def check_words(shim):
    weight = make_weight(37, 240, dtype=torch.bfloat16)
    check(shim, weight, keep_some(37, 21), keep_some(240, 168))


def check_unaligned_run(shim):
    check(shim, make_weight(5, 240), cols=torch.arange(3, 227))


def check_bounds(shim):
    for dtype in (torch.bfloat16, torch.float32):
        test_layouts(shim, dtype)


def check_run_bounds(shim):
    """Rows in twos, threes, ... after those that are moved together."""
    store, out = torch.zeros(12, 64), torch.zeros(11, 64)
    for rows in range(1, 12):
        with shim.trace(weight=store[:rows]) as trace:
            shim.ops.gather_channels_(out[:rows], store[:rows], None, None)
            stores = trace.take_stores(out[:rows])
        assert stores.never == stores.twice == stores.elsewhere == stores.narrow == 0


def check_run_traffic(shim):
    test_traffic(shim, torch.bfloat16, "runs")


def check_leads(shim):
    test_leads_that_join_in_one_tensor_only(shim)


CHECKS = {
    "sorted": check_sorted,
    "words": check_words,
    "unaligned run": check_unaligned_run,
    "bounds": check_bounds,
    "run bounds": check_run_bounds,
    "run traffic": check_run_traffic,
    "leads": check_leads,
}


@pytest.mark.skipif(SANITIZE, reason="the faults are planted in the plain build")
@pytest.mark.parametrize("name", some(CUDA))
def test_planted_fault_is_found(shim, name):
    key, fault, message = CUDA[name]
    assert_fault_is_found(CHECKS[key], shim, load("gather", fault), message)


# ---- the same tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a process that preloads these

SANITIZED = "bits or layouts or strides or empty or bad_input"
HEAP_OVERRUN = """
import torch
from gather.faults import CUDA
from tools.host_shim import load
_, overrun, _ = CUDA["rows beyond the last"]
shim = load("gather", overrun, sanitize=True)
shim.ops.gather_channels_(torch.zeros(1, 37), torch.zeros(1, 37), None, None)
"""


@pytest.mark.skipif(SANITIZE, reason="this is the child")
def test_under_sanitizers():
    assert_clean_under_sanitizers(__file__, SANITIZED)


@pytest.mark.skipif(SANITIZE, reason="this is the child")
def test_sanitizers_find_a_planted_overrun():
    assert_overrun_is_found(HEAP_OVERRUN)
