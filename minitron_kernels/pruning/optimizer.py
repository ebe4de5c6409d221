"""An optimizer goes on with smaller parameters: its state is gathered as the parameters were."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitron_kernels.ops.gather.index import ChannelIndex
from minitron_kernels.ops.gather.op import gather_channels


class ParameterReplacement(NamedTuple):
    """`new` takes the place of `old`, of which it keeps `rows` and `cols` (see gather_channels).

    new None: the parameter goes without a successor, as those of a layer that is dropped.
    """

    old: Tensor
    new: Tensor | None
    rows: Tensor | ChannelIndex | None = None
    cols: Tensor | ChannelIndex | None = None


@torch.no_grad()
def gather_optimizer_state_(
    optimizer: torch.optim.Optimizer, replacements: Iterable[ParameterReplacement]
) -> None:
    """Replaces parameters of an optimizer by pruned ones, so that a training loop can prune and go on.

    In the state of each parameter, a tensor of the parameter's shape (Adam's moments, an fp32 master copy) is
    gathered by the same rows and cols, and one that is of size 1 along an axis (Adafactor's factors) by those
    of the other; numbers and tensors of one element (`step`) are kept. The new parameter has the old one's
    place in its group, so that state_dict() keeps its order. Old and new state of all the replacements of one
    call are held at the same time; several calls need less.

    Args:
        optimizer: any whose state is kept for each parameter and element by element; changed in place.
        replacements: ParameterReplacement or plain tuples (old, new, rows, cols). `new` is made by the
            caller, as torch.nn.Parameter(gather_channels(old, rows, cols)); its dtype and device may differ.

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
    try:
        return gather_channels(one.old.detach().to("meta"), one.rows, one.cols).shape
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def _gathered(value: Any, one: ParameterReplacement, name: str) -> Any:
    """One entry of a parameter's state after the cut."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor or a number, got {type(value).__name__}")
    old = one.old.shape
    if value.dim() == len(old) and all(
        have in (size, 1) for have, size in zip(value.shape, old, strict=True)
    ):
        along_rows = len(old) > 1 and value.shape[-2] == old[-2]
        along_cols = len(old) > 0 and value.shape[-1] == old[-1]
        rows, cols = one.rows if along_rows else None, one.cols if along_cols else None
        return gather_channels(value, rows, cols) if rows is not None or cols is not None else value
    if value.numel() == 1:
        return value
    raise ValueError(
        f"{name} has shape {tuple(value.shape)}, which a parameter of {tuple(old)} does not explain"
    )
