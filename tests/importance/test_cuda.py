"""importance's CUDA kernels, run on the host by the shim: values, bounds, traffic, thread order, faults."""

import itertools
import math
import mmap

import numpy as np
import pytest
import torch

from importance import oracle
from importance.faults import CUDA, UNIT
from importance.problems import DTYPES as ALL_DTYPES
from importance.problems import activations, check_close_rows, check_moments, sinks
from tools.faults import Fault, some
from tools.host_shim import (
    REVERSE,
    SANITIZE,
    WITHOUT_HALF,
    assert_clean_under_sanitizers,
    assert_fault_is_found,
    load,
    missing_tool,
)

pytestmark = pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))

DTYPES = ALL_DTYPES[:2] if SANITIZE else ALL_DTYPES
# so that few tokens make several pieces
SHORT_PIECES = (
    Fault(UNIT, "kLeastTokens = 32;", "kLeastTokens = 8;"),
    Fault(UNIT, "kEnoughBlocks = 1024;", "kEnoughBlocks = 8;"),
)


@pytest.fixture(scope="module")
def shim():
    if SANITIZE:
        return load("importance", *SHORT_PIECES, WITHOUT_HALF, sanitize=True)
    return load("importance", *SHORT_PIECES)


@pytest.fixture(scope="module")
def shipped():
    return load("importance", WITHOUT_HALF)


def assert_moments(shim, x, **options):
    check_moments(shim.ops.importance_moments, x, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 21, 1025), (1, 70, 64), (2, 8, 1048), (2, 1, 1)])
def test_moments(shim, dtype, shape):
    """1025 channels are one more than whole blocks have, in every kernel and dtype."""
    assert_moments(shim, activations(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_heads,head_dim", [(4, 64), (3, 80), (7, 5), (1, 300), (9, 1)])
def test_heads(shim, dtype, num_heads, head_dim):
    x = activations(2, 21, num_heads * head_dim, dtype=dtype)
    assert_moments(shim, x, num_heads=num_heads, kinds_of_sums=(7,))


@pytest.mark.parametrize("num_heads", [0, 7])
def test_masked_tokens_are_not_read(shim, num_heads):
    x = activations(5, 40, 56, dtype=torch.bfloat16)
    mask = torch.ones(5, 40, dtype=torch.bool)
    mask[0, 30:] = mask[1, :11] = False  # right and left padding
    mask[2, ::2] = mask[3] = False  # holes; nothing left
    x[~mask] = math.nan
    assert_moments(shim, x, mask=mask, num_heads=num_heads)
    flat = x.view(200, 56)
    runs = {f"tokens{t}": flat[t : t + 1] for t in mask.view(-1).nonzero()[:, 0].tolist()}
    with shim.trace(mask=mask.view(-1), **runs) as trace:
        shim.ops.importance_moments(x, mask, None, num_heads, 7)
        assert {trace.loads(name).bytes for name in runs} == {112}


@pytest.mark.parametrize("num_heads", [0, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_packed_sequences(shim, num_heads, masked):
    """Sequences of no token, of one, and of several pieces; borders inside pieces and at their ends."""
    x, borders = activations(100, 90), [0, 0, 17, 17, 63, 64, 64, 96, 100, 100]
    mask = torch.arange(100) % 3 != 1 if masked else None
    if masked:
        x[~mask] = math.nan
    assert_moments(shim, x, cu_seqlens=borders, num_heads=num_heads, mask=mask)


@pytest.mark.skipif(not SANITIZE, reason="AddressSanitizer looks on: test_under_sanitizers")
@pytest.mark.parametrize("borders", [[5, 9, 60], [0, 9, 30], [0, 50, 20, 60], [0, 90, 300], [-7, 20, 60]])
def test_wrong_borders_lead_nowhere_else(shim, borders):
    """Nobody checks them on a GPU: the sums mean nothing then, but all accesses stay inside."""
    moments, counts = shim.ops.importance_moments(activations(60, 16), None, torch.tensor(borders), 0, 7)
    assert (moments.shape, counts.shape) == ((4, len(borders) - 1, 16), (len(borders) - 1,))


def test_strides_and_misaligned(shim):
    base = activations(4, 50, 333, dtype=torch.bfloat16)
    for x in (
        base[:, ::3, 1:300],
        base[::2, 45:, 7:8],
        base[:, :9].transpose(0, 1),
        base[:1, 3:4, 5:29],
        base[:0],
        base[:, :0],
        base[..., :0],
        base.view(-1).as_strided((2, 20, 128), (20 * 128 + 1, 128, 1)),  # its second sequence is misaligned
    ):
        assert_moments(shim, x, kinds_of_sums=(7,))
    wide = activations(2, 20, 200, dtype=torch.bfloat16)[..., 8:136]  # aligned, with a stride
    assert_moments(shim, wide, kinds_of_sums=(7,))
    with shim.trace(a=wide[0], b=wide[1]) as trace:
        shim.ops.importance_moments(wide, None, None, 0, 1)
        assert trace.loads("a").narrow == 0 and trace.loads("b").bytes == 20 * 128 * 2


@pytest.mark.parametrize("case", [0, 1])
def test_variance_where_the_mean_is_far(shipped, case):
    """And the first token is an outlier."""
    x = sinks(1000)[case]
    truth = oracle.moments(x.double().numpy())[0][3]
    m2 = shipped.ops.importance_moments(x, None, None, 0, 4)[0][1].double().numpy()
    assert np.abs(m2 / truth - 1).max() < 1e-4


@pytest.mark.skipif(SANITIZE, reason="long")
def test_long_pieces(shipped):
    """The longest pieces that are shipped, several to a sequence."""
    x = activations(1, 1500, 8) + 1.0
    small_grid = load("importance", Fault(UNIT, "Blocks = 1024;", "Blocks = 1;"), WITHOUT_HALF)
    assert_moments(small_grid, x, kinds_of_sums=(7,))
    for build, pieces in ((small_grid, 3), (shipped, 47)):
        with build.trace(x=x[0]) as trace:
            build.ops.importance_moments(x, None, None, 0, 1)
            assert trace.scratch_loaded() == pieces * (4 * 8 + 4 * 32)


def check_rows(shim, dtype, width):
    """17 rows are one more than whole blocks take; y's rows lie apart too, and elsewhere than x's."""
    x, turn = (activations(17, width, dtype=dtype, seed=seed) for seed in (0, 1))
    x[3], turn[5] = 0, 0
    for y, start in itertools.product((x + turn, turn, 3 * x, None), (0, 1)):
        store, other = (torch.full((17, width + more), math.nan, dtype=dtype) for more in (3, 5))
        a = store[:, start : start + width] if start else x.clone()
        a.copy_(x)
        if start and y is not None:
            y = other[:, 2 : 2 + width].copy_(y)
        allowed = {"a": a} if y is None else {"a": a, "y": y}
        with shim.trace(**allowed) as trace:
            out = shim.ops.importance_rows(a, y)
            assert {trace.loads(name).bytes for name in allowed} == {17 * width * x.element_size()}
            stores = trace.take_stores(out)
            assert stores.never == stores.twice == stores.elsewhere == 0
        rows = out.double().numpy()
        if y is None:
            np.testing.assert_allclose(rows, np.linalg.norm(x.double().numpy(), axis=-1), rtol=1e-6)
        else:
            truth = oracle.cosine_distance(x.double().numpy(), y.double().numpy())
            np.testing.assert_allclose(rows, truth, atol=1e-6)
            assert (rows >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(shim, dtype):
    for width in (1, 7, 8, 9, 31, 77, 128, 1100):
        check_rows(shim, dtype, width)


@pytest.mark.parametrize("dtype", DTYPES)
def test_close_rows_keep_their_digits(shim, dtype):
    for width in (33, 1000):
        check_close_rows(shim.ops.importance_rows, dtype, width)


def test_offsets_beyond_32_bits(shim):
    """Tokens, sequences and rows 2^32 + 16 elements apart; nothing between is touched."""
    near, step = activations(2, 2, 16, dtype=torch.bfloat16), 2**32 + 16
    hole = torch.frombuffer(mmap.mmap(-1, 2 * (step + 64)), dtype=torch.bfloat16)
    tokens = hole.as_strided((2, 2, 16), (32, step, 1)).copy_(near)
    for x in (tokens, tokens.transpose(0, 1)):
        for num_heads in (0, 2):
            assert_moments(shim, x, num_heads=num_heads, kinds_of_sums=(7,))
    truth = oracle.cosine_distance(near[0].double().numpy(), near[1].double().numpy())
    np.testing.assert_allclose(shim.ops.importance_rows(tokens[0], tokens[1]).numpy(), truth, atol=1e-6)


def test_heads_of_no_width(shim):
    moments, counts = shim.ops.importance_moments(torch.zeros(2, 3, 0), None, None, 4, 7)
    assert moments.shape == (4, 2, 4) and not moments.any() and counts.tolist() == [3, 3]


def test_rows_keep_nan_and_take_none(shim):
    x = activations(3, 20)
    y = x.clone()
    y[1, 4] = math.nan
    assert shim.ops.importance_rows(x, y).isnan().tolist() == [False, True, False]
    assert shim.ops.importance_rows(y, None).isnan().tolist() == [False, True, False]
    assert shim.ops.importance_rows(x[:0], y[:0]).shape == (0,)
    assert shim.ops.importance_rows(x[:, :0], x[:, :0]).tolist() == [1.0, 1.0, 1.0]


def check_orders(shim):
    x, mask = activations(2, 40, 72, dtype=torch.bfloat16), torch.arange(80).reshape(2, 40) % 5 > 0
    for heads in (0, 9):
        expected = shim.ops.importance_moments(x, mask, None, heads, 7)
        truth, _ = oracle.moments(x.double().numpy(), mask=mask.numpy(), num_heads=heads)
        for order in (REVERSE, 2, 3, 4, 5, 6):
            with shim.order(order):
                actual = shim.ops.importance_moments(x, mask, None, heads, 7)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        np.testing.assert_allclose(expected[0][0].double().numpy(), truth[0], rtol=1e-6)


def test_order_of_threads_changes_no_bit(shim):
    check_orders(shim)


def check_traffic(shim, dtype=torch.bfloat16, kinds=7, masked=True):
    """x once and 16 bytes at a time, a mask once per block of channels, the partial planes once each way."""
    B, S, C = 2, 40, 1536
    x = activations(B, S, C, dtype=dtype)
    mask = torch.arange(B * S).reshape(B, S) >= 0 if masked else None
    allowed = {"x": x.view(B * S, C)} | ({"mask": mask.view(-1)} if masked else {})
    blocks = math.ceil(C * x.element_size() / 2048)
    planes, slots = (1, 1, 2, 2, 3, 3, 4)[kinds - 1], B * math.ceil(S / 32)
    with shim.trace(**allowed) as trace:
        moments, counts = shim.ops.importance_moments(x, mask, None, 0, kinds)
        loads = trace.loads("x")
        assert (loads.bytes, loads.narrow) == (x.numel() * x.element_size(), 0)
        if masked:
            assert trace.loads("mask").bytes == B * S * blocks
        assert trace.scratch_loaded() == planes * slots * C * 4 + slots * C // 32 * 128
        for output in (moments.view(-1), counts):
            stores = trace.take_stores(output)
            assert stores.never == stores.twice == 0
        # what is left: 16 bytes a store of the partial planes, and the counts
        assert stores.elsewhere == planes * slots * C // 4 + slots


@pytest.mark.skipif(SANITIZE, reason="long")
@pytest.mark.parametrize("kinds", [1, 2, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_traffic(shipped, dtype, kinds, masked):
    check_traffic(shipped, dtype, kinds, masked)


@pytest.mark.skipif(SANITIZE, reason="long")
def test_traffic_of_heads(shipped):
    """x once, 16 bytes at a time; a norm per head is written and read back once."""
    x = activations(2, 33, 12 * 128, dtype=torch.bfloat16)
    with shipped.trace(x=x.view(66, 1536)) as trace:
        shipped.ops.importance_moments(x, None, None, 12, 1)
        loads = trace.loads("x")
        assert (loads.bytes, loads.narrow) == (x.numel() * 2, 0)
        slots = 2 * 2
        assert trace.scratch_loaded() == 66 * 12 * 4 + slots * (12 * 4 + 128)


def test_bad_input(shim):
    good = torch.zeros(2, 3, 8)

    def moments(x=good, mask=None, cu_seqlens=None, num_heads=0, kinds=1):
        return shim.ops.importance_moments(x, mask, cu_seqlens, num_heads, kinds)

    for arguments, message in [
        ({"x": torch.zeros(3, 8)}, r"x must be \[B, S, C\]"),
        ({"x": torch.zeros(2, 8, 3).mT}, "x must have stride 1"),
        ({"x": good.double()}, "x must be float32, bfloat16 or float16"),
        ({"num_heads": 3}, "num_heads must divide 8"),
        ({"kinds": 0}, r"moments must be in 1\.\.7, got 0"),
        ({"kinds": 8}, r"moments must be in 1\.\.7, got 8"),
        ({"mask": torch.ones(2, 2, dtype=torch.bool)}, "mask must be a contiguous bool"),
        ({"mask": torch.ones(2, 3)}, "mask must be a contiguous bool"),
        ({"cu_seqlens": torch.tensor([0, 3])}, r"x must be \[T, C\]"),
        ({"x": good[0], "cu_seqlens": torch.tensor([0, 3]).int()}, "cu_seqlens int64"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            moments(**arguments)
    for x, y, message in [
        (good, None, "x must have 2 dimensions"),
        (good[0].t(), None, "x must have stride 1"),
        (good[0], good[0, :2], "y must match x"),
        (good[0], good[0].half(), "y must match x"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            shim.ops.importance_rows(x, y)


# ---- the rungs themselves: a planted fault must turn them red


def check_values(shim):
    assert_moments(shim, activations(2, 40, 16), kinds_of_sums=(7,))


def check_bounds(shim):
    x = activations(1, 40, 16)[:, :37]
    with shim.trace(x=x[0]):
        shim.ops.importance_moments(x, None, None, 0, 1)


def check_packed(shim):
    test_packed_sequences(shim, 0, False)


def check_row_groups(shim):
    check_rows(shim, torch.float32, 9)


CHECKS = {
    "values": check_values,
    "orders": check_orders,
    "bounds": check_bounds,
    "packed": check_packed,
    "traffic": check_traffic,
    "row groups": check_row_groups,
}


@pytest.mark.skipif(SANITIZE, reason="the faults are planted in the plain build")
@pytest.mark.parametrize("name", some(CUDA))
def test_planted_fault_is_found(shim, shipped, name):
    key, fault, message = CUDA[name]
    check_it = CHECKS[key]
    pieces = () if check_it is check_traffic else SHORT_PIECES
    broken = load("importance", fault, *pieces, WITHOUT_HALF)
    assert_fault_is_found(check_it, shim if pieces else shipped, broken, message)


@pytest.mark.skipif(SANITIZE, reason="this is the child")
def test_under_sanitizers():
    assert_clean_under_sanitizers(__file__, "masked or packed or strides or rows or bad_input or borders")
