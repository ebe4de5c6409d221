"""make_plan(): a pruning plan from scores and a target; needs no model, so another target costs nothing."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from minitron_kernels.pruning.families.configs import Config, completed
from minitron_kernels.pruning.families.family import Family
from minitron_kernels.pruning.families.registry import family_of
from minitron_kernels.pruning.plan.counts import EXPERTS_PER_TOKEN, Budget
from minitron_kernels.pruning.plan.find_sizes import Candidate, nothing_to_cut, sizes_within
from minitron_kernels.pruning.plan.layer_plan import LayerPlan
from minitron_kernels.pruning.plan.loadable import remedy, warn_of_hidden
from minitron_kernels.pruning.plan.pruning_plan import PruningPlan
from minitron_kernels.pruning.plan.selection import ORDERS, KeptHeads, choose_heads
from minitron_kernels.pruning.plan.sizes import (
    Sizes,
    check_experts_per_token,
    check_layers,
    given_sizes,
    head_dim_changes,
    named_sizes,
    size_names,
    target_config_of,
)
from minitron_kernels.pruning.plan.states import following_keys, impossible_heads
from minitron_kernels.pruning.plan.tables import Tables, kept_layers, norm_factors

__all__ = ["LayerPlan", "PruningPlan", "make_plan"]

KV_CHOICES = ("prune", "merge")


def make_plan(
    scores: Any,
    config: Config | None = None,
    *,
    ratio: float | Mapping[str, float] | None = None,
    params: float | None = None,
    active_params: float | None = None,
    memory_bytes: float | None = None,
    memory_dtype: Any = "bfloat16",
    kv_tokens: int = 0,
    kv_sequences: int = 1,
    search: Sequence[str] | None = None,
    num_experts_per_tok: int | None = None,
    drop_layers: Sequence[int] | None = None,
    block_losses: Mapping[int, float] | Sequence[float] | None = None,
    kv_heads: str = "prune",
    merge_heads: bool = False,
    order: str = "original",
    divisor: int | Mapping[str, int] | None = None,
    rescale_norms: bool = True,
    loadable: bool = True,
    batch: str = "L2",
    seq: str = "mean",
    **sizes: int,
) -> PruningPlan:
    """What to keep of a model so that it gets the given size.

    On each axis the channels with the highest scores stay: the same hidden channels in all layers; MLP
    neurons, heads, experts and the neurons of an expert in each layer separately. Axes without a target keep
    their size. Of equal scores the channel, head or expert with the lower number stays; of equal blocks of
    layers the first goes.

    Args:
        scores: ImportanceScores, or a mapping with the tables of the axes to prune: "hidden" [hidden], "mlp"
            {layer: [mlp]}, "heads" {layer: [heads]}, "experts" {layer: [experts]}, "expert_mlp" {layer:
            [experts, expert_mlp]}, "conv" {layer: [hidden]}, "mamba" {layer: [heads · channels]}, "delta"
            {layer: [value heads]}, "layers" [layers], and, to rescale norms, "energy" {norm: [hidden]}.
        config: a transformers config, or the dict in config.json; default: that of the scores.
        **sizes: by their names in the config: hidden_size, intermediate_size, num_hidden_layers,
            num_attention_heads, num_key_value_heads, num_experts or num_local_experts,
            moe_intermediate_size; of hybrids mamba_n_heads or mamba_num_heads, mamba_d_head or
            mamba_head_dim, linear_num_value_heads, linear_num_key_heads. Where each query head has its own KV
            head, KV heads follow the query heads; so do key heads their value heads in a delta net.
            Hidden and MLP sizes must be multiples of the divisor.
        ratio: of hidden and MLP sizes to those of the source, or by name, {"intermediate_size": 0.75}; sizes
            are rounded to the nearest multiple of the divisor.
        params: a budget of parameters, embeddings included; find_sizes() describes how the sizes are chosen.
            The plan lists the best candidates; search_plan() scores them.
        active_params: a budget of the parameters that serve a token; differs where there are experts.
        memory_bytes: a budget of bytes, for the weights in memory_dtype and what kv_tokens tokens of
            kv_sequences sequences leave in a cache; count_usage() has the formulas. All budgets that are
            given are kept.
        memory_dtype, kv_tokens, kv_sequences: see memory_bytes.
        search: the sizes that a budget may choose; default: the hidden and MLP sizes that are not given.
        num_experts_per_tok: for the new config; needed where fewer experts stay than serve a token.
        drop_layers: the layers to drop. Without it, num_hidden_layers drops the block of neighbouring layers
            whose measured loss, or summed score in the table "layers", is least.
        block_losses: {first layer of a block: loss of the model without that block}. Importance is a weak
            guide to depth: dropping the block that it chooses can give ten times the perplexity of the best.
        kv_heads: how KV heads become fewer. "prune": KV groups are dropped, with their query heads. "merge":
            equally many neighbouring KV heads are replaced by one with the mean of their key and value
            weights (GQA, arXiv 2305.13245). All their query heads attend to it, or the best of them where
            query heads are dropped as well.
        merge_heads: let the kept query heads of a group stand for the dropped ones too (Minitron, section
            2.3): head_i <- 2 head_i - head_{2K-i+1} for i from 2K-L+1 to K, with the L ≤ 2K heads of a KV
            group in order of falling score, K of which are kept. It changes the query projection only: keys
            and values are the group's. Off by default, since it does harm before any retraining
            (SmolLM2-135M, 9 to 6 heads: perplexity 101 without it, 551 with it).
        order: of the kept channels of an axis: "original", or "importance" (falling; heads inside their KV
            group). A model in order of importance can be cut again by slicing.
        divisor: the number that hidden and MLP sizes must be multiples of, for all or by name; default 64, or
            128 where sizes are searched for a budget.
        rescale_norms: multiply the gain of each norm by √(share of the energy of its input that the kept
            channels hold · old size / new size). The kept channels then leave the norm as large as before,
            although it divides by the root mean square of fewer channels. Needs the table "energy". A
            LayerNorm is treated the same way: the mean that it subtracts is small beside the root mean
            square.
        loadable: refuse sizes that transformers would not load, although the model would run.
        batch, seq: the aggregations of ImportanceScores; see ImportanceScores.tables().

    Returns:
        The plan; print(plan.summary()).

    Raises:
        TypeError, ValueError: an impossible target, a budget that nothing has to be cut for, or a table that
            is missing, has another shape or holds NaN; says what is possible.

    Warns:
        UserWarning: no target was given; the plan keeps everything. A budget had to leave the hidden size as
            it is, since transformers would load no smaller multiple of the divisor.

    Source: Minitron (arXiv 2407.14679) section 2; its sequel (arXiv 2408.11796) section 3.

    Example:
        >>> plan = make_plan(scores, hidden_size=4096, intermediate_size=11520)        # doctest: +SKIP
        >>> plan.save("plan.json")                                                     # doctest: +SKIP
    """
    for name, value, choices in (("order", order, ORDERS), ("kv_heads", kv_heads, KV_CHOICES)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if config is None:
        config = getattr(scores, "config", None)
        if config is None:
            raise TypeError("config must be given where scores are a mapping of tables")
    tables = scores.tables(batch=batch, seq=seq) if hasattr(scores, "tables") else scores
    if not isinstance(tables, Mapping):
        raise TypeError(f"scores must be ImportanceScores or a mapping, got {type(scores).__name__}")
    config = completed(config)
    family = family_of(config)
    names = size_names(family, config)
    before = family.sizes(config)

    given = given_sizes(family, config, sizes, ratio, divisor)
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
    if not sizes and not budget.limits and ratio is drop_layers is num_experts_per_tok is None:
        warnings.warn(
            f"the plan keeps everything: give sizes ({', '.join(names)}), ratio=, drop_layers=, or a budget: "
            "params=, active_params=, memory_bytes=",
            stacklevel=2,
        )
    table = Tables(tables, before)
    depth = given.get("layers", before["layers"])
    layers = kept_layers(table, before["layers"], depth, "layers" in given, drop_layers, block_losses)
    check_layers(family, config, layers)
    candidates: list[Candidate] = []
    if budget.limits:
        candidates = sizes_within(
            config,
            budget,
            fixed=named_sizes(names, given),
            layers=None if len(layers) == before["layers"] else layers,
            divisor=divisor,
            loadable=loadable,
            limit=10,
        )
        given.update({names[name]: size for name, size in candidates[0].sizes.items()})
        if all(before[axis] == size for axis, size in given.items()) and len(layers) == before["layers"]:
            raise ValueError(nothing_to_cut(budget, candidates[0]))
        if loadable:
            searched = {names[name] for name in candidates[0].sizes}
            warn_of_hidden(family, config, {**before, **given}, searched, divisor)
        if len(layers) != given.get("layers", len(layers)):
            layers = kept_layers(table, before["layers"], given["layers"], True, None, block_losses)
            check_layers(family, config, layers)
    elif search is not None:
        raise ValueError("search chooses sizes for a budget: give params as well, or another budget")
    if not budget.limits and budget.counted != Budget().counted:
        raise ValueError(
            "memory_dtype and kv_tokens belong to a budget, and so do kv_sequences: give memory_bytes as well"
        )
    if block_losses is not None and "layers" not in given:
        raise ValueError("block_losses tell which layers go, but all stay: give num_hidden_layers as well")
    after = {**before, **given, "layers": len(layers)}
    if before["heads"] == before["kv_heads"] and "kv_heads" not in given and kv_heads == "prune":
        after["kv_heads"] = after["heads"]
    after |= {axis: after[other] for axis, other in family.follows.items()}
    following_keys(before, after, given)
    if reason := impossible_heads(before, after):
        raise ValueError(reason)
    _check_heads(before, after, kv_heads)
    if merge_heads:
        _check_merge(before, after, kv_heads)
    if changed := head_dim_changes(family, after):
        raise ValueError(changed)
    target = target_config_of(config, after, layers)
    _settle_experts(family, config, target, after, num_experts_per_tok)
    if loadable and (reason := family.refuses(target)):
        raise ValueError(
            f"transformers would not load the pruned model: {reason}. {remedy(family, config, after)}"
            "Take other sizes, or loadable=False"
        )

    hidden = table.keep("hidden", None, after["hidden"], order)
    entries = []
    for layer in layers:
        axes, heads, mlp = family.layer_axes(config, layer), None, None
        if "heads" in axes:
            heads = _heads_of(table, layer, before, after, kv_heads == "merge", merge_heads, order)
        if "mlp" in axes:
            mlp = table.keep("mlp", layer, after["mlp"], order)
        entry = LayerPlan(layer, heads, mlp)
        if "conv" in axes:
            entry = dataclasses.replace(entry, conv=table.keep("conv", layer, after["conv"], order))
        if "mamba_heads" in axes:
            kept, channels = table.mamba(layer, after["mamba_heads"], after["mamba_dim"], order)
            entry = dataclasses.replace(entry, mamba_heads=kept, mamba_dim=channels)
        if "delta_heads" in axes:
            values, keys = table.delta(layer, after["delta_heads"], after["delta_keys"], order)
            entry = dataclasses.replace(entry, delta_heads=values, delta_keys=keys)
        if family.is_sparse(config, layer):
            experts = table.keep("experts", layer, after["experts"], order)
            neurons = table.expert_neurons(layer, experts, after["expert_mlp"], order)
            entry = dataclasses.replace(entry, experts=experts, expert_mlp=neurons)
        entries.append(entry)
    made_with = {
        **sizes,
        **_given_options(ratio=ratio, **budget.limits, search=search, divisor=divisor),
        "kv_heads": kv_heads,
        "merge_heads": merge_heads,
        "rescale_norms": rescale_norms,
    }
    if hasattr(scores, "tables"):
        made_with |= {"batch": batch, "seq": seq}
    if memory_bytes is not None:
        made_with |= budget.counted
    if len(layers) < before["layers"]:
        chosen_by = "importance" if block_losses is None else "loss"
        made_with["layers_by"] = "name" if drop_layers is not None else chosen_by
    return PruningPlan(
        source_config=config,
        target_config=target,
        hidden=hidden,
        layers=tuple(entries),
        order=order,
        norm_factors=norm_factors(family, config, table, hidden, layers) if rescale_norms else {},
        made_with=made_with,
        candidates=tuple(candidates),
    )


def _given_options(**options: Any) -> dict[str, Any]:
    """The options that are not None, as JSON types."""
    given: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            given[name] = dict(value)
        elif value is not None:
            given[name] = value if isinstance(value, (int, float)) else list(value)
    return given


def _check_heads(before: Sizes, after: Sizes, kv_choice: str) -> None:
    """Checks that equally many query heads can be kept for each KV head."""
    old, new = before["heads"] // before["kv_heads"], after["heads"] // after["kv_heads"]
    if after["heads"] % after["kv_heads"]:
        raise ValueError(
            f"num_attention_heads must be a multiple of num_key_value_heads, {after['kv_heads']}, got "
            f"{after['heads']}: every KV group keeps equally many query heads"
        )
    if kv_choice == "prune" and new > old:
        raise ValueError(
            f"num_key_value_heads {after['kv_heads']} would serve {new} query heads each, but a KV group has "
            f'{old}: keep at most {old * after["kv_heads"]} num_attention_heads, or take kv_heads="merge"'
        )
    if kv_choice == "merge" and before["kv_heads"] % after["kv_heads"]:
        raise ValueError(
            f"num_key_value_heads must divide {before['kv_heads']} where KV heads are merged, got "
            f"{after['kv_heads']}"
        )


def _check_merge(before: Sizes, after: Sizes, kv_choice: str) -> None:
    joined = before["kv_heads"] // after["kv_heads"] if kv_choice == "merge" else 1
    total = before["heads"] // before["kv_heads"] * joined
    kept = after["heads"] // after["kv_heads"]
    if total > 2 * kept:
        raise ValueError(
            f"merge_heads needs at least half of the {total} query heads of a KV group to stay, got {kept}"
        )
    if total == kept:
        raise ValueError(
            f"merge_heads has nothing to merge: all {total} query heads of a KV group stay, or the group goes"
        )


def _settle_experts(
    family: Family, config: Config, target: dict[str, Any], after: Sizes, per_token: int | None
) -> None:
    routed = family.value(config, EXPERTS_PER_TOKEN) if after.get("experts") else None
    if per_token is not None:
        check_experts_per_token(per_token, None if routed is None else after["experts"])
        text = target.get(family.text_key or "", target)
        text[EXPERTS_PER_TOKEN] = per_token
    elif routed is not None and routed > after["experts"]:
        raise ValueError(
            f"a token goes to {routed} experts, but only {after['experts']} stay: keep at least {routed}, "
            f"or give num_experts_per_tok={after['experts']}"
        )


def _heads_of(
    table: Tables, layer: int, before: Sizes, after: Sizes, merge_kv: bool, merge_query: bool, order: str
) -> KeptHeads:
    scores = None
    if after["heads"] != before["heads"]:
        scores = table.get("heads", layer, (before["heads"],), "to prune heads")
    return choose_heads(
        scores,
        (before["heads"], before["kv_heads"]),
        (after["heads"], after["kv_heads"]),
        merge_kv=merge_kv,
        merge_query=merge_query,
        order=order,
    )
