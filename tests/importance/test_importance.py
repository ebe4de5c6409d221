"""accumulate_importance_ against numpy float64, on every backend that runs here."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minitron_kernels as mk
from importance import oracle
from importance.problems import BACKENDS, BOUND, DTYPES, activations, check_moments, sinks
from minitron_kernels.ops.importance.moments import moments_of

AGGREGATIONS = [(batch, seq) for batch in ("L2", "mean", "var") for seq in ("mean", "L2", "var")]
HAND = [[[1.0, -2.0], [3.0, 4.0]], [[0.0, 2.0], [-4.0, -6.0]]]
HAND_SCORES = {  # (batch, seq), minitron.md section 4
    ("L2", "mean"): [2.828427, 5.0],
    ("mean", "mean"): [2.0, 3.5],
    ("L2", "L2"): [5.09902, 7.745967],
    ("mean", "L2"): [3.581139, 5.398346],
    ("L2", "var"): [4.123106, 18.357559],
    ("mean", "var"): [2.5, 12.5],
    ("var", "var"): [2.25, 12.25],
    ("var", "mean"): [0.0, 0.25],
    ("var", "L2"): [0.175445, 0.857864],
}


def assert_moments(x, *, backend="native", **options):
    check_moments(lambda *arguments: moments_of(*arguments, backend)[:2], x, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch,seq", AGGREGATIONS)
def test_hand_oracle(backend, batch, seq):
    state = mk.ImportanceState(2, seq=(seq,))
    mk.accumulate_importance_(state, torch.tensor(HAND), backend=backend)
    assert state.scores(batch=batch, seq=seq).tolist() == pytest.approx(HAND_SCORES[batch, seq], abs=1e-6)
    assert (state.sequences.item(), state.tokens.item()) == (2, 4)


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 37, 131), (1, 600, 64), (5, 8, 2100), (2, 1, 1), (1, 1100, 257)])
def test_moments(simd_level, dtype, shape):
    assert_moments(activations(*shape, dtype=dtype))


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_heads,head_dim", [(4, 64), (3, 80), (32, 128), (7, 5), (1, 256), (9, 1)])
def test_heads(simd_level, dtype, num_heads, head_dim):
    assert_moments(activations(2, 45, num_heads * head_dim, dtype=dtype), num_heads=num_heads)


@pytest.mark.native
def test_around_every_block(simd_level):
    """Groups of 8 tokens and chains of 512; vectors and the cache lines that are taken at a time."""
    for tokens in (1, 7, 8, 9, 16, 511, 512, 513, 519, 1024, 1025):
        assert_moments(activations(2, tokens, 97, dtype=torch.bfloat16), kinds_of_sums=(7,))
        assert_moments(activations(1, tokens, 3 * 9), num_heads=3, kinds_of_sums=(7,))
    for channels in (3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129):
        assert_moments(activations(1, 19, channels), kinds_of_sums=(2, 7))
        assert_moments(activations(1, 11, 2 * channels), num_heads=2, kinds_of_sums=(1,))


@pytest.mark.native
def test_around_every_span(simd_level):
    """Channels of 64 tokens are read as eight stretches side by side: whole spans, what is left behind them
    or by a mask, packed and strided ones.
    """
    for tokens in (56, 63, 64, 65, 71, 72, 127, 128, 200, 577):
        for dtype in DTYPES[:2]:
            assert_moments(activations(2, tokens, 97, dtype=dtype), kinds_of_sums=(1, 7))
    x = activations(3, 300, 70, dtype=torch.bfloat16)
    mask = torch.rand(3, 300, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[1, :170] = mask[2, 64:] = False
    x[~mask] = float("nan")
    assert_moments(x, mask=mask, kinds_of_sums=(1, 7))
    borders = [0, 64, 127, 127, 192, 257, 300]
    assert_moments(x[0], mask=mask[0], cu_seqlens=borders, kinds_of_sums=(1, 7))
    assert_moments(activations(2, 400, 90)[:, ::2, 3:80], kinds_of_sums=(1, 7))


@pytest.mark.native
@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_of_wide_rows(threads):
    """Rows of more channels, and of more heads, than a block has; a real layer's activations."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for channels in (16384, 16385, 2 * 16384 + 129):
            assert_moments(activations(1, 9, channels), kinds_of_sums=(7,))
        for heads in (2048, 2049, 4099):
            assert_moments(activations(1, 9, 3 * heads, dtype=torch.bfloat16), num_heads=heads)
        assert_moments(activations(2, 520, 14336, dtype=torch.bfloat16), kinds_of_sums=(7,))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_of_no_width_and_other_nothing(backend):
    for shape in ((2, 3, 0), (0, 3, 4), (2, 0, 4), (0, 0, 0)):
        for heads in (None, 2):
            state = mk.ImportanceState(heads or shape[-1], seq=("mean", "L2", "var"))
            mk.accumulate_importance_(state, torch.zeros(shape), num_heads=heads, backend=backend)
            assert state.tokens == shape[0] * shape[1] and not state.sums.any()
    blocks, none = mk.TokenMeanState(1), torch.zeros(3, 0)
    mk.accumulate_block_importance_(blocks, 0, none, none, backend=backend)
    assert (blocks.scores().item(), blocks.counts.item()) == (1.0, 3)  # as of rows of zeros


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_tokens_are_not_read(backend):
    x = activations(5, 40, 70, dtype=torch.bfloat16)
    mask = torch.ones(5, 40, dtype=torch.bool)
    mask[0, 30:] = mask[1, :11] = False  # right and left padding
    mask[2, ::2] = mask[3] = False  # holes; nothing left
    x[~mask] = float("nan")
    for num_heads in (0, 7):
        assert_moments(x, mask=mask, num_heads=num_heads, backend=backend)
    state, as_ints = (mk.ImportanceState(70, seq=("mean", "L2", "var")) for _ in range(2))
    mk.accumulate_importance_(state, x, mask=mask, backend=backend)
    mk.accumulate_importance_(as_ints, x, mask=3 * mask.int(), backend=backend)
    assert (state.sequences.item(), state.tokens.item()) == (4, int(mask.sum()))
    for batch, seq in AGGREGATIONS:
        truth = oracle.scores(x.double().numpy(), mask=mask.numpy(), batch=batch, seq=seq)
        score = state.scores(batch=batch, seq=seq)
        assert np.allclose(score.numpy(), truth, rtol=1e-5, atol=1e-6)
        assert torch.equal(score, as_ints.scores(batch=batch, seq=seq))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences(backend):
    x, borders = activations(100, 90), [0, 17, 17, 63, 64, 100]
    mask = torch.arange(100) % 3 != 1
    assert_moments(x, cu_seqlens=borders, backend=backend)
    assert_moments(x, cu_seqlens=borders, mask=mask, num_heads=6, backend=backend)
    state = mk.ImportanceState(90)
    mk.accumulate_importance_(state, x, cu_seqlens=torch.tensor(borders, dtype=torch.int32), backend=backend)
    assert state.sequences == 4  # the empty one is none
    assert np.allclose(state.scores(), oracle.scores(x.numpy(), cu_seqlens=borders), rtol=1e-6)


@pytest.mark.native
def test_strides_and_misaligned():
    base = activations(4, 50, 333, dtype=torch.bfloat16)
    for x in (
        base[:, ::3, 1:300],
        base[::2, 5:, 7:8],
        base.transpose(0, 1),
        base.mT,
        base[:0],
        base[:, :0],
        base[..., :0],
    ):
        assert_moments(x)
    one = activations(60, 99)
    state, other = mk.ImportanceState(99), mk.ImportanceState(99)
    mk.accumulate_importance_(state, one)
    mk.accumulate_importance_(other, one[None])
    assert torch.equal(state.scores(), other.scores())


@pytest.mark.native
def test_long_sequences_and_far_means():
    """200,000 tokens keep their digits; the variance too where the mean, or the first token, is far off."""
    x = activations(1, 200_000, 17) + 1.0
    assert_moments(x, bound=4 * BOUND)
    for case in sinks():
        truth = oracle.moments(case.double().numpy())[0][3]
        result = moments_of(case, None, None, 0, 4, "native").values[1].double().numpy()
        assert np.abs(result / truth - 1).max() < 1e-4


@pytest.mark.native
def test_float64_is_served_by_the_reference():
    x = activations(2, 30, 20).double()
    assert_moments(x, backend="auto", bound=1e-13)
    with pytest.raises(ValueError, match="float64 is served by backend"):
        mk.accumulate_importance_(mk.ImportanceState(20), x, backend="native")


@settings(max_examples=60)
@given(
    B=st.integers(0, 4),
    S=st.integers(0, 40),
    heads=st.integers(0, 6),
    width=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    masked=st.booleans(),
    seed=st.integers(0, 9),
)
@pytest.mark.native
def test_any_shape(B, S, heads, width, dtype, masked, seed):
    x = activations(B, S, width * max(1, heads), dtype=dtype, seed=seed)
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else None
    assert_moments(x, mask=mask, num_heads=heads)


@pytest.mark.native
@pytest.mark.parametrize("kinds", [1, 7])  # 1: vectors in pairs
def test_same_bits_for_any_thread_count(kinds):
    x, threads = activations(2, 300, 5000, dtype=torch.bfloat16), torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            results.append([moments_of(x, None, None, heads, kinds, "native").values for heads in (0, 40)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazy_negatives(backend):
    x = torch.complex(activations(2, 9, 40), activations(2, 9, 40, seed=1)).conj().imag
    assert x.is_neg()
    assert_moments(x, backend=backend, kinds_of_sums=(4,))


def test_head_scores_from_channels():
    scores = torch.tensor([[3.0, 4.0, 0.0, 5.0], [1.0, 0.0, 6.0, 8.0]])
    assert mk.head_scores_from_channels(scores, 2).tolist() == [[5.0, 5.0], [1.0, 10.0]]
