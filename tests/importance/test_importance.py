"""accumulate_importance_ and its relatives against numpy float64, on every backend that runs here."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minitron_kernels as mk
from importance import oracle
from importance.problems import BOUND, DTYPES, activations, check_close_rows, check_moments, sinks
from minitron_kernels import _native
from minitron_kernels.ops.importance.moments import moments_of, rows_of

BACKENDS = [pytest.param("native", marks=pytest.mark.native), "reference"]
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
def test_same_bits_for_any_thread_count():
    x, threads = activations(2, 300, 5000, dtype=torch.bfloat16), torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            results.append([moments_of(x, None, None, heads, 7, "native").values for heads in (0, 40)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_count_may_hold_anything(backend):
    """NaN and inf in masked tokens of blocks, in rows and gates of experts that were not routed."""
    x, y = activations(2, 9, 40), activations(2, 9, 40, seed=1)
    mask = torch.arange(18).reshape(2, 9) % 3 > 0
    truth = oracle.cosine_distance(x.double().numpy(), y.double().numpy())[mask.numpy()].mean()
    for value in (torch.nan, torch.inf, -torch.inf):
        state = mk.TokenMeanState(1)
        bad = [z.masked_fill(~mask[..., None], value) for z in (x, y)]
        mk.accumulate_block_importance_(state, 0, *bad, mask=mask, backend=backend)
        assert state.scores().item() == pytest.approx(truth, rel=1e-6) and state.counts == mask.sum()
        index = torch.where(mask.view(-1), torch.arange(18) % 2, -1)
        gate = torch.ones(18).masked_fill(~mask.view(-1), value)
        experts = mk.TokenMeanState(2)
        out = bad[0].view(18, 40)
        mk.accumulate_expert_importance_(experts, out, index, gate=gate, backend=backend)
        norms = x.view(18, 40).double().norm(dim=-1)
        wanted = [norms[index == e].mean().item() for e in range(2)]
        assert experts.scores().tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend):
    """No argument is written to, and the state shares memory with none."""
    x, mask = activations(2, 9, 40), torch.arange(18).reshape(2, 9) % 3
    index, gate = torch.arange(18) % 4 - 1, torch.rand(18)
    arguments = (x, mask, index, gate)
    copies = [a.clone() for a in arguments]
    state, blocks, experts = mk.ImportanceState(40), mk.TokenMeanState(1), mk.TokenMeanState(3)
    mk.accumulate_importance_(state, x, mask=mask, backend=backend)
    mk.accumulate_block_importance_(blocks, 0, x, x, mask=mask, backend=backend)
    mk.accumulate_expert_importance_(experts, x.view(18, 40), index, gate=gate, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))
    before = state.scores().clone(), blocks.scores().clone(), experts.scores().clone()
    x.zero_()
    for found, wanted in zip((state, blocks, experts), before, strict=True):
        assert torch.equal(found.scores(), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazy_negatives(backend):
    x = torch.complex(activations(2, 9, 40), activations(2, 9, 40, seed=1)).conj().imag
    assert x.is_neg()
    assert_moments(x, backend=backend, kinds_of_sums=(4,))


FREED = {
    "x": lambda x: mk.accumulate_importance_(mk.ImportanceState(4), x),
    "mask": lambda x: mk.accumulate_importance_(mk.ImportanceState(4), torch.ones(3, 4), mask=x),
    "cu_seqlens": lambda x: mk.accumulate_importance_(mk.ImportanceState(4), torch.ones(3, 4), cu_seqlens=x),
    "block_input": lambda x: mk.accumulate_block_importance_(mk.TokenMeanState(1), 0, x, torch.ones(3, 4)),
    "block_output": lambda x: mk.accumulate_block_importance_(mk.TokenMeanState(1), 0, torch.ones(3, 4), x),
    "expert_output": lambda x: mk.accumulate_expert_importance_(
        mk.TokenMeanState(1), x, torch.zeros(3).int()
    ),
    "expert_index": lambda x: mk.accumulate_expert_importance_(mk.TokenMeanState(1), torch.ones(3, 4), x),
    "gate": lambda x: mk.accumulate_expert_importance_(
        mk.TokenMeanState(1), torch.ones(3, 4), torch.zeros(3).int(), gate=x
    ),
}


@pytest.mark.parametrize("name", FREED)
def test_freed_storages_are_refused(name):
    """As ZeRO-3 and FSDP leave a tensor: a shape without memory."""
    kinds = {"mask": torch.ones(3, dtype=torch.bool), "cu_seqlens": torch.tensor([0, 3])}
    kinds |= {"expert_index": torch.zeros(3, dtype=torch.int64), "gate": torch.ones(3)}
    x = kinds.get(name, torch.ones(3, 4))
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{name} has no memory: its storage was freed"):
        FREED[name](x)


def test_no_derivative_is_lost_in_silence():
    x, index = activations(3, 4), torch.arange(3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        gate = torch.autograd.forward_ad.make_dual(torch.ones(3), torch.ones(3))
        for name, call in {
            "x": lambda: mk.accumulate_importance_(mk.ImportanceState(4), dual),
            "block_input": lambda: mk.accumulate_block_importance_(mk.TokenMeanState(1), 0, dual, x),
            "block_output": lambda: mk.accumulate_block_importance_(mk.TokenMeanState(1), 0, x, dual),
            "expert_output": lambda: mk.accumulate_expert_importance_(mk.TokenMeanState(3), dual, index),
            "gate": lambda: mk.accumulate_expert_importance_(mk.TokenMeanState(3), x, index, gate=gate),
        }.items():
            with pytest.raises(ValueError, match=f"{name} carries a forward-mode tangent"):
                call()
    state = mk.ImportanceState(4)
    mk.accumulate_importance_(state, x.requires_grad_())
    assert not state.sums.requires_grad


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


def test_head_scores_from_channels():
    scores = torch.tensor([[3.0, 4.0, 0.0, 5.0], [1.0, 0.0, 6.0, 8.0]])
    assert mk.head_scores_from_channels(scores, 2).tolist() == [[5.0, 5.0], [1.0, 10.0]]


@pytest.mark.native
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_without_a_break_and_passes_opcheck():
    x, mask = activations(2, 20, 48), torch.arange(40).reshape(2, 20) % 3 > 0
    ops = torch.ops.minitron_kernels
    for args in ((x, mask, None, 0, 7), (x[0], None, torch.tensor([0, 3, 20]), 4, 5)):
        torch.library.opcheck(ops.importance_moments.default, args)
    torch.library.opcheck(ops.importance_rows.default, (x[0], x[1]))
    compiled = torch.compile(mk.accumulate_importance_, fullgraph=True, backend="aot_eager")
    state, eager = (mk.ImportanceState(48, seq=("mean", "L2", "var")) for _ in range(2))
    compiled(state, x, mask=mask)
    mk.accumulate_importance_(eager, x, mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(state.sums, eager.sums, strict=True))


@pytest.mark.native
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_for_any_size():
    """All three functions in one graph, of dynamic shapes, compiled once; a bad expert is found inside."""
    compilations = 0

    def count(graph, inputs):
        nonlocal compilations
        compilations += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def step(states, x, mask, borders, index):
        channels, packed, blocks, experts = states
        mk.accumulate_importance_(channels, x, mask=mask)
        flat = x.view(-1, x.shape[-1])
        mk.accumulate_importance_(packed, flat, cu_seqlens=borders, num_heads=4)
        mk.accumulate_block_importance_(blocks, 1, x, x.roll(1, -1), mask=mask)
        mk.accumulate_expert_importance_(experts, flat, index)
        return [state.scores() for state in states]

    def arguments(B, S):
        states = (mk.ImportanceState(48), mk.ImportanceState(4), mk.TokenMeanState(6), mk.TokenMeanState(7))
        x = activations(B, S, 48, seed=S)
        mask = torch.arange(B * S).reshape(B, S) % 3 > 0
        return states, x, mask, torch.arange(B + 1) * S, torch.arange(B * S) % 7 - 1

    compiled = torch.compile(step, fullgraph=True, backend=count, dynamic=True)
    for B, S in ((2, 20), (3, 7), (5, 33)):
        for a, b in zip(compiled(*arguments(B, S)), step(*arguments(B, S)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    assert compilations == 1
    states, x, mask, borders, index = arguments(2, 20)
    with pytest.raises((IndexError, RuntimeError)):
        compiled(states, x, mask, borders, index + 2)


BAD = {
    "state": (TypeError, lambda a: a | {"state": torch.zeros(6)}),
    "x": (TypeError, lambda a: a | {"x": torch.zeros(2, 3, 6, dtype=torch.int32)}),
    "x must have 2 or 3": (ValueError, lambda a: a | {"x": torch.zeros(6)}),
    "state must be for x's 7": (ValueError, lambda a: a | {"x": torch.zeros(2, 3, 7)}),
    "num_heads must divide": (ValueError, lambda a: a | {"num_heads": 4}),
    "num_heads must be an int": (TypeError, lambda a: a | {"num_heads": 2.0}),
    "mask must be \\(2, 3\\)": (ValueError, lambda a: a | {"mask": torch.ones(2, 4, dtype=torch.bool)}),
    "mask must be a bool": (TypeError, lambda a: a | {"mask": torch.ones(2, 3)}),
    "cu_seqlens must be an int": (TypeError, lambda a: a | {"x": torch.zeros(3, 6), "cu_seqlens": [0, 3]}),
    "cu_seqlens must rise": (
        ValueError,
        lambda a: a | {"x": torch.zeros(3, 6), "cu_seqlens": torch.tensor([0, 4, 3])},
    ),
    "backend": (ValueError, lambda a: a | {"backend": "cuda"}),
}


@pytest.mark.parametrize("borders", [[0, 4, 3], [1, 3], [0, 2], [0, 4], [0, -1, 3]])
def test_borders_rise_from_0_to_the_last_token(borders):
    """Checked before anything is added, and by the native op, which torch.compile calls alone."""
    x, state = torch.ones(3, 6), mk.ImportanceState(6)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the number of tokens 3"):
        mk.accumulate_importance_(state, x, cu_seqlens=torch.tensor(borders))
    assert state.tokens == 0
    if _native.available():
        with pytest.raises(RuntimeError, match="cu_seqlens must rise"):
            torch.ops.minitron_kernels.importance_moments(x, None, torch.tensor(borders), 0, 1)


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named_and_changes_nothing(message):
    kind, spoil = BAD[message]
    state = mk.ImportanceState(6)
    arguments = spoil({"state": state, "x": torch.ones(2, 3, 6)})
    with pytest.raises(kind, match=message):
        mk.accumulate_importance_(**arguments)
    assert state.tokens == 0 and not state.sums.any()


def test_bad_input_of_the_others():
    state, x = mk.TokenMeanState(2), torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"layer must be in \[0, 2\), got 2"):
        mk.accumulate_block_importance_(state, 2, x, x)
    with pytest.raises(ValueError, match="block_output must have block_input's shape"):
        mk.accumulate_block_importance_(state, 0, x, x[:2])
    with pytest.raises(ValueError, match="expert_index must be below 2, got 5"):
        mk.accumulate_expert_importance_(state, x, torch.tensor([0, 5, 1]))
    with pytest.raises(TypeError, match="expert_index must be an int64 or int32 tensor"):
        mk.accumulate_expert_importance_(state, x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"gate must be \[T\] = \[3\]"):
        mk.accumulate_expert_importance_(state, x, torch.zeros(3, dtype=torch.long), gate=torch.ones(2))
    assert not state.counts.any()
