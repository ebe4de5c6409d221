"""The sizes of the smaller model: from names, ratios, or budgets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minitron_kernels.pruning.families.configs import Config, as_dict, completed, config_value
from minitron_kernels.pruning.families.family import MTP_KEYS, Family
from minitron_kernels.pruning.families.registry import family_of
from minitron_kernels.pruning.plan.counts import EXPERTS_PER_TOKEN, Footprint, UsageCount, budgets_of
from minitron_kernels.pruning.plan.states import STATE_AXES, following_keys, impossible_heads

DIVISOR = 64  # of given sizes: rows are then multiples of 128 bytes in bf16, and of tensor cores' tiles
SEARCH_DIVISOR = 128  # of sizes that are searched for a budget: a tile of GEMM libraries
_WRITTEN = ("hidden", "heads", "kv_heads", "head_dim", "mlp", "expert_mlp", "experts")
WIDTH = ("hidden", "mlp", "expert_mlp")  # axes of channels, whose sizes must be multiples of the divisor
NEARLY = 0.97  # of the fullest candidate that fits: above this share the better shape is preferred
MOST_CANDIDATES = 200_000
BUDGETS = ("params", "active_params", "memory_bytes")  # of the fields of Usage, in their order

Sizes = dict[str, int]


def size_names(family: Family, config: Config) -> dict[str, str]:
    """The names of the sizes that can be pruned, and their axes: {"hidden_size": "hidden", ...}."""
    there = (UsageCount(family, config).axes() | {"layers"}) - {"vocab", "head_dim"}
    there -= set(family.fixed(config))
    axes = ("hidden", "mlp", "expert_mlp", "experts", "heads", "kv_heads", *STATE_AXES, "layers")
    return {key: axis for axis in axes if axis in there for key in family.keys_of(axis)}


def _axis(name: str, names: Mapping[str, str], family: Family, config: Config) -> str:
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
        axis = _axis(name, names, family, config)
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
        ratio = {name: ratio for name, axis in names.items() if axis in WIDTH and axis not in sizes}
    for name, part in ratio.items():
        axis = _axis(name, names, family, config)
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


@dataclass(frozen=True)
class Candidate:
    """One choice of sizes.

    Args:
        sizes: by their names in the config.
        parameters: of a model with these sizes; a tied head counts once.
        spread: the largest share of the source's size divided by the smallest: 1 where all shrink alike.
        active_parameters: those that serve a token, see count_usage(); None: not counted.
        memory_bytes: of weights and cache, see count_usage(); None: not counted.
    """

    sizes: dict[str, int]
    parameters: int
    spread: float
    active_parameters: int | None = None
    memory_bytes: int | None = None


def find_sizes(
    config: Config,
    params: float | None = None,
    *,
    active_params: float | None = None,
    memory_bytes: float | None = None,
    memory_dtype: Any = "bfloat16",
    kv_tokens: int = 0,
    kv_sequences: int = 1,
    num_experts_per_tok: int | None = None,
    search: Sequence[str] | None = None,
    fixed: Mapping[str, int] | None = None,
    layers: Sequence[int] | None = None,
    divisor: int | Mapping[str, int] | None = None,
    loadable: bool = True,
    limit: int = 20,
) -> list[Candidate]:
    """Sizes of models within all of the budgets that are given, best first.

    All combinations of multiples of the divisor (128), from a quarter of the source's size up, are counted,
    as by count_usage(). How full a candidate is, is the share of a budget that it takes; of several budgets
    the largest share. First come those at least 97 % as full as the fullest, in order of how evenly their
    sizes shrink. Then come the others, the fullest first.

    Args:
        config: of the source.
        params: a budget of parameters, embeddings included, e.g. 8.4e9.
        active_params: a budget of parameters that serve a token, for models with experts.
        memory_bytes: a budget of bytes for the weights and the key/value cache.
        memory_dtype, kv_tokens, kv_sequences: the dtype of weights and cache, and the tokens and sequences in
            it, as in count_usage().
        num_experts_per_tok: of the smaller model; default: as in the source.
        search: names of sizes to choose; default: hidden and MLP sizes. num_hidden_layers is possible only
            where all layers have the same parameters.
        fixed: other sizes, by name; they need not be multiples of the divisor.
        layers: the layers that stay; default: all, or as many as `search` chooses.
        divisor: of hidden and MLP sizes, one for all or by name.
        loadable: leave out sizes that transformers would not load.
        limit: how many to return.

    Raises:
        TypeError, ValueError: no budget, or one that is not a positive number; an unknown name; nothing fits
            (says how small the smallest is); too many combinations.

    Example:
        >>> find_sizes(config, 8.5e9)[0].sizes                          # doctest: +SKIP
        {'hidden_size': 4096, 'intermediate_size': 11520}
    """
    config = completed(config)
    family = family_of(config)
    before = family.sizes(config)
    names = size_names(family, config)
    budgets = budgets_of(params=params, active_params=active_params, memory_bytes=memory_bytes)
    if not budgets:
        raise ValueError("give a budget: params, active_params or memory_bytes")
    if num_experts_per_tok is not None:
        check_experts_per_token(num_experts_per_tok, before.get("experts") or None)
    given = given_sizes(family, config, fixed or {}, None, 1)
    if search is None:
        search = [name for name, axis in names.items() if axis in WIDTH and axis not in given]
    axes = [_axis(name, names, family, config) for name in search]
    if not axes or set(axes) & set(given) or len(set(axes)) < len(axes):
        raise ValueError(
            f"search must hold sizes that are not given otherwise, each once, got {list(search)}"
        )
    count = UsageCount(family, config, Footprint(memory_dtype, kv_tokens, kv_sequences), num_experts_per_tok)
    depth = given.get("layers", before["layers"])
    kept = list(range(depth) if layers is None else layers)
    if len(kept) != depth and "layers" in given:
        raise ValueError(f"layers must be {depth} as fixed says, got {len(kept)}")
    if "layers" in axes and layers is not None:
        raise ValueError("search cannot choose num_hidden_layers where layers are given")
    if ("layers" in axes or len(kept) < before["layers"]) and layers is None and not count.uniform():
        raise ValueError("layers must name the layers that stay, since not all have the same parameters")
    grids = [
        _grid(before[axis], axis, divisor_of(divisor, name, axis, SEARCH_DIVISOR), count.per_token)
        for name, axis in zip(search, axes, strict=True)
    ]
    if math.prod(map(len, grids)) > MOST_CANDIDATES:
        raise ValueError(
            f"search would try {math.prod(map(len, grids))} combinations, at most {MOST_CANDIDATES}: take a "
            "greater divisor or fewer sizes"
        )
    kinds = {
        n: count.of(kept[:n]) for n in (grids[axes.index("layers")] if "layers" in axes else [len(kept)])
    }
    group = before["heads"] // before["kv_heads"]
    chosen = {*given, *axes}
    follow = group == 1 and "kv_heads" not in chosen
    found: list[tuple[float, Candidate]] = []
    least: dict[str, int] = {}
    for choice in itertools.product(*grids):
        sizes = {**before, "layers": len(kept), **given, **dict(zip(axes, choice, strict=True))}
        sizes |= {axis: sizes[other] for axis, other in family.follows.items()}
        following_keys(before, sizes, chosen)
        if impossible_heads(before, sizes):
            continue
        if follow:
            sizes["kv_heads"] = sizes["heads"]
        per_group, rest = divmod(sizes["heads"], sizes["kv_heads"])
        if rest or (per_group > group and "kv_heads" in axes):
            continue
        if loadable and family.refuses(write_sizes(family, config, sizes)):
            continue
        usage = count.usage(kinds[sizes["layers"]], sizes)
        taken = dict(zip(BUDGETS, usage, strict=True))
        least = {name: min(taken[name], least.get(name, taken[name])) for name in budgets}
        if any(taken[name] > budget for name, budget in budgets.items()):
            continue
        shares = [sizes[axis] / before[axis] for axis in axes]
        candidate = Candidate(
            dict(zip(search, choice, strict=True)),
            usage.parameters,
            max(shares) / min(shares),
            usage.active_parameters,
            usage.memory_bytes,
        )
        found.append((max(taken[name] / budget for name, budget in budgets.items()), candidate))
    if not least:
        raise ValueError(f"search finds no sizes {list(search)} that go with the others")
    if not found:
        for name, budget in budgets.items():
            if least[name] > budget:
                raise ValueError(
                    f"{name} must be at least {least[name]:,}, the smallest of sizes {list(search)}, got "
                    f"{budget:,}"
                )
        raise ValueError(f"{' and '.join(budgets)} are each met by sizes {list(search)}, but not together")
    enough = NEARLY * max(full for full, _ in found)

    def rank(entry: tuple[float, Candidate]) -> tuple[float, ...]:
        full, candidate = entry
        if full >= enough:
            return 0, candidate.spread, -full, -candidate.parameters
        return 1, -full, candidate.spread, -candidate.parameters

    return [candidate for _, candidate in sorted(found, key=rank)[:limit]]


def _grid(size: int, axis: str, step: int, experts_per_token: int | None) -> list[int]:
    """The sizes to try: multiples of the divisor from a quarter of the source's size up, and that size."""
    least = max(int(experts_per_token or 1) if axis == "experts" else 1, -(-size // 4))
    return sorted({*range(-(-least // step) * step, size + 1, step), size})


def named_sizes(names: Mapping[str, str], sizes: Mapping[str, int]) -> Sizes:
    """Sizes of axes by their first names in the config; `names` as size_names() gives them."""
    first = {axis: name for name, axis in reversed(list(names.items()))}
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
    if family.dense_layers is not None:
        dense = [new for new, old in enumerate(layers) if not family.is_sparse(config, old)]
        text.update(family.dense_layers(dense))
    return target
