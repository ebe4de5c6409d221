"""Padding and packing: brings the sequences of a batch into one layout that models honour.

transformers accepts several descriptions of packed sequences, and each attention implementation honours some
of them: sdpa and eager ignore cu_seq_lens_q, position_ids that restart have an effect only without an
attention mask, and sequence numbers in a mask are read as ones. A description that is ignored raises no error
there: the sequences attend to each other. So each batch is rearranged into one of two layouts, and the mask
and the borders for the scores are taken from the same layout:

    rows     one sequence in each row, from its first slot on, with padding behind it; attention mask of 0, 1
    packed   several sequences behind each other in a row; positions that restart with each, no attention
             mask. Padding is at the end of a row, as a sequence without valid tokens

All causal models honour right padding. Whether a model honours packing is measured: see check_apart().
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WAYS = (
    "Packed sequences are given by position_ids that begin anew, by the numbers 1, 2, ... of the sequences "
    "in attention_mask [B, S], by seq_idx or by cu_seq_lens_q"
)
_INTEGERS = (torch.int64, torch.int32)
_ATTENTION = (
    "eager",
    "sdpa",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
)
_LAYERS = ("full_attention", "sliding_attention")


class Layout(NamedTuple):
    """The model's arguments, and the tokens that go with them."""

    inputs: dict[str, Any]
    shape: tuple[int, int]  # [B, S]
    mask: Tensor | None  # [B, S] bool, true where a token is valid; None where all are
    cu_seqlens: Tensor | None  # int64 borders in the B·S tokens; None where each row is a sequence


def what(value: Any) -> str:
    """A value as error messages describe it."""
    return (
        f"a tensor {tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
    )


def lay_out(
    inputs: dict[str, Any], mask: Tensor | None, numbers: Tensor | None, name: str, *, one_row: bool = False
) -> Layout:
    """A batch of whole sequences in one of the two layouts above.

    Invalid tokens are moved to the end of their row, so that a sequence that is padded on the left, or has
    holes, is computed as if it were alone. The caller's positions are kept, unless packed sequences could not
    be told apart by them.

    Args:
        inputs: "input_ids" [B, S] or "inputs_embeds" [B, S, H]; "position_ids", "seq_idx", "cu_seq_lens_q"
            and "cu_seq_lens_k" where they are given.
        mask: [B, S] bool, true where a token is valid; None for all.
        numbers: [B, S], the same for all tokens of a packed sequence; None where there are none.
        name: of the batch, for error messages.
        one_row: join packed rows to one, for attention that supports packing in a single row only.

    Raises:
        TypeError, ValueError: the batch contradicts itself, or a tensor has another shape than the tokens.
    """
    key = "input_ids" if "input_ids" in inputs else "inputs_embeds"
    tokens: Tensor = inputs[key]
    owners = _owners(inputs, numbers, tokens, name)
    positions = None
    if "position_ids" in inputs:
        positions = _per_token(inputs["position_ids"], "position_ids", tokens, name)
    steps: Tensor | int = 1  # from each slot to the next
    if mask is not None and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        slots = (~mask).long().argsort(dim=1, stable=True)  # the valid ones first, in their order
        steps = slots.diff(dim=1)
        mask = mask.gather(1, slots)
        owners = {source: owner.gather(1, slots) for source, owner in owners.items()}
        positions = None if positions is None else positions.gather(1, slots)
        tokens = tokens.gather(1, slots if tokens.dim() == 2 else slots[..., None].expand_as(tokens))
    begins = _begins(owners, positions, steps, mask, name)
    if begins is None or not bool(begins[:, 1:].any()):
        return _in_rows(key, tokens, mask, positions)
    return _packed(key, tokens, mask, positions, begins, one_row)


def _in_rows(key: str, tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> Layout:
    inputs: dict[str, Any] = {key: tokens}
    if mask is not None:
        # a row of only padding attends to itself: it would be NaN otherwise
        attended = mask | ~mask.any(1, keepdim=True)
        if not bool(attended.all()):
            inputs["attention_mask"] = attended.long()
        if positions is not None:  # they rise by one from the row's first, also where there was a hole
            positions = torch.where(mask[:, :1], positions[:, :1], 0) + _slots(mask)
    if positions is not None:
        inputs["position_ids"] = positions
    return Layout(inputs, (tokens.shape[0], tokens.shape[1]), mask, None)


def _packed(
    key: str, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, begins: Tensor, one_row: bool
) -> Layout:
    if mask is not None:
        begins = begins | (~mask & F.pad(mask[:, :-1], (1, 0)))
    at = _slots(begins)
    first = torch.where(begins, at, 0).cummax(1).values  # the slot where each token's sequence begins
    fresh = at - first
    if positions is not None and not one_row:
        kept = positions.gather(1, first) + fresh
        kept = kept if mask is None else torch.where(mask, kept, fresh)
        # a sequence whose positions continue those of the one before would be read as a part of it
        apart = bool(((kept.diff(dim=1) != 1) | ~begins[:, 1:]).all())
        fresh = kept if apart else fresh
    borders = F.pad(begins.reshape(-1).nonzero().flatten(), (0, 1), value=begins.numel())
    if one_row:  # attention then finds borders at the smallest position: all sequences must begin at 0
        tokens, fresh = tokens.flatten(0, 1)[None], fresh.reshape(1, -1)
        mask = None if mask is None else mask.reshape(1, -1)
    shape = (tokens.shape[0], tokens.shape[1])
    return Layout({key: tokens, "position_ids": fresh}, shape, mask, borders)


def _slots(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device).expand_as(like)


def _owners(inputs: dict[str, Any], numbers: Tensor | None, tokens: Tensor, name: str) -> dict[str, Tensor]:
    """{entry of the batch that gives it: [B, S] int64, the same for all tokens of a sequence}."""
    owners = {}
    if numbers is not None:
        owners["the numbers in attention_mask"] = numbers.to(tokens.device).long()
    if "seq_idx" in inputs:
        owners["seq_idx"] = _per_token(inputs["seq_idx"], "seq_idx", tokens, name)
    if "cu_seq_lens_q" in inputs or "cu_seq_lens_k" in inputs:
        owners["cu_seq_lens_q"] = _from_borders(inputs, tokens, name)
    return owners


def _from_borders(inputs: dict[str, Any], tokens: Tensor, name: str) -> Tensor:
    borders, total = check_borders(inputs, name).to(tokens.device), tokens.shape[0] * tokens.shape[1]
    if int(borders[0]) != 0 or int(borders[-1]) != total or bool((borders.diff() < 0).any()):
        raise ValueError(
            f"{name}: cu_seq_lens_q must rise from 0 to the number of tokens {total}, got {borders.tolist()}"
        )
    rows = torch.arange(tokens.shape[0], device=borders.device) * tokens.shape[1]
    if not bool(torch.isin(rows, borders).all()):
        raise ValueError(
            f"{name}: cu_seq_lens_q must have a border where each row of {tokens.shape[1]} tokens begins, "
            f"got {borders.tolist()}"
        )
    at = torch.arange(total, device=borders.device)
    return torch.searchsorted(borders[1:].contiguous(), at, right=True).view(tokens.shape[:2])


def check_borders(inputs: dict[str, Any], name: str) -> Tensor:
    """cu_seq_lens_q as int64; only its dtype and shape are checked, not its values."""
    borders, keys = inputs.get("cu_seq_lens_q"), inputs.get("cu_seq_lens_k")
    if not isinstance(borders, Tensor) or borders.dtype not in _INTEGERS:
        raise TypeError(f"{name}: cu_seq_lens_q must be an int32 or int64 tensor, got {what(borders)}")
    if borders.dim() != 1 or borders.numel() < 2:
        raise ValueError(f"{name}: cu_seq_lens_q must be [sequences + 1], got {what(borders)}")
    if keys is not None and not (isinstance(keys, Tensor) and torch.equal(keys.to(borders), borders)):
        raise ValueError(f"{name}: cu_seq_lens_k must equal cu_seq_lens_q {borders.tolist()}, got {keys}")
    return borders.long()


def _per_token(value: Any, key: str, tokens: Tensor, name: str) -> Tensor:
    """[B, S] int64 from [B, S] or [1, S]."""
    rows, length = tokens.shape[:2]
    if not isinstance(value, Tensor) or value.dtype not in _INTEGERS:
        raise TypeError(f"{name}: {key} must be an int32 or int64 tensor, got {what(value)}")
    if tuple(value.shape) not in ((rows, length), (1, length)):
        raise ValueError(f"{name}: {key} must be {[rows, length]}, as the tokens, got {what(value)}")
    return value.to(tokens.device).long().expand(rows, -1)


def _begins(
    owners: dict[str, Tensor], positions: Tensor | None, steps: Tensor | int, mask: Tensor | None, name: str
) -> Tensor | None:
    """[B, S] bool, true where a sequence begins; valid tokens come first. None if each row is a sequence."""
    found = {}
    for source, owner in owners.items():
        found[source] = _borders_between(owner.diff(dim=1) != 0, mask)
        first = owner if mask is None else torch.where(mask, owner, owner[:, :1])
        distinct = (first.sort(dim=1).values.diff(dim=1) != 0).sum(1)
        if bool((distinct != found[source][:, 1:].sum(1)).any()):
            raise ValueError(
                f"{name}: a sequence must be one run of tokens, but by {source} one is in pieces"
            )
    sources = list(found)
    for other in sources[1:]:
        if not torch.equal(found[other], found[sources[0]]):
            raise ValueError(f"{name}: {sources[0]} and {other} must give the same sequences")
    if positions is None:
        return found[sources[0]] if sources else None
    rises = positions.diff(dim=1)
    # where there was a hole, positions may count its tokens or not
    anew = _borders_between((rises != 1) & (rises != steps), mask)
    if not sources:
        return anew
    if bool((anew & ~found[sources[0]]).any()):
        raise ValueError(
            f"{name}: position_ids must rise by one inside a sequence, but restart where {sources[0]} "
            f"{'continue' if 'numbers' in sources[0] else 'continues'} a sequence"
        )
    return found[sources[0]]


def _borders_between(differs: Tensor, mask: Tensor | None) -> Tensor:
    """[B, S - 1], whether a token and the one before differ in sequence -> [B, S], whether one begins."""
    if mask is not None:
        differs = differs & mask[:, 1:]
    return F.pad(differs, (1, 0), value=True)


def reads_one_row(config: Any) -> bool:
    """Whether the model's attention supports packing in batches of a single row only, as FlashAttention."""
    return "flash" in str(getattr(config, "_attn_implementation", ""))


def check_apart(
    call: Callable[..., Any], config: Any, name: str, *, vocab: int, device: Any, routed: bool
) -> None:
    """Checks, by a forward pass over two packed rows, that the model keeps packed sequences apart.

    The second sequences of the rows are the same, the first ones are not. Their hidden states must be the
    same too: in a dense model to the bit, as each row of a matrix product is summed in the same order. One
    layer of thirty that sees across the border changes them by 0.002 or more (relative to their norm), all
    layers together by about 0.5.

    Args:
        call: the model's decoder; its first output is the hidden states.
        config: the model's.
        name: of the packed batch, for error messages.
        vocab: number of token ids.
        device: where the model wants its inputs.
        routed: whether the model has experts: their products then differ in shape, and so in rounding.

    Raises:
        ValueError: the sequences are not kept apart; says what else to do.
    """
    ids = torch.tensor([[1, 2, 3, 7, 8, 9], [4, 5, 6, 7, 8, 9]]) % vocab
    positions = torch.arange(3).repeat(2)[None]
    layout = lay_out(
        {"input_ids": ids, "position_ids": positions}, None, None, name, one_row=reads_one_row(config)
    )
    inputs = {key: value.to(device) for key, value in layout.inputs.items()}
    hidden = call(**inputs, use_cache=False)[0].double().unflatten(1, (-1, 3)).flatten(0, 1)
    first, second = hidden[1], hidden[3]
    off = (first - second).norm() / first.norm().clamp(min=1e-30)
    if bool(off > (0.05 if routed else 1e-3)):
        raise _not_apart(config, name, f"measured: {float(off):.1%} off by the tokens of another sequence")


def check_apart_by_config(config: Any, name: str) -> None:
    """check_apart() from the config alone, for FSDP2, where all ranks would have to join a forward pass."""
    implementation = getattr(config, "_attn_implementation", None)
    others = set(getattr(config, "layer_types", None) or ()) - set(_LAYERS)
    if implementation not in _ATTENTION or others:
        raise _not_apart(config, name, f"layers {', '.join(sorted(others))}" if others else "unknown")


def _not_apart(config: Any, name: str, why: str) -> ValueError:
    return ValueError(
        f"{name} is packed, but the model does not keep packed sequences apart (attention "
        f"{getattr(config, '_attn_implementation', None)!r}; {why}): give each sequence a row of its own, "
        "padded, with attention_mask [B, S]"
    )
