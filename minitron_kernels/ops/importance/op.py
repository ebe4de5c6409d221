"""Activation importance: accumulate_importance_(), and the same for layers and experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from minitron_kernels._tensors import check_no_tangent, check_tensor
from minitron_kernels.ops.importance.moments import (
    MOMENT_OF,
    backend_for,
    check_activations,
    combine,
    moments_by,
    operands,
    rows_of,
)
from minitron_kernels.ops.importance.state import ImportanceState, TokenMeanState


def accumulate_importance_(
    state: ImportanceState,
    x: Tensor,
    *,
    num_heads: int | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> ImportanceState:
    """Adds the activations of some sequences to an importance state: one read of `x`, no host sync.

    With v the channels of a token (or, with `num_heads`, the L2 norms of its heads) and n the number of valid
    tokens of sequence b, the sequence aggregations a[b] that the state collects are

        mean  (1/n) Σ_t |v_t|        L2  √(Σ_t v_t²)        var  (1/n) Σ_t (v_t − v̄)²

    and Σ_b a[b], Σ_b a[b]² and the counts are added to the state. x is read in its own dtype; a sequence is
    summed in fp32 and fp64, with a relative error of about 1e-6. On the CPU the bits do not depend on the
    number of threads.

    Args:
        state: for C channels (or `num_heads` heads), on x's device; changed in place.
        x: [B, S, C], one sequence [S, C], or with `cu_seqlens` packed sequences [T, C]; float32, bfloat16,
            float16, or float64 (by the reference). Any strides; a stride other than 1 along C costs a copy.
            A sequence must not be cut in two along S, except over the ranks of `group`.
        num_heads: given where x is the attention output [..., num_heads · head_dim] and heads are scored, by
            the L2 norm over head_dim of each token (the paper's definition). For NVIDIA ModelOpt's definition
            collect channels and call head_scores_from_channels().
        mask: [B, S] ([S], [T]) bool or 0/1 integers, nonzero where a token is valid. Other tokens are not
            read.
        cu_seqlens: [B + 1] int32 or int64, borders of the packed sequences, from 0 to T. Their values are
            checked on the CPU only: on a GPU a check would be a host sync.
        group: context-parallel ranks, which hold pieces of the same sequences. Their sums and counts are
            added before a[b] is computed, so that the result is that of the whole sequences, and the same on
            all ranks. Data-parallel ranks need no group: see ImportanceState.all_reduce_().
        backend: "auto", "native", "triton" or "reference"; a named one never falls back.

    Returns:
        state.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device; the state is unchanged. Also
            where x carries a forward-mode tangent: scores have no derivative. An x that requires grad is
            allowed; no gradient is recorded.
        RuntimeError: the named backend cannot run here, and why.

    Source: Minitron (arXiv 2407.14679) section 2.2.
    """
    if not isinstance(state, ImportanceState):
        raise TypeError(f"state must be an ImportanceState, got {type(state).__name__}")
    check_activations("x", x, (2,) if cu_seqlens is not None else (2, 3))
    _check_plain(x=x)
    batch_shape = x.shape[:-1]
    if cu_seqlens is not None:
        cu_seqlens = _check_cu_seqlens(cu_seqlens, x)
    elif x.dim() == 2:
        x = x[None]
    channels = x.shape[-1]
    if num_heads is not None:
        if isinstance(num_heads, bool) or not isinstance(num_heads, int):
            raise TypeError(f"num_heads must be an int or None, got {type(num_heads).__name__}")
        if num_heads < 1 or channels % num_heads:
            raise ValueError(f"num_heads must divide x's last dimension {channels}, got {num_heads}")
        channels = num_heads
    if state.num_channels != channels:
        what = "heads" if num_heads else "channels"
        raise ValueError(f"state must be for x's {channels} {what}, got one for {state.num_channels}")
    if state.sums.device != x.device:
        raise ValueError(f"state must be on x's device {x.device}, got {state.sums.device}: state.to(device)")
    valid = None if mask is None else _check_mask(mask, batch_shape, x.device)
    chosen, x = backend_for(x, backend), x.detach()
    if chosen == "native" and group is None and _is_on_host(state):
        return _accumulate_native(state, x, valid, cu_seqlens, num_heads or 0)
    with torch.no_grad():
        moments = moments_by(chosen, x, valid, cu_seqlens, num_heads or 0, state.kinds)
        return state.add_(moments if group is None else combine(moments, group))


def _is_on_host(state: ImportanceState) -> bool:
    """Whether one native call can do it all; torch.compile sees calls of torch, which it fuses."""
    return state.sums.device.type == "cpu" and state.groups is None and not torch.compiler.is_compiling()


def _accumulate_native(
    state: ImportanceState, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, num_heads: int
) -> ImportanceState:
    x, mask = operands(x, mask)
    aggregations = [MOMENT_OF[name] for name in state.seq]
    of_state = (state.sums, state.squares, state.sequences, state.tokens)
    torch.ops.minitron_kernels.importance_accumulate_.default(
        *of_state, x, mask, cu_seqlens, num_heads, aggregations, sum(aggregations)
    )
    return state


def head_scores_from_channels(scores: Tensor, num_heads: int) -> Tensor:
    """Scores of heads by ModelOpt's definition: the L2 norm over the scores of a head's channels.

    Args:
        scores: [..., num_heads · head_dim], channel scores of the attention output.
        num_heads: H.

    Returns:
        [..., H], the dtype of `scores`.

    Raises:
        TypeError, ValueError: `scores` is not a float tensor, or num_heads does not divide its last
            dimension.

    Source: NVIDIA ModelOpt, torch.prune (Minitron); the paper takes the norm per token instead.
    """
    check_activations("scores", scores, tuple(range(1, 9)))
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads must be an int, got {type(num_heads).__name__}")
    if num_heads < 1 or scores.shape[-1] % num_heads:
        raise ValueError(f"num_heads must divide scores' last dimension {scores.shape[-1]}, got {num_heads}")
    return torch.linalg.vector_norm(scores.unflatten(-1, (num_heads, -1)), dim=-1)


@torch.no_grad()
def accumulate_block_importance_(
    state: TokenMeanState,
    layer: int,
    block_input: Tensor,
    block_output: Tensor,
    *,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> TokenMeanState:
    """Adds a layer's block importance, 1 − cos(x_in, x_out) of each valid token. No host sync.

    state.scores() is then BI = 1 − E[cos(x_in, x_out)] per layer: how far a layer changes the direction of
    its input. A token whose input or output is zero adds 1.

    Args:
        state: of as many items as the model has layers; changed in place.
        layer: its number, from 0.
        block_input: [..., D], the residual stream before the block; float32, bfloat16, float16, float64.
        block_output: [..., D], after it; same dtype.
        mask: [...] bool or 0/1 integers, nonzero where a token is valid.
        backend: see accumulate_importance_().

    Returns:
        state.

    Raises:
        As accumulate_importance_().

    Source: Minitron (arXiv 2407.14679) section 2.2; ShortGPT (arXiv 2403.03853).
    """
    _check_token_state(state)
    check_activations("block_input", block_input, tuple(range(1, 9)))
    check_activations("block_output", block_output, (block_input.dim(),))
    if block_output.shape != block_input.shape or block_output.dtype != block_input.dtype:
        raise ValueError(
            f"block_output must have block_input's shape and dtype {tuple(block_input.shape)} "
            f"{block_input.dtype}, got {tuple(block_output.shape)} {block_output.dtype}"
        )
    _check_plain(block_input=block_input, block_output=block_output)
    _check_devices(state, block_input=block_input, block_output=block_output)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"layer must be an int, got {type(layer).__name__}")
    if not 0 <= layer < state.num_items:
        raise ValueError(f"layer must be in [0, {state.num_items}), got {layer}")
    shape = block_input.shape[:-1]
    valid = None if mask is None else _check_mask(mask, shape, block_input.device).reshape(-1)
    distance = rows_of(_rows(block_input), _rows(block_output), backend).double()
    if valid is None:
        state.sums[layer] += distance.sum()
        state.counts[layer] += distance.numel()
    else:
        state.sums[layer] += torch.where(valid, distance, 0.0).sum()
        state.counts[layer] += valid.sum()
    return state


@torch.no_grad()
def accumulate_expert_importance_(
    state: TokenMeanState,
    expert_output: Tensor,
    expert_index: Tensor,
    *,
    gate: Tensor | None = None,
    backend: str = "auto",
) -> TokenMeanState:
    """Adds ‖expert output‖₂ of each routed token to its expert; with `gate`, gate · ‖expert output‖₂.

    The latter is the score of REAP (router-weighted expert activation pruning, arXiv 2510.13999).
    state.scores() is then the mean over the tokens routed to each expert, 0 for an expert that saw none.

    Args:
        state: of as many items as there are experts; changed in place.
        expert_output: [T, H], one row per (token, expert) that was routed, before the gate is applied;
            float32, bfloat16, float16, float64.
        expert_index: [T] int64 or int32, the expert that made each row; rows of a negative one are left out.
        gate: [T], the router's weight of each row, for REAP.
        backend: see accumulate_importance_().

    Returns:
        state.

    Raises:
        As accumulate_importance_(). An index beyond the experts is an error on the CPU; on a GPU the result
        is undefined, since a check would be a host sync.

    Source: Minitron (arXiv 2407.14679) section 2.2, applied to experts as NVIDIA ModelOpt does.
    """
    _check_token_state(state)
    check_activations("expert_output", expert_output, (2,))
    tokens = expert_output.shape[0]
    if not isinstance(expert_index, Tensor) or expert_index.dtype not in (torch.int64, torch.int32):
        got = expert_index.dtype if isinstance(expert_index, Tensor) else type(expert_index).__name__
        raise TypeError(f"expert_index must be an int64 or int32 tensor, got {got}")
    check_tensor("expert_index", expert_index)
    if expert_index.shape != (tokens,):
        raise ValueError(f"expert_index must be [T] = [{tokens}], got {tuple(expert_index.shape)}")
    if gate is not None:
        check_activations("gate", gate, (1,))
        if gate.shape != (tokens,):
            raise ValueError(f"gate must be [T] = [{tokens}], got {tuple(gate.shape)}")
        _check_plain(gate=gate)
        _check_devices(state, gate=gate)
    _check_plain(expert_output=expert_output)
    _check_devices(state, expert_output=expert_output, expert_index=expert_index)
    experts = state.num_items
    # under torch.compile, index_add_ raises the error
    on_host = expert_index.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and tokens and int(expert_index.max()) >= experts:
        raise ValueError(f"expert_index must be below {experts}, got {int(expert_index.max())}")
    norms = rows_of(_rows(expert_output), None, backend).double()
    if gate is not None:
        norms = norms * gate
    valid = expert_index >= 0
    index = expert_index.clamp(min=0).long()
    values = torch.where(valid, norms, 0.0)
    if index.device.type == "cpu":
        state.sums.index_add_(0, index, values)
    else:
        state.sums += sums_by_expert(values, index, experts)
    state.counts.index_add_(0, index, valid.long())  # of integers, so that any order gives the same
    return state


def sums_by_expert(values: Tensor, index: Tensor, experts: int, at_once: int = 1 << 22) -> Tensor:
    """[experts]: the sum of the values [T] of each expert, bitwise the same in every call.

    index_add_ on a GPU adds in whichever order its threads come. A NaN stays with its expert.

    Args:
        values: of any float dtype.
        index: [T] int64.
        experts: how many there are.
        at_once: elements of the largest temporary tensor, [experts, T] or some of its rows.
    """
    compiling = torch.compiler.is_compiling()  # one reduction is made of it then, and no temporary tensor
    group = experts if compiling else max(1, at_once // max(1, values.numel()))
    zero, numbers = values.new_zeros(()), torch.arange(experts, device=index.device)
    parts = [torch.where(index == some[:, None], values, zero).sum(1) for some in numbers.split(group)]
    return torch.cat(parts)


def _rows(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _check_token_state(state: Any) -> None:
    if not isinstance(state, TokenMeanState):
        raise TypeError(f"state must be a TokenMeanState, got {type(state).__name__}")


def _check_plain(**tensors: Tensor) -> None:
    """Checks that the tensors are neither sharded nor freed, and that no tangent would be lost."""
    for name, x in tensors.items():
        check_tensor(name, x)
    check_no_tangent("importance", **tensors)


def _check_devices(state: TokenMeanState, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.device != state.sums.device:
            raise ValueError(f"{name} must be on the state's device {state.sums.device}, got {x.device}")


def _check_mask(mask: Any, shape: torch.Size, device: torch.device) -> Tensor:
    """The mask as bool; checks that it has the tokens' shape."""
    if not isinstance(mask, Tensor) or mask.dtype.is_floating_point or mask.dtype.is_complex:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor or one of 0/1 integers, got {got}")
    check_tensor("mask", mask)
    if mask.shape != shape or mask.device != device:
        raise ValueError(
            f"mask must be {tuple(shape)} on {device}, one entry per token; got {tuple(mask.shape)} on "
            f"{mask.device}"
        )
    return mask if mask.dtype == torch.bool else mask != 0


def _check_cu_seqlens(cu_seqlens: Any, x: Tensor) -> Tensor:
    """The borders as int64; on the CPU, checks that they rise from 0 to T."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {got}")
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.device != x.device:
        raise ValueError(
            f"cu_seqlens must be [B + 1] on {x.device}, got {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        )
    borders = cu_seqlens.to(torch.int64).contiguous()
    if borders.device.type == "cpu" and not torch.compiler.is_compiling():
        first, last = int(borders[0]), int(borders[-1])
        if first != 0 or last != x.shape[0] or bool((borders.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of tokens {x.shape[0]}, got "
                f"{borders.tolist() if borders.numel() <= 8 else f'{first} ... {last}'}"
            )
    return borders
