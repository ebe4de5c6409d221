"""An optimizer goes on with smaller parameters: its state is gathered as the parameters were."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitron_kernels.ops.gather.index import ChannelIndex
from minitron_kernels.ops.gather.op import gather_channels

Index = Tensor | ChannelIndex | None


class ParameterReplacement(NamedTuple):
    """`new` takes the place of `old`, of which it keeps `rows` and `cols` (see gather_channels).

    new None: the parameter goes without a successor, as those of a layer that is dropped.
    experts: of a stack of experts' weights [experts, rows, cols], (expert, rows, cols) for each that stays,
        in their new order, instead of rows and cols; as Cut.experts of minitron_kernels.pruning.
    """

    old: Tensor
    new: Tensor | None
    rows: Index = None
    cols: Index = None
    experts: Sequence[tuple[int, Index, Index]] | None = None


@torch.no_grad()
def gather_optimizer_state_(
    optimizer: torch.optim.Optimizer, replacements: Iterable[ParameterReplacement]
) -> None:
    """Replaces parameters of an optimizer by pruned ones, so that a training loop can prune and go on.

    In the state of each parameter, a tensor of the parameter's shape (Adam's moments, an fp32 master copy) is
    gathered by the same rows and cols. One that is of size 1 along an axis (the factors of torch's
    Adafactor), or lacks the axis (those of transformers' Adafactor), is gathered by those of the other; where
    both axes are of one size, "row" or "col" in its name tells which it has. Numbers and tensors of one
    element (`step`) are kept. The new parameter has the old one's place in its group, so that state_dict()
    keeps its order. Old and new state of all the replacements of one call are held at the same time; several
    calls need less.

    Args:
        optimizer: any whose state is kept for each parameter and element by element; changed in place.
        replacements: ParameterReplacement or plain tuples (old, new, rows, cols, experts). `new` is made by
            the caller, as torch.nn.Parameter(gather_channels(old, rows, cols)); its dtype and device may
            differ.

    Raises:
        TypeError: no optimizer, or state that is neither a tensor nor a number (LBFGS keeps lists).
        ValueError: `old` is not the optimizer's or comes twice, `new` is there already or has another shape,
            a state tensor has a shape that the parameter's does not explain, an index is out of range. The
            optimizer is then unchanged.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    places = {
        param: (group, i) for group in optimizer.param_groups for i, param in enumerate(group["params"])
    }
    taken = set(places)
    done: list[tuple[ParameterReplacement, dict[str, Any]]] = []
    for number, given in enumerate(replacements):
        one, name = ParameterReplacement(*given), f"replacements[{number}]"
        if one.old not in places:
            raise ValueError(f"{name}.old must be a parameter of the optimizer, got another tensor")
        if any(one.old is other.old for other, _ in done):
            raise ValueError(f"{name}.old comes a second time")
        if one.new is None:
            done.append((one, {}))
            continue
        if one.new in taken:
            raise ValueError(f"{name}.new is a parameter of the optimizer already")
        taken.add(one.new)
        shape = _gathered_shape(one, name)
        if one.new.shape != shape:
            raise ValueError(f"{name}.new must be {tuple(shape)} after the cut, got {tuple(one.new.shape)}")
        state = optimizer.state.get(one.old, {})
        done.append(
            (one, {key: _gathered(value, one, f"{name}: state {key!r}") for key, value in state.items()})
        )
    for one, state in done:
        had_state = optimizer.state.pop(one.old, None) is not None
        if one.new is not None:
            group, place = places[one.old]
            group["params"][place] = one.new
            if had_state:
                optimizer.state[one.new] = state
    gone = {one.old for one, _ in done if one.new is None}
    for group in optimizer.param_groups if gone else ():
        stays = [param not in gone for param in group["params"]]
        for key in ("params", "param_names"):  # the names that were given with named_parameters()
            if key in group:
                group[key] = [item for item, kept in zip(group[key], stays, strict=True) if kept]


def _gathered_shape(one: ParameterReplacement, name: str) -> torch.Size:
    """Of `old` after the cut, found and checked without touching its values."""
    if one.experts is not None:
        count = one.old.shape[0] if one.old.dim() == 3 else 0
        if not count or one.rows is not None or one.cols is not None:
            raise ValueError(
                f"{name}: experts are of a stack [experts, rows, cols], and tell the rows and cols of each; "
                f"got {tuple(one.old.shape)}"
            )
        chosen = [expert for expert, _, _ in one.experts]
        if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= expert < count for expert in chosen):
            raise ValueError(f"{name}: experts must name some of {count}, each once, got {chosen}")
    try:
        return _cut(one.old.detach().to("meta"), one, rows=True, cols=True).shape
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def _gathered(value: Any, one: ParameterReplacement, name: str) -> Any:
    """One entry of a parameter's state after the cut."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor or a number, got {type(value).__name__}")
    old, shape = one.old.shape, value.shape
    if len(shape) == len(old) and _fits(shape, old):
        rows = len(old) > 1 and shape[-2] == old[-2]
        cols = len(old) > 0 and shape[-1] == old[-1]
        return _cut(value, one, rows=rows, cols=cols)
    if value.numel() == 1:
        return value
    if len(old) > 1:
        rows, cols = shape == old[:-1], shape == (*old[:-2], old[-1])
        if rows and cols:  # a square: its name tells
            rows, cols = "row" in name, "col" in name
        if rows != cols:
            # as the factor with an axis of one element where it lacks one
            return _cut(value.unsqueeze(-1 if rows else -2), one, rows=rows, cols=cols).squeeze(
                -1 if rows else -2
            )
    raise ValueError(f"{name} has shape {tuple(shape)}, which a parameter of {tuple(old)} does not explain")


def _fits(shape: torch.Size, old: torch.Size) -> bool:
    """Whether a tensor has a parameter's shape, but for one element along some of the last two axes."""
    along = zip(shape[-2:], old[-2:], strict=True)
    return shape[:-2] == old[:-2] and all(have in (size, 1) for have, size in along)


def _cut(value: Tensor, one: ParameterReplacement, *, rows: bool, cols: bool) -> Tensor:
    """`value` after the cut, of those of its last two axes that are the parameter's."""

    def gathered(part: Tensor, row_index: Index, col_index: Index) -> Tensor:
        row_index, col_index = row_index if rows else None, col_index if cols else None
        if row_index is None and col_index is None:
            return part
        return gather_channels(part, row_index, col_index)

    if one.experts is None:
        return gathered(value, one.rows, one.cols)
    return torch.stack([gathered(value[expert], *index) for expert, *index in one.experts])
