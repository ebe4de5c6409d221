"""The tables of scores, as a plan reads them: each is checked when it is needed."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minitron_kernels.pruning.families.configs import Config
from minitron_kernels.pruning.families.family import Family
from minitron_kernels.pruning.plan.selection import (
    Keep,
    best_block,
    checked_scores,
    choose_heads,
    format_runs,
    least_loss,
    top,
)
from minitron_kernels.pruning.plan.sizes import Sizes


class Tables:
    """The tables of scores; each is checked when it is needed."""

    def __init__(self, tables: Mapping[str, Any], sizes: Sizes) -> None:
        self.tables, self.sizes = tables, sizes

    def get(self, axis: str, key: int | str | None, shape: tuple[int, ...], need: str) -> Tensor:
        """The table of an axis, or its entry for a layer or norm."""
        if axis not in self.tables:
            there = ", ".join(map(str, self.tables)) or "none"
            raise ValueError(f"scores must have the table {axis!r} {need}, got {there}")
        table, name = self.tables[axis], axis
        if key is not None:
            if not isinstance(table, Mapping) or key not in table:
                raise ValueError(f"scores[{axis}] must have an entry for {key!r} {need}")
            table, name = table[key], f"{axis}][{key}"
        return checked_scores(table, shape, name)

    def keep(self, axis: str, layer: int | None, count: int, order: str) -> Keep:
        """The best channels of an axis. Needs no scores where all stay."""
        size = self.sizes[axis]
        if count == size:
            return tuple(range(size))
        return top(self.get(axis, layer, (size,), f"to prune {axis}"), count, order)

    def mamba(self, layer: int, heads: int, channels: int, order: str) -> tuple[Keep, Keep]:
        """(heads, channels of each head) of a state space that stay.

            channel d   √Σ_h s[h, d]², of all heads: the same channels go from each
            head h      √Σ_d s[h, d]², of the channels that stay; ranked inside its group

        The heads of a group share B and C, so that equally many stay of each group, in the group's place.

        Source: Minitron-SSM (arXiv 2504.11409), group-aware pruning of Mamba-2.
        """
        sizes = self.sizes
        of, dim, groups = sizes["mamba_heads"], sizes["mamba_dim"], sizes["mamba_groups"]
        if (heads, channels) == (of, dim):
            return tuple(range(of)), tuple(range(dim))
        scores = self.get("mamba", layer, (of * dim,), "to prune a state space").view(of, dim)
        kept = tuple(range(dim)) if channels == dim else top(scores.square().sum(0).sqrt(), channels, order)
        if heads == of:
            return tuple(range(of)), kept
        best = scores[:, list(kept)].square().sum(1).sqrt().view(groups, -1)
        size = of // groups
        chosen = [
            group * size + head
            for group in range(groups)
            for head in top(best[group], heads // groups, order)
        ]
        return tuple(chosen), kept

    def delta(self, layer: int, values: int, keys: int, order: str) -> tuple[Keep, Keep]:
        """(value heads, key heads) of a gated delta net that stay.

        The best value heads of each key head, equally many of each, and the key heads whose kept value heads
        have the highest sums, as query heads and KV heads of attention are chosen.
        """
        before = self.sizes["delta_heads"], self.sizes["delta_keys"]
        if (values, keys) == before:
            return tuple(range(values)), tuple(range(keys))
        scores = self.get("delta", layer, before[:1], "to prune a gated delta net")
        kept = choose_heads(scores, before, (values, keys), merge_kv=False, merge_query=False, order=order)
        return kept.query, tuple(key for (key,) in kept.kv)

    def expert_neurons(self, layer: int, experts: Keep, count: int, order: str) -> tuple[Keep, ...]:
        """The best neurons of each kept expert."""
        size = self.sizes["expert_mlp"]
        if count == size:
            return (tuple(range(size)),) * len(experts)
        shape = (self.sizes["experts"], size)
        table = self.get("expert_mlp", layer, shape, "to prune expert_mlp")
        return tuple(top(table[expert], count, order) for expert in experts)


def kept_layers(
    table: Tables,
    before: int,
    after: int,
    depth_is_given: bool,
    drop: Sequence[int] | None,
    losses: Mapping[int, float] | Sequence[float] | None,
) -> list[int]:
    """The layers that stay: those not named, or all but the block with the least loss or importance."""
    if drop is not None:
        gone = sorted(map(operator.index, drop))  # accepts NumPy's integers
        if (
            any(not 0 <= layer < before for layer in gone)
            or len(set(gone)) < len(gone)
            or len(gone) >= before
        ):
            raise ValueError(
                f"drop_layers must name some of the layers 0 to {before - 1}, each once and not all, got "
                f"{format_runs(gone)}"
            )
        if depth_is_given and after != before - len(gone):
            raise ValueError(
                f"num_hidden_layers {after} is not what drop_layers leaves of {before}: {before - len(gone)}"
            )
        if losses is not None:
            raise ValueError("drop_layers says which layers go: block_losses must be None")
        return [layer for layer in range(before) if layer not in set(gone)]
    count = before - after
    if not count:
        return list(range(before))
    if losses is not None:
        start = least_loss(losses, before, count)
    else:
        start = best_block(table.get("layers", None, (before,), "to prune layers"), count)
    return [layer for layer in range(before) if not start <= layer < start + count]


def norm_factors(
    family: Family, config: Config, table: Tables, hidden: Keep, layers: list[int]
) -> dict[str, float]:
    """√(share of energy kept · old size / new size) of each norm over hidden channels; {} if all stay."""
    size = table.sizes["hidden"]
    if len(hidden) == size:
        return {}
    norms = [f"{family.layers}.{layer}.{norm}" for layer in layers for norm in family.norms_in(config, layer)]
    factors, kept = {}, torch.tensor(hidden, device="cpu")
    for norm in [*norms, family.final_norm]:
        energy = table.get("energy", norm, (size,), "to rescale norms (or rescale_norms=False)")
        if bool((energy < 0).any()):
            raise ValueError(f"scores[energy][{norm}] must not be negative")
        share = float(energy[kept].sum() / energy.sum())
        if not share > 0:  # the norm's input was 0, or its kept channels were: leave the gain as it is
            share = len(hidden) / size
        factors[norm] = math.sqrt(share * size / len(hidden))
    return factors
