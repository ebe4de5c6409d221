"""ImportanceState.add_ by one native call: what the calls of torch add, and only where that can be. And
accumulate_importance_ by one, which is importance_moments and that.
"""

import pytest
import torch

import minitron_kernels as mk
from minitron_kernels import _native
from minitron_kernels.ops.importance.moments import MOMENT_OF, Moments, moments_of, num_moments
from minitron_kernels.ops.importance.state import ImportanceState

pytestmark = pytest.mark.native
SEQ = [("mean",), ("L2",), ("var",), ("var", "mean"), ("L2", "var", "mean")]


def made(seq, sequences, values, groups=None, dtype=torch.float32, more=0, seed=0):
    """Moments of random sums, some of sequences without tokens; `more`: flags beyond those of the state."""
    g = torch.Generator().manual_seed(seed)
    flags = sum(MOMENT_OF[name] for name in seq) | more
    shape = (num_moments(flags), sequences, values)
    counts = torch.randint(0, 4, (sequences,) if groups is None else (sequences, groups), generator=g)
    return Moments(torch.rand(shape, generator=g, dtype=torch.float64).to(dtype), counts, flags)


def by_torch(monkeypatch, state, moments):
    with monkeypatch.context() as patch:
        patch.setattr(_native, "available", lambda: False)
        return state.add_(moments)


def assert_alike(a, b):
    for name in ("sums", "squares"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-14, atol=0)
    assert torch.equal(a.sequences, b.sequences) and torch.equal(a.tokens, b.tokens)


@pytest.fixture
def native_calls(monkeypatch):
    """Counts the native calls."""
    count, op = [], torch.ops.minitron_kernels.importance_add_.default

    class Counted:
        @staticmethod
        def default(*args):
            count.append(args)
            return op(*args)

    monkeypatch.setattr(torch.ops.minitron_kernels, "importance_add_", Counted)
    return count


@pytest.mark.parametrize("seq", SEQ)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("values", "groups"), [(6, None), (6, 1), (6, 3), (1030, 2), (0, 2), (0, None), (1537, 29)]
)
def test_as_torch_adds(monkeypatch, native_calls, seq, dtype, values, groups):
    ours, expected = (ImportanceState(values, seq=seq, groups=groups) for _ in range(2))
    for number, sequences in enumerate((1, 3, 0, 2)):
        moments = made(seq, sequences, values, groups, dtype, more=number % 2 * MOMENT_OF["L2"], seed=number)
        before = moments.values.clone(), moments.counts.clone()
        assert ours.add_(moments) is ours
        by_torch(monkeypatch, expected, moments)
        assert torch.equal(moments.values, before[0]) and torch.equal(moments.counts, before[1])
    assert len(native_calls) == 4
    assert_alike(ours, expected)


def test_a_part_of_a_state(monkeypatch, native_calls):
    """Rows of a wider memory, whose other groups stay."""
    ours, expected = (ImportanceState(12, seq=("L2", "mean"), groups=4) for _ in range(2))
    moments = made(("L2", "mean"), 3, 6, 2)
    ours.part(1, 3).add_(moments)
    by_torch(monkeypatch, expected.part(1, 3), moments)
    assert native_calls
    assert_alike(ours, expected)
    assert (
        ours.tokens.tolist()[::3] == [0, 0]
        and (ours.sums[:, :3] == 0).all()
        and (ours.sums[:, 9:] == 0).all()
    )


def test_what_is_left_to_torch(monkeypatch, native_calls):
    """Strided moments, other counts, one count for all groups: the same result without the native call."""
    for groups, change in (
        (None, lambda m: m._replace(values=m.values.transpose(1, 2).contiguous().transpose(1, 2))),
        (None, lambda m: m._replace(counts=m.counts.repeat_interleave(2)[::2])),
        (None, lambda m: m._replace(counts=m.counts.int())),
        (2, lambda m: m),
    ):
        moments = made(("mean",), 3, 6)
        ours, expected = (ImportanceState(6, groups=groups) for _ in range(2))
        ours.add_(change(moments))
        by_torch(monkeypatch, expected, moments)
        assert_alike(ours, expected)
    assert not native_calls


@pytest.mark.parametrize("native", [True, False])
def test_moments_that_do_not_fit_are_refused(monkeypatch, native):
    """Before anything is added, and not spread over channels or taken for another aggregation."""
    if not native:
        monkeypatch.setattr(_native, "available", lambda: False)
    m = made(("mean", "L2"), 2, 6)
    grouped = m._replace(counts=torch.ones(2, 3, dtype=torch.int64))
    for options, moments, name in (
        ({"seq": ("mean", "var")}, m, "flags"),
        ({}, m._replace(flags=7), "values"),
        ({}, m._replace(values=m.values[0]), "values"),
        ({}, m._replace(values=m.values[:, :, :1]), "values"),
        ({}, m._replace(values=m.values[:, :1]), "counts"),
        ({}, m._replace(counts=m.counts[:1]), "counts"),
        ({}, m._replace(counts=m.counts.float()), "counts"),
        ({}, m._replace(counts=m.counts[0]), "counts"),
        ({}, grouped, "counts"),
        ({"groups": 2}, grouped, "counts"),
    ):
        state = ImportanceState(6, **({"seq": ("L2", "mean")} | options))
        with pytest.raises(ValueError, match=rf"moments\.{name} must"):
            state.add_(moments)
        assert not any(x.any() for x in state._tensors().values())
    assert ImportanceState(6, groups=3).add_(grouped).tokens.tolist() == [2, 2, 2]


def test_the_op_refuses_what_does_not_fit():
    """Before it changes anything."""
    state, moments = ImportanceState(6, seq=("mean", "L2")), made(("mean", "L2"), 2, 6)
    good = [*state._tensors().values(), *moments[:2], [1, 2], moments.flags]
    for place, wrong in (
        (0, state.sums[:, :5]), (1, state.squares.float()), (2, torch.zeros(2, dtype=torch.int64)),
        (3, state.tokens.int()), (4, moments.values[0]), (4, moments.values.half()), (5, moments.counts[:1]),
        (5, moments.counts.int()), (6, [1, 4]), (6, [3, 1]), (6, [1]), (7, 8), (7, 7),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, ValueError)):
            torch.ops.minitron_kernels.importance_add_(*good[:place], wrong, *good[place + 1 :])
    assert not any(x.any() for x in state._tensors().values())
    torch.ops.minitron_kernels.importance_add_(*good)
    assert state.tokens == moments.counts.sum()


@pytest.mark.parametrize("seq", SEQ)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_one_call_as_in_two(monkeypatch, native_calls, seq, dtype):
    """Bit for bit, for every kind of argument, onto a state that holds something; nothing else is called."""
    g, op = torch.Generator().manual_seed(0), mk.ops.importance.op
    x = torch.randn(3, 50, 84, generator=g).to(dtype)
    mask, borders = torch.arange(150).reshape(3, 50) % 7 > 1, torch.tensor([0, 30, 30, 149, 150])
    for arguments in (
        (x, None, None, 0), (x, mask, None, 0), (x, mask, None, 12), (x.view(150, 84), None, borders, 0),
        (x.view(150, 84), mask.view(150), borders, 4), (x[:, :, 1:], None, None, 0),
        (x[:, :0], None, None, 0), (x.transpose(1, 2), None, None, 0), (x[:0], None, None, 0),
        (x[..., :0], mask, None, 0),
    ):  # fmt: skip
        values = arguments[3] or arguments[0].shape[-1]
        once, twice = (mk.ImportanceState(values, seq=seq) for _ in range(2))
        for _ in range(2):
            twice.add_(moments_of(*arguments, twice.kinds, "native"))
        before = len(native_calls)
        options = {"mask": arguments[1], "cu_seqlens": arguments[2], "num_heads": arguments[3] or None}
        with monkeypatch.context() as patch:
            patch.setattr(op, "moments_by", None)
            for _ in range(2):
                assert mk.accumulate_importance_(once, arguments[0], **options) is once
        assert len(native_calls) == before
        for name, value in once._tensors().items():
            assert torch.equal(value, twice._tensors()[name]), (name, arguments[1:])


def test_the_op_of_both_refuses_what_does_not_fit():
    """Before it changes anything."""
    state, x = ImportanceState(6, seq=("mean", "L2")), torch.randn(2, 3, 6)
    good = [*state._tensors().values(), x, None, None, 0, [1, 2], 3]
    for place, wrong in (
        (0, state.sums[:, :5]), (1, state.squares.float()), (2, torch.zeros(2, dtype=torch.int64)),
        (3, state.tokens.int()), (4, x[0]), (4, x.double()), (4, x[..., :5]), (5, torch.ones(2, 2).bool()),
        (6, torch.tensor([0, 6])), (7, 4), (7, 3), (8, [1, 4]), (8, [1]), (9, 8), (9, 1),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, ValueError)):
            torch.ops.minitron_kernels.importance_accumulate_(*good[:place], wrong, *good[place + 1 :])
        assert not any(x.any() for x in state._tensors().values())
    torch.ops.minitron_kernels.importance_accumulate_(*good)
    assert state.tokens == 6 and state.sums.all()
    torch.library.opcheck(torch.ops.minitron_kernels.importance_accumulate_.default, tuple(good))


def test_opcheck_and_inference_mode():
    state, moments = ImportanceState(6, seq=("mean", "var")), made(("mean", "var"), 2, 6)
    arguments = (*state._tensors().values(), *moments[:2], [1, 4], moments.flags)
    torch.library.opcheck(torch.ops.minitron_kernels.importance_add_.default, arguments)
    fresh, x = mk.ImportanceState(6), torch.randn(2, 3, 6)
    with torch.inference_mode():
        mk.accumulate_importance_(fresh, x)
    mk.accumulate_importance_(fresh, x)
    once = mk.accumulate_importance_(mk.ImportanceState(6), x)
    assert fresh.tokens == 12
    torch.testing.assert_close(fresh.scores(), once.scores() * 2**0.5, rtol=1e-14, atol=0)
