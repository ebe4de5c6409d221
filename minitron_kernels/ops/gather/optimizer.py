"""gather_optimizer_state_(): cuts an optimizer's state as the parameters were cut, so that it can go on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitron_kernels.ops.gather.index import ChannelIndex
from minitron_kernels.ops.gather.op import check_kept, gather_channels

Index = Tensor | ChannelIndex | None


class ParameterReplacement(NamedTuple):
    """`new` replaces `old`, of which it keeps `rows` and `cols` (see gather_channels).

    new: None for a parameter that is removed, such as those of a dropped layer.
    experts: for stacked weights of experts [experts, rows, cols], instead of rows and cols: (expert, rows,
        cols) for each expert that stays, in their new order, as Cut.experts of minitron_kernels.pruning.
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
    gathered by the same rows and cols. A tensor that has size 1 along one of the two axes (the factors of
    torch's Adafactor), or lacks it (those of transformers' Adafactor), is gathered along the other axis only;
    where it lacks an axis of a square parameter, "row" or "col" in its name says which axis it has. Numbers
    and tensors of one element (`step`) are kept. The new parameter takes the old one's position in its group,
    so that state_dict() keeps its order. The old and the new state of all replacements of a call are in
    memory at the same time; several calls need less.

    Args:
        optimizer: any whose state is per parameter and element by element; changed in place.
        replacements: ParameterReplacement or plain tuples (old, new, rows, cols, experts). The caller makes
            `new`, as torch.nn.Parameter(gather_channels(old, rows, cols)); its dtype and device may differ.

    Raises:
        TypeError: `optimizer` is not an optimizer, or its state is neither a tensor nor a number (LBFGS keeps
            lists).
        ValueError: `old` is not a parameter of the optimizer or comes twice; `new` is one already, or has
            another shape; a state tensor has a shape that does not follow from the parameter's; an index is
            out of range. The optimizer is then unchanged.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    positions = {
        param: (group, i) for group in optimizer.param_groups for i, param in enumerate(group["params"])
    }
    taken = set(positions)
    done: list[tuple[ParameterReplacement, dict[str, Any]]] = []
    seen: set[Tensor] = set()
    for number, given in enumerate(replacements):
        one, name = ParameterReplacement(*given), f"replacements[{number}]"
        if one.old not in positions:
            raise ValueError(f"{name}.old must be a parameter of the optimizer, got another tensor")
        if one.old in seen:
            raise ValueError(f"{name}.old comes a second time")
        seen.add(one.old)
        new = one.new
        if new is None:
            done.append((one, {}))
            continue
        if new in taken:
            raise ValueError(f"{name}.new is a parameter of the optimizer already")
        taken.add(new)
        one, shape = _checked(one, name)
        if new.shape != shape:
            raise ValueError(f"{name}.new must be {tuple(shape)} after the cut, got {tuple(new.shape)}")
        state = optimizer.state.get(one.old, {})
        done.append(
            (one, {key: _gathered(value, one, f"{name}: state {key!r}") for key, value in state.items()})
        )
    for one, state in done:
        had_state = optimizer.state.pop(one.old, None) is not None
        if one.new is not None:
            group, i = positions[one.old]
            group["params"][i] = one.new
            if had_state:
                optimizer.state[one.new] = state
    gone = {one.old for one, _ in done if one.new is None}
    for group in optimizer.param_groups if gone else ():
        stays = [param not in gone for param in group["params"]]
        for key in ("params", "param_names"):  # the names that were given with named_parameters()
            if key in group:
                group[key] = [item for item, kept in zip(group[key], stays, strict=True) if kept]


def _checked(one: ParameterReplacement, name: str) -> tuple[ParameterReplacement, torch.Size]:
    """The replacement with its indices checked, once for all of the state; and the shape after the cut."""
    if one.experts is not None:
        count = one.old.shape[0] if one.old.dim() == 3 else 0
        if not count or one.rows is not None or one.cols is not None:
            raise ValueError(
                f"{name}: experts needs an old of [experts, rows, cols], and rows and cols left out, since "
                f"experts gives those of each; got {tuple(one.old.shape)}"
            )
        chosen = [expert for expert, _, _ in one.experts]
        if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= expert < count for expert in chosen):
            raise ValueError(f"{name}: experts must name some of {count}, each once, got {chosen}")
    try:
        if one.experts is not None:
            return one, _cut(one.old.detach().to("meta"), one, rows=True, cols=True).shape
        if one.rows is None and one.cols is None:
            return one, one.old.shape
        shape, rows, cols = check_kept(one.old.detach().to("meta"), one.rows, one.cols)
        return one._replace(rows=rows, cols=cols), torch.Size(shape)
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
        if rows and cols:  # a square parameter: the name decides
            rows, cols = "row" in name, "col" in name
        if rows != cols:
            # add the axis that it lacks, with one element, and cut it like a factor that has both
            return _cut(value.unsqueeze(-1 if rows else -2), one, rows=rows, cols=cols).squeeze(
                -1 if rows else -2
            )
    raise ValueError(f"{name} has shape {tuple(shape)}, which a parameter of {tuple(old)} does not explain")


def _fits(shape: torch.Size, old: torch.Size) -> bool:
    """Whether `shape` is a parameter's shape `old`, except that the last two axes may have size 1."""
    along = zip(shape[-2:], old[-2:], strict=True)
    return shape[:-2] == old[:-2] and all(have in (size, 1) for have, size in along)


def _cut(value: Tensor, one: ParameterReplacement, *, rows: bool, cols: bool) -> Tensor:
    """`value` after the cut, along those of its last two axes that are the parameter's."""

    def gathered(part: Tensor, row_index: Index, col_index: Index) -> Tensor:
        row_index, col_index = row_index if rows else None, col_index if cols else None
        if row_index is None and col_index is None:
            return part
        return gather_channels(part, row_index, col_index)

    if one.experts is None:
        return gathered(value, one.rows, one.cols)
    return torch.stack([gathered(value[expert], *index) for expert, *index in one.experts])
