"""Tests of importance's GPU kernels, written for device="cuda". Not collected by name:
importance/test_triton.py runs them on the CPU under ttsem (values, bounds, races, uninitialised reads),
importance/test_gpu.py on a GPU.

Pieces are shortened, so that few tokens make several pieces with ragged ends.
"""

import math

import numpy as np
import pytest
import torch

import minitron_kernels as mk
from importance import oracle
from importance.problems import DTYPES, activations, check_close_rows, check_moments, numpy_of, sinks
from minitron_kernels.ops.importance import kernel_triton
from minitron_kernels.ops.importance.moments import moments_of, rows_of

DEVICE = "cuda"


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(kernel_triton, "LEAST_TOKENS", 8)
    monkeypatch.setattr(kernel_triton, "PROGRAMS", 8)
    monkeypatch.setattr(kernel_triton, "PIECE_BYTES", 256)


def assert_moments(x, *, mask=None, kinds_of_sums=(3, 4, 7), **options):
    mask = None if mask is None else mask.to(DEVICE)
    x = x if x.device.type == DEVICE else x.to(DEVICE)
    check_moments(
        lambda *arguments: moments_of(*arguments, "triton")[:2],
        x,
        mask=mask,
        kinds_of_sums=kinds_of_sums,
        **options,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 37, 131), (1, 130, 64), (2, 8, 272), (2, 1, 1)])
def test_moments(dtype, shape):
    kinds = range(1, 8) if shape[0] == 3 and dtype == torch.bfloat16 else (7,)
    assert_moments(activations(*shape, dtype=dtype), kinds_of_sums=kinds)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_heads,head_dim", [(4, 64), (3, 80), (7, 5), (1, 256), (9, 1)])
def test_heads(dtype, num_heads, head_dim):
    kinds = (1, 7) if head_dim == 80 else (7,)
    x = activations(2, 21, num_heads * head_dim, dtype=dtype)
    assert_moments(x, num_heads=num_heads, kinds_of_sums=kinds)


def test_rows_longer_than_a_block(monkeypatch):
    monkeypatch.setattr(kernel_triton, "ROW_BLOCK", 64)
    monkeypatch.setattr(kernel_triton, "ROW_ELEMENTS", 256)
    assert_moments(activations(1, 9, 3 * 200), num_heads=3, kinds_of_sums=(7,))
    check_rows(torch.float32, 200)


@pytest.mark.parametrize("num_heads", [0, 7])
def test_masked_tokens_are_not_read(num_heads):
    x = activations(5, 41, 70, dtype=torch.bfloat16)
    mask = torch.ones(5, 41, dtype=torch.bool)
    mask[0, 30:] = mask[1, :11] = False  # right and left padding
    mask[2, ::2] = mask[3] = False  # holes; nothing left
    x[~mask] = math.nan
    assert_moments(x, mask=mask, num_heads=num_heads)


@pytest.mark.parametrize("num_heads", [0, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_packed_sequences(num_heads, masked):
    """Sequences of no token, of one, and of several pieces; borders inside pieces and at their ends."""
    x, borders = activations(100, 90), [0, 0, 17, 17, 63, 64, 64, 96, 100, 100]
    mask = torch.arange(100) % 3 != 1 if masked else None
    if masked:
        x[~mask] = math.nan
    assert_moments(x, cu_seqlens=borders, num_heads=num_heads, mask=mask)


# falling borders make pieces write the same slots, which ttsem reports: these are for one piece
WRONG_BORDERS = [
    (60, [5, 9, 60]),
    (60, [0, 9, 30]),
    (8, [0, 7, 2, 8]),
    (60, [0, 90, 300]),
    (60, [-7, 20, 60]),
    (8, [0, 5, -20, 8]),
]


@pytest.mark.parametrize(("tokens", "borders"), WRONG_BORDERS)
def test_wrong_borders_lead_nowhere_else(tokens, borders):
    """On a GPU nobody checks them: the sums mean nothing then, but all accesses stay inside."""
    wrong = torch.tensor(borders, device=DEVICE)
    moments, counts, _ = moments_of(activations(tokens, 16).to(DEVICE), None, wrong, 0, 7, "triton")
    assert (moments.shape, counts.shape) == ((4, len(borders) - 1, 16), (len(borders) - 1,))


def test_many_packed_sequences():
    """More than are looked up at a time, most of them empty."""
    borders = sorted([0] * 90 + [5] * 150 + [40] * 100 + [77])
    assert_moments(activations(77, 16), cu_seqlens=borders, kinds_of_sums=(7,))


def test_strides_and_misaligned():
    base = activations(4, 50, 333, dtype=torch.bfloat16).to(DEVICE)
    for x in (
        base[:, ::3, 1:300],
        base[::2, 45:, 7:8],
        base[:, :9].transpose(0, 1),
        base[:1, :10].mT,
        base[:0],
        base[:, :0],
        base[..., :0],
    ):
        assert_moments(x, kinds_of_sums=(7,))
    assert_moments(base[::2, 45:, 3:303], num_heads=3, kinds_of_sums=(7,))


@pytest.mark.parametrize("case", [0, 1])
def test_variance_where_the_mean_is_far(case):
    """And the first token is an outlier."""
    x = sinks(1000)[case]
    truth = oracle.moments(x.double().numpy())[0][3]
    m2 = numpy_of(moments_of(x.to(DEVICE), None, None, 0, 4, "triton").values[1])
    assert np.abs(m2 / truth - 1).max() < 1e-4


def test_long_pieces(monkeypatch):
    """The longest pieces that are shipped, several to a sequence."""
    monkeypatch.setattr(kernel_triton, "PROGRAMS", 1)
    assert kernel_triton.pieces_of(1, 1500, False, 1) == (512, 3, 3, 3)
    assert_moments(activations(1, 1500, 24) + 1.0, kinds_of_sums=(7,))


def test_pieces_fill_the_gpu_and_keep_chains_short(monkeypatch):
    monkeypatch.undo()
    assert kernel_triton.pieces_of(4, 2048, False, 14) == (128, 16, 64, 64)
    assert kernel_triton.pieces_of(1, 2048, False, 4) == (32, 64, 64, 64)
    assert kernel_triton.pieces_of(1, 200_000, False, 8) == (512, 391, 391, 391)
    assert kernel_triton.pieces_of(7, 8192, True, 14) == (128, 1, 64, 71)
    assert kernel_triton.pieces_of(0, 0, True, 1) == (32, 1, 0, 0)


def check_rows(dtype, width):
    x, turn = (activations(37, width, dtype=dtype, seed=seed) for seed in (0, 1))
    x[3], turn[5] = 0, 0
    for y in (x + turn, turn, 3 * x, None):
        wide = torch.full((37, width + 3), math.nan, dtype=dtype, device=DEVICE)
        wide[:, 1:-2] = x.to(DEVICE)
        for a in (x.to(DEVICE), wide[:, 1:-2]):
            rows = numpy_of(rows_of(a, None if y is None else y.to(DEVICE), "triton"))
            if y is None:
                truth = np.linalg.norm(x.double().numpy(), axis=-1)
                np.testing.assert_allclose(rows, truth, rtol=1e-6)
            else:
                truth = oracle.cosine_distance(x.double().numpy(), y.double().numpy())
                np.testing.assert_allclose(rows, truth, atol=1e-6)
                assert (rows >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 77, 128, 1100])
def test_rows(dtype, width):
    check_rows(dtype, width)


@pytest.mark.parametrize("dtype", DTYPES)
def test_close_rows_keep_their_digits(dtype):
    check_close_rows(lambda x, y: rows_of(x.to(DEVICE), y.to(DEVICE), "triton"), dtype)


def test_heads_of_no_width():
    values, counts, _ = moments_of(torch.zeros(2, 3, 0, device=DEVICE), None, None, 4, 7, "triton")
    assert values.shape == (4, 2, 4) and not values.any() and counts.tolist() == [3, 3]


def test_rows_keep_nan_and_take_none():
    x = activations(3, 20).to(DEVICE)
    y = x.clone()
    y[1, 4] = math.nan
    assert rows_of(x, y, "triton").isnan().tolist() == [False, True, False]
    assert rows_of(y, None, "triton").isnan().tolist() == [False, True, False]
    assert rows_of(x[:0], y[:0], "triton").shape == (0,)


def test_as_the_user_calls_it():
    x = activations(3, 20, 48, dtype=torch.bfloat16)
    mask = torch.arange(60).reshape(3, 20) % 3 > 0
    state = mk.ImportanceState(48, seq=("mean", "L2", "var"), device=DEVICE)
    mk.accumulate_importance_(state, x.to(DEVICE), mask=mask.to(DEVICE), backend="triton")
    for batch in ("L2", "mean", "var"):
        for seq in ("mean", "L2", "var"):
            truth = oracle.scores(x.double().numpy(), mask=mask.numpy(), batch=batch, seq=seq)
            score = numpy_of(state.scores(batch=batch, seq=seq))
            assert np.allclose(score, truth, rtol=1e-5, atol=1e-6)
    blocks = mk.TokenMeanState(2, device=DEVICE)
    y = x + activations(3, 20, 48, dtype=torch.bfloat16, seed=1)
    arguments = (x.to(DEVICE), y.to(DEVICE))
    mk.accumulate_block_importance_(blocks, 1, *arguments, mask=mask.to(DEVICE), backend="triton")
    truth = oracle.cosine_distance(x.double().numpy(), y.double().numpy())[mask.numpy()].mean()
    assert blocks.scores().tolist() == pytest.approx([0.0, truth], abs=1e-6)


def test_no_float64():
    with pytest.raises(TypeError, match="float64"):
        kernel_triton.importance_moments(torch.zeros(1, 4, 4).double(), None, None, 0, 1)
    with pytest.raises(TypeError, match="float64"):
        kernel_triton.importance_rows(torch.zeros(1, 4).double(), None)


def test_repeats_bit_for_bit():
    x = activations(2, 60, 200, dtype=torch.bfloat16).to(DEVICE)
    for heads in (0, 10):
        first, second = (moments_of(x, None, None, heads, 7, "triton").values for _ in range(2))
        assert torch.equal(first, second)
