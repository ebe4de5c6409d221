"""Checks that a pruning plan agrees with itself and with its configs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from minitron_kernels.pruning.families.axes import PRUNED
from minitron_kernels.pruning.families.configs import Config, newer_kinds
from minitron_kernels.pruning.families.family import Family
from minitron_kernels.pruning.families.registry import family_of
from minitron_kernels.pruning.plan.layer_plan import LISTS, LayerPlan
from minitron_kernels.pruning.plan.selection import ORDERS, Keep, KeptHeads, check_keep, format_runs


def _sizes(config: Mapping[str, Any], where: str) -> dict[str, int]:
    try:
        return family_of(config).sizes(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def other_layers(family: Family, config: Config, planned: Config) -> str | None:
    """The first entry in which the layers of two configs of a family differ; None where they are alike.

    Sizes may be the same, and so may all shapes: a plan that drops layers would write the kinds of the other
    model's layers to the config. What one of the two does not say is not compared.
    """
    for key in (*family.per_layer_keys, *family.layer_index_keys):
        here, there = (newer_kinds(family.value(each, key)) for each in (config, planned))
        if None not in (here, there) and here != there:
            return f"{key} is {here!r:.80} (plan: {there!r:.80})"
    layers = list(range(family.sizes(planned)["layers"]))
    here, there = (family.layer_entries(each, layers) for each in (config, planned))
    for key in there:
        if here.get(key) != there[key]:
            return f"{key} is {here.get(key)!r:.80} (plan: {there[key]!r:.80})"
    return None


def check_plan(
    *,
    source_config: Mapping[str, Any],
    target_config: Mapping[str, Any],
    hidden: Keep,
    layers: Sequence[LayerPlan],
    order: str,
    norm_factors: Mapping[str, float],
) -> None:
    """Checks that the fields of a PruningPlan agree with each other and with its configs.

    Raises:
        ValueError: they do not; names the field.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    before, after = (
        _sizes(config, name)
        for config, name in ((source_config, "source_config"), (target_config, "target_config"))
    )
    family = family_of(source_config)
    if target_config.get("model_type") != source_config.get("model_type"):
        raise ValueError(
            f"target_config.model_type must be {source_config['model_type']!r}, got "
            f"{target_config.get('model_type')!r}"
        )
    for axis in (axis for axis in before if axis not in (*PRUNED, "layers")):
        if before[axis] != after.get(axis):
            raise ValueError(
                f"target_config must have the {axis} of the source, {before[axis]}, got {after.get(axis)}"
            )

    def check(keep: Keep, axis: str, where: str) -> None:
        try:
            check_keep(keep, after[axis], before[axis], order)
        except ValueError as error:
            raise ValueError(f"{where} {error}") from error

    check(hidden, "hidden", "hidden")
    kept = tuple(entry.layer for entry in layers)
    try:
        check_keep(kept, after["layers"], before["layers"], "original")
    except ValueError as error:
        raise ValueError(f"layers {error}") from error
    for new, entry in enumerate(layers):
        where = f"layers[{new}]"
        sparse = family.is_sparse(source_config, entry.layer)
        if sparse != family.is_sparse(target_config, new):
            raise ValueError(f"target_config and source_config must agree whether {where} has experts")
        axes = family.layer_axes(source_config, entry.layer)
        if axes != family.layer_axes(target_config, new):
            raise ValueError(f"target_config and source_config must agree of which kind {where} is")
        for name in ("heads", "expert_mlp", *LISTS):
            there = sparse if name.startswith("expert") else name in axes
            if (getattr(entry, name) is not None) != there:
                raise ValueError(
                    f"{where}.{name} must {'be there' if there else 'not be there'}: see source_config"
                )
        if entry.heads is not None:
            _check_heads(entry.heads, before, after, order, where)
            joined = any(len(group) > 1 for group in entry.heads.kv)
            if joined and _each_has_a_norm(family, source_config, entry.layer):
                raise ValueError(f"{where}.kv_heads cannot be joined: each has a norm of its own")
        for name in LISTS:
            if (keep := getattr(entry, name)) is not None:
                check(keep, name, f"{where}.{name}")
        if entry.mamba_heads is not None:
            groups, share = range(before["mamba_groups"]), before["mamba_heads"] // before["mamba_groups"]
            _check_groups(entry.mamba_heads, groups, share, f"{where}.mamba_heads")
        if entry.delta_heads is not None and entry.delta_keys is not None:
            share = before["delta_heads"] // before["delta_keys"]
            _check_groups(entry.delta_heads, entry.delta_keys, share, f"{where}.delta_heads")
        if entry.experts is not None and entry.expert_mlp is not None:
            if len(entry.expert_mlp) != len(entry.experts):
                raise ValueError(
                    f"{where}.expert_mlp must have {len(entry.experts)} entries, got {len(entry.expert_mlp)}"
                )
            for expert, keep in enumerate(entry.expert_mlp):
                check(keep, "expert_mlp", f"{where}.expert_mlp[{expert}]")
    norms = {
        f"{family.layers}.{layer}.{norm}" for layer in kept for norm in family.norms_in(source_config, layer)
    } | {family.final_norm}
    for name, factor in norm_factors.items():
        if name not in norms:
            raise ValueError(f"norm_factors has {name!r}, which is not a norm of a kept layer")
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
            raise ValueError(f"norm_factors[{name}] must be a positive number, got {factor!r}")


def _each_has_a_norm(family: Family, config: Mapping[str, Any], layer: int) -> bool:
    """Whether the norms of a layer's KV heads are a tensor each, of which no mean is made."""
    named = (param for param in family.layer if "{kv_head}" in param.name)
    return any(param.when is None or param.when(config, layer) for param in named)


def _check_groups(keep: Keep, groups: Sequence[int], share: int, where: str) -> None:
    """Checks that each of these groups of `share` heads keeps equally many, in the order of the groups.

    Groups are of heads that share B and C, in a state space, or a key head, in a gated delta net.
    """
    new, rest = divmod(len(keep), len(groups))
    if rest:
        raise ValueError(f"{where} must have equally many heads of {len(groups)} groups, got {len(keep)}")
    for at, head in enumerate(keep):
        if head // share != groups[at // new]:
            raise ValueError(
                f"{where} must have {new} heads of group {groups[at // new]} at {at}, got {head}"
            )


def _check_heads(
    heads: KeptHeads, before: Mapping[str, int], after: Mapping[str, int], order: str, where: str
) -> None:
    sources = [head for group in heads.kv for head in group]
    joined = len(heads.kv[0]) if heads.kv else 0
    try:
        if len(heads.kv) != after["kv_heads"]:
            raise ValueError(f"must have {after['kv_heads']} entries, got {len(heads.kv)}")
        if any(len(group) != joined for group in heads.kv):
            raise ValueError("must join as many heads in every entry")
        check_keep(tuple(sources), len(heads.kv) * joined, before["kv_heads"], order)
    except ValueError as error:
        raise ValueError(f"{where}.kv_heads {error}") from error
    try:
        check_keep(heads.query, after["heads"], before["heads"], "importance")
        group, kept = before["heads"] // before["kv_heads"], after["heads"] // after["kv_heads"]
        for new, group_sources in enumerate(heads.kv):
            mine = heads.query[new * kept : (new + 1) * kept]
            for head in mine:
                if head // group not in group_sources:
                    raise ValueError(
                        f"must have {kept} heads of KV group {format_runs(group_sources)} from position "
                        f"{new * kept} on, got {head}"
                    )
            check_keep(mine, kept, before["heads"], order)
        pairs = [head for pair in heads.merged for head in pair]
        groups = {source: new for new, group_sources in enumerate(heads.kv) for source in group_sources}
        for stays, goes in heads.merged:
            if stays not in heads.query or goes in heads.query:
                raise ValueError(f"cannot merge {goes} into {stays}: the first must go, the second stay")
            if groups.get(stays // group) != groups.get(goes // group):
                raise ValueError(f"cannot merge {goes} into {stays}: they have different KV heads")
        if len(set(pairs)) != len(pairs):
            raise ValueError("cannot merge a head twice")
    except ValueError as error:
        raise ValueError(f"{where}.heads {error}") from error
