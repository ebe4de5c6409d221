"""accumulate_block_importance_ and accumulate_expert_importance_, and the rows of both, against float64."""

import numpy as np
import pytest
import torch

import minitron_kernels as mk
from importance import oracle
from importance.problems import BACKENDS, DTYPES, activations, check_close_rows
from minitron_kernels.ops.importance.moments import rows_of
from minitron_kernels.ops.importance.op import sums_by_expert


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_importance(simd_level, dtype):
    x, turn = activations(3, 11, 77, dtype=dtype), activations(3, 11, 77, dtype=dtype, seed=1)
    x[0, 0] = 0
    mask = torch.arange(33).reshape(3, 11) % 4 != 1
    state = mk.TokenMeanState(3)
    mk.accumulate_block_importance_(state, 0, x, x + turn)
    beside = torch.nn.functional.pad(turn, (3, 5))[..., 3:-5]  # rows lie farther apart than x's
    mk.accumulate_block_importance_(state, 2, x, beside, mask=mask)
    mk.accumulate_block_importance_(state, 2, x[:0], turn[:0])
    pairs = [(x, x + turn, np.ones((3, 11), bool)), (x, turn, mask.numpy())]
    distances = [
        oracle.cosine_distance(a.double().numpy(), b.double().numpy())[keep].mean() for a, b, keep in pairs
    ]
    assert state.scores().tolist() == pytest.approx([distances[0], 0.0, distances[1]], abs=1e-6)
    assert state.counts.tolist() == [33, 0, int(mask.sum())]


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES)
def test_close_rows_keep_their_digits(simd_level, dtype):
    for width in (33, 1000):
        check_close_rows(lambda x, y: rows_of(x, y, "native"), dtype, width)


def test_close_rows_of_the_reference():
    check_close_rows(lambda x, y: rows_of(x, y, "reference"), torch.float32)


@pytest.mark.native
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_of_many_tasks(threads):
    """More rows than a task takes, 65,536 elements; rows longer than that."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows, width in ((35, 4096), (3, 65536), (3, 65537), (300, 1000)):
            x, y = (activations(rows, width, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
            truth = oracle.cosine_distance(x.double().numpy(), y.double().numpy())
            np.testing.assert_allclose(rows_of(x, y, "native"), truth, rtol=1e-5)
            norms = np.linalg.norm(x.double().numpy(), axis=-1)
            np.testing.assert_allclose(rows_of(x, None, "native"), norms, rtol=4e-6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.native
def test_a_layer_that_does_nothing_scores_zero_and_nan_stays():
    x = activations(4, 9, 64)
    state = mk.TokenMeanState(2)
    mk.accumulate_block_importance_(state, 0, x, 3.0 * x)
    assert 0 <= state.scores()[0] < 1e-6
    broken = x.clone()
    broken[0, 0, 0] = float("nan")
    mk.accumulate_block_importance_(state, 1, broken, x)
    assert state.scores()[1].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [False, True])
def test_experts(backend, gated):
    out = activations(50, 33, dtype=torch.bfloat16)
    index = torch.arange(50) % 7 - 1  # expert 6 of 7 sees none; -1 does not count
    gate = torch.rand(50, generator=torch.Generator().manual_seed(3)) - 0.3 if gated else None
    state = mk.TokenMeanState(7)
    for rows in (slice(0, 20), slice(20, 20), slice(20, 50)):
        part = None if gate is None else gate[rows]
        mk.accumulate_expert_importance_(state, out[rows], index[rows], gate=part, backend=backend)
    norms = np.sqrt((out.double().numpy() ** 2).sum(-1)) * (1 if gate is None else gate.double().numpy())
    truth = [norms[index.numpy() == e].mean() for e in range(6)]
    assert state.scores().tolist() == pytest.approx([*truth, 0.0], rel=1e-5)


@pytest.mark.parametrize("at_once", [1, 700, 1 << 22])
def test_sums_in_a_fixed_order(at_once):
    """As on a GPU, some experts at a time: no bit depends on how many, and a NaN stays where it is."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(333, generator=generator, dtype=torch.float64)
    index = torch.randint(0, 7, (333,), generator=generator)
    sums = sums_by_expert(values, index, 8, at_once)
    truth = torch.zeros(8, dtype=torch.float64).index_add_(0, index, values)
    torch.testing.assert_close(sums, truth, rtol=1e-13, atol=1e-13)
    assert sums[7] == 0 and torch.equal(sums, sums_by_expert(values, index, 8))
    broken = values.clone()
    broken[(index == 2).nonzero()[3]] = float("nan")
    assert sums_by_expert(broken, index, 8, at_once).isnan().tolist() == [i == 2 for i in range(8)]
    assert sums_by_expert(values[:0], index[:0], 3, at_once).tolist() == [0.0, 0.0, 0.0]
