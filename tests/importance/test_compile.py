"""The importance functions under torch.compile, and their ops by opcheck."""

import pytest
import torch

import minitron_kernels as mk
from importance.problems import activations


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
