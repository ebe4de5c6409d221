"""The sizes of the smaller model: their names, and what is given by name or ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minitron_kernels.pruning.families.configs import Config, as_dict, config_value
from minitron_kernels.pruning.families.family import MTP_KEYS, Family
from minitron_kernels.pruning.families.registry import family_of
from minitron_kernels.pruning.plan.counts import EXPERTS_PER_TOKEN, UsageCount
from minitron_kernels.pruning.plan.states import STATE_AXES

DIVISOR = 64  # of given sizes: rows are then multiples of 128 bytes in bf16, and of tensor cores' tiles
_WRITTEN = ("hidden", "heads", "kv_heads", "head_dim", "mlp", "expert_mlp", "experts")
WIDTH = ("hidden", "mlp", "expert_mlp")  # axes of channels, whose sizes must be multiples of the divisor

Sizes = dict[str, int]


def size_names(family: Family, config: Config) -> dict[str, str]:
    """The names of the sizes that can be pruned, and their axes: {"hidden_size": "hidden", ...}."""
    there = (UsageCount(family, config).axes() | {"layers"}) - {"vocab", "head_dim"}
    there -= set(family.fixed(config))
    axes = ("hidden", "mlp", "expert_mlp", "experts", "heads", "kv_heads", *STATE_AXES, "layers")
    return {key: axis for axis in axes if axis in there for key in family.keys_of(axis)}


def first_names(names: Mapping[str, str]) -> dict[str, str]:
    """One name of each axis, the config's own where it has several: of those that size_names() gives."""
    first = {axis: name for name, axis in reversed(list(names.items()))}
    return {name: axis for name, axis in names.items() if first[axis] == name}


def axis_of(name: str, names: Mapping[str, str], family: Family, config: Config) -> str:
    """The axis of a size, by its name in the config; ValueError where it cannot be pruned, or is unknown."""
    if name in names:
        return names[name]
    model_type = config_value(config, "model_type")
    why = [why for axis, why in family.fixed(config).items() if name in family.keys_of(axis)]
    if why:
        raise ValueError(f"{name} cannot be pruned in this {model_type}: {why[0]}")
    raise ValueError(f"{name} is not a size that can be pruned in {model_type}: it can be {', '.join(names)}")


def check_layers(family: Family, config: Config, layers: Sequence[int]) -> None:
    """Checks that no layer goes that must stay.

    Raises:
        ValueError: one would; says why it must stay.
    """
    why = family.fixed(config).get("layers")
    if why and len(layers) < family.sizes(config)["layers"]:
        raise ValueError(f"drop_layers: no layer can go from this {config['model_type']}: {why}")
    first, why = family.keeps_first(config)
    if list(layers[:first]) != list(range(first)):
        raise ValueError(
            f"the first {first} layers of this {config['model_type']} must stay: {why}. Name layers behind "
            "them in drop_layers"
        )


def divisor_of(divisor: int | Mapping[str, int] | None, name: str, axis: str, default: int) -> int:
    """The number that the size `name` must be a multiple of.

    Raises:
        TypeError, ValueError: `divisor` is not a positive int.
    """
    if axis not in WIDTH:
        return 1
    value = divisor.get(name, default) if isinstance(divisor, Mapping) else divisor
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"divisor must be an int or a mapping of size names to ints, got {value!r}")
    if value < 1:
        raise ValueError(f"divisor must be at least 1, got {value}")
    return value


def check_experts_per_token(value: Any, experts: int | None) -> None:
    """Checks how many experts are to serve a token, of a model with `experts`; None: it has no such number.

    Raises:
        ValueError: it is not a whole number from 1 to `experts`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= (experts or 0):
        limit = "no" if experts is None else experts
        raise ValueError(f"{EXPERTS_PER_TOKEN} must be from 1 to {limit} experts, got {value!r}")


def given_sizes(
    family: Family,
    config: Config,
    given: Mapping[str, int],
    ratio: float | Mapping[str, float] | None,
    divisor: int | Mapping[str, int] | None,
) -> Sizes:
    """The sizes of axes that are given, directly or by ratio.

    A given size must be a multiple of its divisor, or the model's own size: it is never rounded silently. A
    ratio is rounded to the nearest multiple, and to at least one.

    Raises:
        TypeError, ValueError: an unknown name (names the known ones), a size out of range or not a multiple
            of its divisor (names the nearest ones), an axis given twice.
    """
    before = family.sizes(config)
    names = size_names(family, config)
    sizes: Sizes = {}
    for name, size in given.items():
        axis = axis_of(name, names, family, config)
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int, got {size!r}")
        if not 1 <= size <= before[axis]:
            raise ValueError(f"{name} must be from 1 to {before[axis]}, got {size}")
        step = divisor_of(divisor, name, axis, DIVISOR)
        if size % step and size != before[axis]:
            near = [n for n in (size // step * step, -(-size // step) * step) if 0 < n <= before[axis]]
            raise ValueError(
                f"{name} must be a multiple of {step}, got {size}: take {' or '.join(map(str, near))}, or "
                f"another divisor"
            )
        if axis in sizes:
            raise ValueError(f"{name} gives the size of {axis} a second time")
        sizes[axis] = size
    if ratio is None:
        return sizes
    if not isinstance(ratio, Mapping):
        widths = {name: axis for name, axis in first_names(names).items() if axis in WIDTH}
        ratio = {name: ratio for name, axis in widths.items() if axis not in sizes}
    for name, part in ratio.items():
        axis = axis_of(name, names, family, config)
        if isinstance(part, bool) or not isinstance(part, (int, float)):
            raise TypeError(f"ratio[{name}] must be a number, got {part!r}")
        if not 0 < part <= 1:
            raise ValueError(f"ratio of {name} must be above 0 and at most 1, got {part}")
        if axis in sizes:
            raise ValueError(f"ratio gives the size of {axis} a second time, by {name}")
        step = divisor_of(divisor, name, axis, DIVISOR)
        rounded = max(1, round(part * before[axis] / step)) * step
        sizes[axis] = before[axis] if part == 1 else min(before[axis], rounded)
    return sizes


def named_sizes(names: Mapping[str, str], sizes: Mapping[str, int]) -> Sizes:
    """Sizes of axes by their first names in the config; `names` as size_names() gives them."""
    first = {axis: name for name, axis in first_names(names).items()}
    return {first[axis]: size for axis, size in sizes.items()}


def write_sizes(family: Family, config: Config, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The config with these sizes, under the keys that it has; other values are shared, not copied."""
    target = dict(config) if isinstance(config, Mapping) else config.to_dict()
    text = target
    if family.text_key in target:
        text = target[family.text_key] = dict(target[family.text_key])
    for path, axis in family.config_follows.items():
        *parents, key = path.split(".")
        inside = target
        for parent in parents:
            inside[parent] = dict(inside[parent])
            inside = inside[parent]
        inside[key] = sizes[axis]
    for axis in (*_WRITTEN, *STATE_AXES, "layers"):
        if axis in sizes and (keys := family.keys_of(axis)):
            for key in [key for key in keys if key in text] or keys[:1]:
                text[key] = sizes[axis]
    source = family.text(config)
    text.update({key: value(sizes, source) for key, value in family.derived.items()})
    return target


def head_dim_changes(family: Family, sizes: Mapping[str, int]) -> str | None:
    """Why heads would get another size, where the config has none: it is hidden_size / heads then."""
    hidden, heads, dim = (sizes[axis] for axis in ("hidden", "heads", "head_dim"))
    if family.keys_of("head_dim") or heads * dim == hidden:
        return None
    names = [family.keys_of(axis)[0] for axis in ("hidden", "heads")]
    return (
        f"{names[0]} must be {dim} for each of {names[1]}, the size of a head, which the config does not "
        f"hold by itself, got {hidden} for {heads}: cut both alike"
    )


def target_config_of(config: Config, sizes: Mapping[str, int], layers: Sequence[int]) -> dict[str, Any]:
    """The config of the smaller model: with its sizes and head_dim, and the entries of its layers only."""
    family = family_of(config)
    before = family.sizes(config)["layers"]
    target = as_dict(write_sizes(family, config, sizes))
    text = target.get(family.text_key or "", target)
    text.update({key: 0 for key in MTP_KEYS if text.get(key)})  # these layers are not part of the model
    if list(layers) == list(range(before)):
        return target
    for key in family.per_layer_keys:
        # written out, since a pattern that follows from layer indices changes when layers are dropped
        entries = family.value(config, key)
        if entries is not None:
            text[key] = [entries[layer] for layer in layers]
    for key in family.layer_index_keys:
        marked = family.value(config, key)
        if marked is not None:
            text[key] = [new for new, old in enumerate(layers) if old in marked]
    text.update(family.layer_entries(config, list(layers)))
    if family.dense_layers is not None:
        dense = [new for new, old in enumerate(layers) if not family.is_sparse(config, old)]
        text.update(family.dense_layers(dense))
    return target
