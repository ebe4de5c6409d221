"""find_sizes(): the sizes of a smaller model within budgets of parameters and memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minitron_kernels.pruning.families.configs import Config, completed
from minitron_kernels.pruning.families.registry import family_of
from minitron_kernels.pruning.plan.counts import Budget, UsageCount
from minitron_kernels.pruning.plan.sizes import (
    WIDTH,
    axis_of,
    check_experts_per_token,
    divisor_of,
    first_names,
    given_sizes,
    head_dim_changes,
    size_names,
    write_sizes,
)
from minitron_kernels.pruning.plan.states import following_keys, impossible_heads

SEARCH_DIVISOR = 128  # of sizes that are searched for a budget: a tile of GEMM libraries
NEARLY = 0.97  # of the fullest candidate that fits: above this share the better shape is preferred
MOST_CANDIDATES = 200_000


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
    budget = Budget(
        params=params,
        active_params=active_params,
        memory_bytes=memory_bytes,
        memory_dtype=memory_dtype,
        kv_tokens=kv_tokens,
        kv_sequences=kv_sequences,
        num_experts_per_tok=num_experts_per_tok,
        search=search,
    )
    return sizes_within(
        config, budget, fixed=fixed, layers=layers, divisor=divisor, loadable=loadable, limit=limit
    )


def sizes_within(
    config: Config,
    budget: Budget,
    *,
    fixed: Mapping[str, int] | None,
    layers: Sequence[int] | None,
    divisor: int | Mapping[str, int] | None,
    loadable: bool,
    limit: int,
) -> list[Candidate]:
    """find_sizes(), with what may be taken and chosen as one argument."""
    config = completed(config)
    family = family_of(config)
    before = family.sizes(config)
    names = size_names(family, config)
    limits = budget.limits
    if not limits:
        raise ValueError("give a budget: params, active_params or memory_bytes")
    if budget.num_experts_per_tok is not None:
        check_experts_per_token(budget.num_experts_per_tok, before.get("experts") or None)
    given = given_sizes(family, config, fixed or {}, None, 1)
    search = budget.search
    if search is None:
        search = [name for name, axis in first_names(names).items() if axis in WIDTH and axis not in given]
    axes = [axis_of(name, names, family, config) for name in search]
    if not axes or set(axes) & set(given) or len(set(axes)) < len(axes):
        raise ValueError(
            f"search must hold sizes that are not given otherwise, each once, got {list(search)}"
        )
    count = UsageCount(family, config, budget.footprint, budget.num_experts_per_tok)
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
        if head_dim_changes(family, sizes) or (
            loadable and family.refuses(write_sizes(family, config, sizes))
        ):
            continue
        usage = count.usage(kinds[sizes["layers"]], sizes)
        taken = dict(zip(Budget.LIMITS, usage, strict=True))
        least = {name: min(taken[name], least.get(name, taken[name])) for name in limits}
        if any(taken[name] > most for name, most in limits.items()):
            continue
        shares = [sizes[axis] / before[axis] for axis in axes]
        candidate = Candidate(
            dict(zip(search, choice, strict=True)),
            usage.parameters,
            max(shares) / min(shares),
            usage.active_parameters,
            usage.memory_bytes,
        )
        found.append((max(taken[name] / most for name, most in limits.items()), candidate))
    if not least:
        raise ValueError(f"search finds no sizes {list(search)} that go with the others")
    if not found:
        for name, most in limits.items():
            if least[name] > most:
                raise ValueError(
                    f"{name} must be at least {least[name]:,}, the smallest of sizes {list(search)}, got "
                    f"{most:,.0f}"
                )
        raise ValueError(f"{' and '.join(limits)} are each met by sizes {list(search)}, but not together")
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


def nothing_to_cut(budget: Budget, whole: Candidate) -> str:
    """What is wrong with budgets that the whole model meets."""
    counted = (whole.parameters, whole.active_parameters, whole.memory_bytes)
    taken = dict(zip(Budget.LIMITS, counted, strict=True))
    said = (
        f"{name} must be less than the {taken[name]:,} of the whole model, got {most:,.0f}"
        for name, most in budget.limits.items()
    )
    return f"{'; '.join(said)}: nothing would be cut"
