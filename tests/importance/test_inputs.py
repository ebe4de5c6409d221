"""What the importance functions take, what they refuse and say, and what they leave alone."""

import pytest
import torch

import minitron_kernels as mk
from importance import oracle
from importance.problems import BACKENDS, activations
from minitron_kernels import _native


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


def test_no_tokens_with_strides():
    """Any strides of a tensor without elements pass for contiguous: torch copies nothing then."""
    x = torch.empty(0, 5, 12)[..., ::2]
    state, means = mk.ImportanceState(6), mk.TokenMeanState(1)
    mk.accumulate_importance_(state, x)
    mk.accumulate_block_importance_(means, 0, x, x)
    mk.accumulate_expert_importance_(means, x[:, 0], torch.empty(0, dtype=torch.int64))
    assert state.tokens == 0 and means.counts == 0 and not state.sums.any() and not means.sums.any()


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
