"""What a recipe is to make of its teacher: the arguments of make_plan(), and the sizes of each round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minitron_kernels.distillation.recipe.scores import even_tables
from minitron_kernels.distillation.recipe.tables import BUDGETS, SIZES
from minitron_kernels.pruning import PruningPlan, make_plan
from minitron_kernels.pruning.families.configs import completed
from minitron_kernels.pruning.families.registry import family_of

_OPTIONS = (
    *("memory_dtype", "kv_tokens", "search", "num_experts_per_tok", "divisor"),
    *("kv_heads", "merge_heads", "order", "rescale_norms"),
)
_WIDTHS = ("hidden", "mlp", "expert_mlp")  # sizes that must be multiples of the divisor
_BETWEEN = (*_WIDTHS, "heads", "kv_heads", "layers", "experts")  # sizes of which rounds know the ones between


def arguments_of(plan: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The arguments of make_plan() that [plan] gives, but for scores and aggregations.

    Args:
        plan: the table.
        config: of the model to cut, which decides between names of one size.
    """
    config = completed(config)
    family = family_of(config)
    text = family.text(config)
    sizes = {}
    for name, names in SIZES.items():
        if plan[name] is not None:
            sizes[next((other for other in names if other in text), name)] = plan[name]
    budgets = {name: plan[name] for name in BUDGETS}
    budgets["memory_bytes"] = budgets.pop("memory")
    options = {name: plan[name] for name in _OPTIONS}
    return {"ratio": plan["ratio"], "drop_layers": plan["drop_layers"], **budgets, **options, **sizes}


def preview(plan: Mapping[str, Any], config: Any) -> PruningPlan:
    """The plan that [plan] makes of a model with this config, with made-up scores but the right sizes.

    Raises:
        ValueError: the target is impossible for this model; says what is possible.
    """
    return make_plan(even_tables(config), config, **{**arguments_of(plan, config), "rescale_norms": False})


def sizes_of_round(plan: Mapping[str, Any], config: Any, number: int) -> dict[str, int]:
    """The sizes after one of the rounds, by their names in the config.

        s_i = s_0 − i (s_0 − s_T) / T

    rounded up to the size's step; after the last round they are the target's.

    Args:
        plan: the table [plan].
        config: of the model before the first round.
        number: of the round, from 1 on.

    Raises:
        ValueError: sizes change that rounds do not know.

    Source: iterative importance, Minitron (arXiv 2407.14679) section 2.2.
    """
    rounds, config = plan["rounds"], completed(config)
    target = preview(plan, config).target_config
    family = family_of(config)
    before, after = family.sizes(config), family.sizes(target)
    text, divisor = family.text(config), plan["divisor"] or 64
    found = {}
    for axis in (axis for axis in before if before[axis] != after[axis]):
        if axis not in _BETWEEN or (axis == "kv_heads" and before["heads"] != before["kv_heads"]):
            names = family.keys_of(axis)
            raise ValueError(f"rounds must be 1 where {names[0] if names else axis} changes, got {rounds}")
        if axis == "kv_heads":  # they follow the query heads
            continue
        step = divisor if axis in _WIDTHS else before["kv_heads"] if axis == "heads" else 1
        if axis == "heads" and before["heads"] == before["kv_heads"]:
            step = 1
        size = after[axis]
        if number < rounds:
            size = -((before[axis] * (number - rounds) - after[axis] * number) // rounds)  # rounded up
            size = min(before[axis], -(-size // step) * step)
        found[next(name for name in family.keys_of(axis) if name in text)] = size
    return found


def round_arguments(plan: Mapping[str, Any], first: Any, number: int) -> dict[str, Any]:
    """The arguments of make_plan() for one of the rounds; `first` is the config before the first one."""
    options = {name: plan[name] for name in _OPTIONS if name not in ("search", "memory_dtype", "kv_tokens")}
    return {**options, **sizes_of_round(plan, first, number)}
