"""States of importance: what they are made from stays as it was, and results share no memory with it."""

import copy
import itertools

import pytest
import torch
from torch import nn

import minitron_kernels as mk
from minitron_kernels.ops.importance.moments import MOMENT_OF, Moments, moments_of
from minitron_kernels.ops.importance.state import ImportanceState, TokenMeanState
from minitron_kernels.pruning import ImportanceScores
from minitron_kernels.pruning.score.batches import Tokens
from minitron_kernels.pruning.score.expert_hooks import ExpertsHook
from minitron_kernels.pruning.score.recorder import Recorder
from minitron_kernels.pruning.score.scores import Axis, Options

SEQ = ("mean", "L2", "var")
GROUPED = dict(seq=SEQ, groups=2)


def channels(seed=0, **options):
    """A state of 6 channels that has seen sequences of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    state = ImportanceState(6, **{"seq": SEQ, **options})
    parts = [state.part(0, 1), state.part(1, 2)] if state.groups else [state]
    for part in parts:
        x = torch.randn(3, 5, part.num_channels, generator=generator)
        mk.accumulate_importance_(part, x, mask=torch.rand(3, 5, generator=generator) < 0.7)
    return state


def means(seed=0):
    state = TokenMeanState(3)
    state.sums += torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    state.counts += torch.arange(3) + seed
    return state


def scores(seed=0):
    axes = {
        "mlp": Axis(channels(seed, groups=2), (0, 1)),
        "layers": Axis(means(seed), (0, 1, 2)),
        "energy": Axis(channels(seed, groups=2, seq="L2"), ("a", "b")),
        "experts": Axis(means(seed), (1,), 3),
    }
    return ImportanceScores({"model_type": "llama"}, axes, options=Options(SEQ))


def tensors_of(thing):
    """All tensors that a state, scores, or a container of them holds."""
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, ImportanceState | TokenMeanState):
        return [getattr(thing, name) for name in thing._names]
    if isinstance(thing, ImportanceScores):
        return [x for axis in thing.axes.values() for x in tensors_of(axis.state)]
    if isinstance(thing, dict):
        return [x for value in thing.values() for x in tensors_of(value)]
    return [x for value in thing for x in tensors_of(value)] if isinstance(thing, list | tuple) else []


def memory(thing):
    return {x.untyped_storage().data_ptr() for x in tensors_of(thing) if x.numel()}


READS = {
    "cat": (ImportanceState, lambda a, b: ImportanceState.cat([a, b])),
    "cat of one": (ImportanceState, lambda a, b: ImportanceState.cat([a])),
    "state_dict": (ImportanceState, lambda a, b: a.state_dict()),
    "scores": (
        ImportanceState,
        lambda a, b: [a.scores(batch=batch, seq=seq) for batch in ("L2", "mean", "var") for seq in SEQ],
    ),
    "cat of means": (TokenMeanState, lambda a, b: TokenMeanState.cat([a, b])),
    "cat of one mean": (TokenMeanState, lambda a, b: TokenMeanState.cat([a])),
    "state_dict of means": (TokenMeanState, lambda a, b: a.state_dict()),
    "scores of means": (TokenMeanState, lambda a, b: a.scores()),
    "clone": (ImportanceScores, lambda a, b: a.clone()),
    "tables": (
        ImportanceScores,
        lambda a, b: [a.tables(batch, seq) for batch in ("L2", "mean", "var") for seq in SEQ],
    ),
    "check_alike": (ImportanceScores, lambda a, b: a.check_alike(b)),
}
WRITES = {
    "merge_": (ImportanceState, lambda a, b: a.merge_(b)),
    "load_state_dict": (ImportanceState, lambda a, b: a.load_state_dict(b.state_dict())),
    "load": (
        ImportanceState,
        lambda a, b: a.load_state_dict(dict(zip(a._names, tensors_of(b), strict=True))),
    ),
    "merge_ of means": (TokenMeanState, lambda a, b: a.merge_(b)),
    "load means": (
        TokenMeanState,
        lambda a, b: a.load_state_dict(dict(zip(a._names, tensors_of(b), strict=True))),
    ),
    "merge_ of scores": (ImportanceScores, lambda a, b: a.merge_(b)),
}
MAKE = {
    ImportanceState: (channels, lambda seed: channels(seed, groups=2)),
    TokenMeanState: (means,),
    ImportanceScores: (scores,),
}


@pytest.mark.parametrize("name", [*READS, *WRITES])
def test_inputs_stay_and_results_share_no_memory(name):
    kind, call = (READS | WRITES)[name]
    for make in MAKE[kind]:
        a, b = make(seed=1), make(seed=2)
        before = [x.clone() for x in tensors_of(a)], [x.clone() for x in tensors_of(b)]
        result = call(a, b)
        if name in READS:
            assert all(map(torch.equal, tensors_of(a), before[0]))
            assert not memory(result) & (memory(a) | memory(b))
        else:
            assert not all(map(torch.equal, tensors_of(a), before[0]))
            assert not memory(a) & memory(b)
        assert all(map(torch.equal, tensors_of(b), before[1]))


@pytest.mark.parametrize("seq", SEQ)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_not_changed_by_what_reads_them(seq, dtype):
    x, mask = torch.randn(3, 5, 6, dtype=dtype), torch.rand(3, 5) < 0.7
    before = x.clone(), mask.clone()
    moments = moments_of(
        x, mask, None, 0, MOMENT_OF["mean"] | MOMENT_OF["L2"] | MOMENT_OF["var"], "reference"
    )
    values, counts = moments.values.clone(), moments.counts.clone()
    moments.aggregate(seq)
    ImportanceState(6, seq=SEQ).add_(moments)
    assert torch.equal(moments.values, values) and torch.equal(moments.counts, counts)
    assert torch.equal(x, before[0]) and torch.equal(mask, before[1])


def test_a_part_is_a_view_and_nothing_but_its_groups():
    state = channels(groups=2)
    whole = copy.deepcopy(state)
    state.part(1, 2).merge_(channels(3, groups=2).part(0, 1))
    assert torch.equal(state.sums[:, :3], whole.sums[:, :3]) and state.tokens[0] == whole.tokens[0]
    assert not torch.equal(state.sums[:, 3:], whole.sums[:, 3:]) and state.tokens[1] > whole.tokens[1]
    for begin, end in ((-1, 1), (1, 0), (0, 3)):
        with pytest.raises(ValueError, match=r"in order in \[0, 2\]"):
            state.part(begin, end)


def test_cat_keeps_channels_groups_and_counts_in_order():
    a, b = channels(1, groups=2), channels(2, groups=2)
    whole = ImportanceState.cat(iter([a, b]))
    assert whole.groups == 4 and whole.num_channels == 12
    assert torch.equal(whole.tokens, torch.cat([a.tokens, b.tokens]))
    assert torch.equal(whole.sequences, torch.cat([a.sequences, b.sequences]))
    assert torch.equal(whole.scores(batch="mean", seq="var")[6:], b.scores(batch="mean", seq="var"))
    c = channels(1)
    both = ImportanceState.cat([c, channels(1)])
    assert both.groups is None and both.tokens == c.tokens and both.sequences == c.sequences
    for states, message in (
        ([], "at least one"),
        ([a, c], "all have groups or all have none"),
        ([c, ImportanceState(6)], "the same seq"),
    ):
        with pytest.raises(ValueError, match=message):
            ImportanceState.cat(states)


def test_cat_of_means_keeps_each_count():
    a, b = means(1), means(4)
    whole = TokenMeanState.cat([a, b])
    assert whole.counts.tolist() == [1, 2, 3, 4, 5, 6] and torch.equal(whole.sums[3:], b.sums)
    assert TokenMeanState.cat([]).num_items == 0


def test_the_variance_of_equal_sequences_is_never_below_zero():
    """Σa²/n − (Σa/n)² of equal numbers rounds to either side of 0."""
    state = ImportanceState(200)
    one = torch.rand(1, 1, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = one.expand(3, 1, 200)
    mk.accumulate_importance_(state, x, backend="reference")
    assert ((state.squares / 3 - (state.sums / 3).square()) < 0).any()
    scores = state.scores(batch="var")
    assert (scores >= 0).all() and scores.max() < 1e-15


def test_scores_of_all_ranks_stay_so(tmp_path):
    """Added to others and read from a file: to reduce them again would count each rank's tokens twice."""
    for mine, other in ((False, True), (True, False), (False, False)):
        a, b = scores(1), scores(2)
        a.reduced, b.reduced = mine, other
        a.merge_(b).save(tmp_path)
        assert a.reduced == ImportanceScores.load(tmp_path).reduced == (mine or other)
        assert b.reduced == other


@pytest.mark.parametrize("seq", ["mean", ("L2", "mean"), ("mean", "var")])
def test_a_state_dict_says_which_aggregations_it_is_of(seq):
    """Sums of others have the same shapes."""
    other = channels(1, seq={"mean": "L2", ("L2", "mean"): ("mean", "L2")}.get(seq, ("mean", "L2")))
    state = channels(2, seq=seq)
    before = [x.clone() for x in tensors_of(state)]
    with pytest.raises(ValueError, match=r"state's seq must be \[.*other aggregations"):
        state.load_state_dict(other.state_dict())
    assert all(map(torch.equal, tensors_of(state), before))
    again = ImportanceState(6, seq=seq)
    again.load_state_dict(state.state_dict())
    assert all(map(torch.equal, tensors_of(again), before))


def test_groups_that_saw_different_tokens_are_divided_by_their_own():
    state = ImportanceState(4, seq=("mean", "L2", "var"), groups=2)
    values = torch.tensor([[[6.0, 6, 6, 6]], [[12.0, 12, 12, 12]], [[1.0, 1, 1, 1]], [[8.0, 8, 8, 8]]])
    state.add_(Moments(values, torch.tensor([[2, 3]]), sum(MOMENT_OF.values())))
    assert state.sums[0].tolist() == [3, 3, 2, 2]
    assert state.sums[1].tolist() == [12**0.5] * 4
    torch.testing.assert_close(state.sums[2], torch.tensor([4, 4, 8 / 3, 8 / 3], dtype=torch.float64))
    assert state.tokens.tolist() == [2, 3] and state.sequences.tolist() == [1, 1]
    state.add_(Moments(values, torch.tensor([[0, 3]]), sum(MOMENT_OF.values())))
    assert state.sequences.tolist() == [1, 2]  # a group without tokens saw no sequence


def recorder_of(layers=3, seq=("mean",), **axes):
    made = {
        name: Axis(ImportanceState(places * width, seq=seq, groups=places), tuple(range(places)))
        for name, (places, width) in axes.items()
    }
    made["layers"] = Axis(TokenMeanState(layers), tuple(range(layers)))
    return Recorder(ImportanceScores({"model_type": "llama"}, made, options=Options(seq)), None, "auto")


@pytest.mark.parametrize("held", [1, 1 << 20])
@pytest.mark.parametrize("packed", [False, True])
def test_layers_in_any_order_with_nan_in_padding(held, packed, monkeypatch):
    """Each order of three layers gives what the layers give alone; what padding holds does not matter."""
    monkeypatch.setattr("minitron_kernels.pruning.score.recorder.HELD_BYTES", held)
    torch.manual_seed(0)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    borders = torch.tensor([0, 3, 5, 7, 10]) if packed else None
    inputs, outputs, neurons = torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 5)
    for x in (inputs, outputs, neurons):
        x[:, ~mask] = float("nan")
    tokens = Tokens((2, 5), mask, borders)
    for order in itertools.permutations(range(3)):
        recorder = recorder_of(mlp=(3, 5))
        for _ in range(2):
            recorder.start(tokens)
            for place in order:
                recorder.channels("mlp", place, neurons[place])
                recorder.blocks(place, inputs[place], outputs[place])
            recorder.flush()
        tables = recorder.scores.tables()
        for place in range(3):
            alone = ImportanceState(5)
            x, counted = (neurons[place].reshape(10, 5), mask.view(-1)) if packed else (neurons[place], mask)
            for _ in range(2):
                mk.accumulate_importance_(alone, x, mask=counted, cu_seqlens=borders)
            torch.testing.assert_close(tables["mlp"][place], alone.scores(), rtol=1e-14, atol=0)
            cosine = torch.cosine_similarity(inputs[place][mask], outputs[place][mask], dim=-1)
            torch.testing.assert_close(
                tables["layers"][place], 1 - cosine.mean().double(), rtol=1e-5, atol=1e-6
            )
        assert recorder.scores.axes["layers"].state.counts.tolist() == [14] * 3
        assert recorder.scores.axes["mlp"].state.sequences.tolist() == [6 if packed else 4] * 3


def test_blocks_whose_dtypes_differ_are_compared_in_float32():
    recorder = recorder_of(layers=1)
    x, y = torch.randn(1, 4, 8), torch.randn(1, 4, 8).bfloat16()
    recorder.start(Tokens((1, 4), None, None))
    recorder.blocks(0, x, y)
    recorder.flush()
    wanted = 1 - torch.cosine_similarity(x, y.float(), dim=-1).mean().double()
    torch.testing.assert_close(recorder.scores.tables()["layers"][0], wanted, rtol=1e-5, atol=1e-6)


def test_each_dtype_gets_a_backend_of_its_own():
    """float64 is served by the reference alone, also after float32 of the same device, and before it."""
    x = torch.randn(3, 1, 4, 8)
    for first, second in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        recorder = recorder_of(layers=3, mlp=(3, 8))
        recorder.start(Tokens((1, 4), None, None))
        for place, dtype in enumerate((first, second, first)):
            recorder.blocks(place, x[place].to(dtype), x[place].roll(1, 1).to(dtype))
            recorder.channels("mlp", place, x[place].to(dtype))
            recorder._flush("mlp")  # sums of one dtype go into the state together
            recorder._flush("layers")
        recorder.flush()
        wanted = 1 - torch.cosine_similarity(x, x.roll(1, 2), dim=-1).mean((1, 2)).double()
        torch.testing.assert_close(recorder.scores.tables()["layers"], wanted, rtol=1e-5, atol=1e-6)
        mlp = torch.stack(list(recorder.scores.tables()["mlp"].values()))
        torch.testing.assert_close(mlp, x.abs().mean(2)[:, 0].double(), rtol=1e-6, atol=0)


class Experts(nn.Module):
    """Three stacked experts of four neurons, of a layer of seven: other ranks hold the others."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4))
        self.act_fn = nn.SiLU()


@pytest.mark.parametrize("score", ["norm", "reap"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_experts_of_other_ranks_do_not_count(score, packed, by_name):
    torch.manual_seed(0)
    module, places = Experts(), (4, 9)
    axes = {
        "experts": Axis(TokenMeanState(6), places, 3),
        "expert_mlp": Axis(ImportanceState(24, seq=SEQ, groups=6), places, 3),
    }
    options = Options(SEQ, expert_score=score)
    recorder = Recorder(ImportanceScores({}, axes, options=options), None, "auto")
    hidden, gates = torch.randn(2, 5, 6), torch.rand(10, 2)
    index = torch.tensor([[0, 3], [-1, 1], [1, 6], [2, 0], [0, -1], [3, 5], [1, 2], [3, 1], [0, 0], [2, 3]])
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    tokens = Tokens((2, 5), mask, torch.tensor([0, 2, 5, 8, 10]) if packed else None)
    hidden[~mask] = float("nan")
    tap = ExpertsHook(recorder, 1)
    tap(module, (hidden.view(10, 6), index, gates), {}, None)  # not started: it does not listen
    recorder.start(tokens)
    recorder._seen = {axis: [0] for axis in axes}  # the other layer's
    if by_name:
        given = {"top_k_index": index, "top_k_weights": gates}
        tap(module, (hidden.view(10, 6),), given, None)
    else:
        tap(module, (hidden.view(10, 6), index, gates), {}, None)
    recorder.flush()
    owners = [0, 0, 1, 1, 1, 2, 2, 2, 3, 3] if packed else [0] * 5 + [1] * 5
    for expert in range(3):
        of_sequence, norms = {}, []
        for t, k in itertools.product(range(10), range(2)):
            if index[t, k] != expert or not mask.view(-1)[t]:
                continue
            gate, up = (module.gate_up_proj[expert] @ hidden.view(10, 6)[t]).detach().double().chunk(2)
            v = nn.functional.silu(gate) * up
            of_sequence.setdefault(owners[t], []).append(v)
            norm = (module.down_proj[expert].detach().double() @ v).norm()
            norms.append(norm * (gates[t, k] if score == "reap" else 1))
        torch.testing.assert_close(
            axes["experts"].state.sums[3 + expert], torch.stack(norms).sum().double(), rtol=1e-5, atol=0
        )
        assert axes["experts"].state.counts.tolist()[3 + expert] == len(norms)
        state = axes["expert_mlp"].state.part(3 + expert, 4 + expert)
        assert state.tokens.tolist() == [len(norms)] and state.sequences.tolist() == [len(of_sequence)]
        wanted = sum(torch.stack(found).abs().mean(0) for found in of_sequence.values())
        torch.testing.assert_close(state.sums[0], wanted, rtol=1e-5, atol=1e-7)
    assert not axes["experts"].state.counts[:3].any() and not axes["expert_mlp"].state.sums[:, :12].any()
