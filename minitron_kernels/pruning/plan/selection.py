"""Chooses the channels, heads and layers that stay, by their scores; reads and writes lists of them.

A list of kept indices is written as runs, "0-63,70,72-80", in the order of the new model.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Keep = tuple[int, ...]
ORDERS = ("original", "importance")


def format_runs(indices: Sequence[int]) -> str:
    """Indices as runs.

    Example:
        >>> format_runs([0, 1, 2, 7, 5, 6])
        '0-2,7,5-6'
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def parse_runs(text: Any) -> Keep:
    """The indices that format_runs() wrote.

    Raises:
        ValueError: it is not a string of runs; says where.
    """
    if not isinstance(text, str):
        raise ValueError(f'must be a string of runs like "0-63,70", got {text!r}')
    kept: list[int] = []
    for run in text.split(",") if text else ():
        first, dash, last = run.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)):
            raise ValueError(f'must be runs like "0-63,70", got {run!r} in it')
        if dash and int(last) < int(first):
            raise ValueError(f"has a run that ends before it starts: {run!r}")
        if dash and int(last) - int(first) > 1 << 24:
            raise ValueError(f"has a run longer than any axis: {run!r}")
        kept.extend(range(int(first), int(last if dash else first) + 1))
    return tuple(kept)


def check_keep(keep: Keep, count: int, size: int, order: str) -> None:
    """Checks that `keep` has `count` different indices below `size`, which rise if `order` is "original".

    Raises:
        ValueError: it has not; says why.
    """
    if len(keep) != count:
        raise ValueError(f"must keep {count} of {size}, got {len(keep)} indices")
    wrong = [index for index in keep if not 0 <= index < size]
    if wrong:
        raise ValueError(f"must hold indices below {size}, got {wrong[0]}")
    if len(set(keep)) != len(keep):
        raise ValueError(f"has {next(index for index, n in Counter(keep).items() if n > 1)} twice")
    if order == "original":
        for first, second in itertools.pairwise(keep):
            if second < first:
                raise ValueError(f'must rise where order is "original", got {second} after {first}')


def checked_scores(table: Any, shape: tuple[int, ...], name: str) -> Tensor:
    """A table of scores as float64 on the CPU.

    Raises:
        TypeError, ValueError: not a tensor, another shape, NaN or infinite; names the table.
    """
    import torch  # slow, and not needed to read plans

    try:
        scores = torch.as_tensor(table, device="cpu").detach().to(torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"scores[{name}] must be a tensor, got {type(table).__name__}") from error
    if tuple(scores.shape) != shape:
        raise ValueError(f"scores[{name}] must have the shape {shape}, got {tuple(scores.shape)}")
    wrong = (~torch.isfinite(scores)).nonzero().tolist()
    if wrong:
        index = ", ".join(map(str, wrong[0]))
        raise ValueError(
            f"scores[{name}] must be finite, got {scores[tuple(wrong[0])].item()} at [{index}], the first of "
            f"{len(wrong)} such: does the model overflow in its dtype?"
        )
    return scores


def top(scores: Tensor, count: int, order: str) -> Keep:
    """The indices of the `count` highest scores; of equal ones the lower index. All stay in their order."""
    if count == scores.numel():
        return tuple(range(count))
    best = scores.sort(descending=True, stable=True).indices[:count].tolist()
    return tuple(best if order == "importance" else sorted(best))


@dataclass(frozen=True)
class KeptHeads:
    """The heads of one layer.

    Args:
        query: kept query heads, KV group after KV group.
        kv: for each new KV head, the old ones whose mean it is.
        merged: (kept, dropped) pairs of query heads: the kept one becomes 2 · kept - dropped.
    """

    query: Keep
    kv: tuple[Keep, ...]
    merged: tuple[tuple[int, int], ...] = ()


def choose_heads(
    scores: Tensor | None,
    before: tuple[int, int],
    after: tuple[int, int],
    *,
    merge_kv: bool,
    merge_query: bool,
    order: str,
) -> KeptHeads:
    """The best query heads of each KV group, equally many of each; of equal ones the lower number.

    Args:
        scores: of the query heads; None where all stay.
        before, after: (query heads, KV heads), which the caller has checked.
        merge_kv: whether neighbouring KV groups become one, with their mean keys and values, which serves the
            best query heads of all of them. Else the groups stay whose kept heads have the highest sums.
        merge_query: whether kept query heads stand for the dropped ones too (Minitron, arXiv 2407.14679,
            section 2.3): with the L heads of a group in order of falling score, K of which stay, head_i <- 2
            head_i - head_{2K-i+1} for i from 2K-L+1 to K, counted from 1.
        order: of the heads in a group, and of kept groups.
    """
    import torch

    group, kept_per_group = before[0] // before[1], after[0] // after[1]
    joined = before[1] // after[1] if merge_kv else 1
    candidates = [
        tuple(range(first, first + group * joined)) for first in range(0, before[0], group * joined)
    ]
    if scores is None:
        scores = torch.zeros(before[0], dtype=torch.float64, device="cpu")
    ranked = [
        [heads[i] for i in torch.sort(scores[list(heads)], descending=True, stable=True).indices.tolist()]
        for heads in candidates
    ]
    value = torch.stack([scores[heads[:kept_per_group]].sum() for heads in ranked])
    query: list[int] = []
    merged: list[tuple[int, int]] = []
    chosen = top(value, after[1], order)
    for index in chosen:
        heads, total, kept = ranked[index], group * joined, kept_per_group
        stay = heads[:kept] if order == "importance" and kept < total else sorted(heads[:kept])
        query.extend(stay)
        if merge_query:
            merged.extend((heads[i], heads[2 * kept - 1 - i]) for i in range(2 * kept - total, kept))
    kv = tuple(tuple(range(index * joined, (index + 1) * joined)) for index in chosen)
    return KeptHeads(tuple(query), kv, tuple(merged))


def best_block(importance: Tensor, count: int) -> int:
    """The start of the block of `count` neighbouring layers with the least summed importance.

    Of equal blocks the first. Sums are exact, so that blocks of equal layers have equal sums.
    """
    sums = [math.fsum(block) for block in importance.unfold(0, count, 1).tolist()]
    return sums.index(min(sums))


def least_loss(losses: Mapping[int, float] | Sequence[float], layers: int, count: int) -> int:
    """The start of the block of `count` layers whose loss when dropped is least; of equals the first.

    Raises:
        ValueError: a start is not the first layer of such a block, or a loss is not finite.
    """
    measured = dict(losses) if isinstance(losses, Mapping) else dict(enumerate(losses))
    last = layers - count
    for start, loss in measured.items():
        if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start <= last:
            raise ValueError(
                f"block_losses must hold the loss for first dropped layers from 0 to {last}, got {start!r}"
            )
        if not math.isfinite(loss):
            raise ValueError(f"block_losses[{start}] must be finite, got {loss}")
    if not measured:
        raise ValueError("block_losses must hold at least one loss, got none")
    return min(measured, key=lambda start: (measured[start], start))
