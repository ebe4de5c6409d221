"""What to do where transformers would refuse the config of a smaller model, as Llama's class does some."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping

from minitron_kernels.pruning.families.configs import Config, config_value
from minitron_kernels.pruning.families.family import Family
from minitron_kernels.pruning.plan.find_sizes import SEARCH_DIVISOR
from minitron_kernels.pruning.plan.sizes import divisor_of, head_dim_changes, write_sizes

_ROUND = 8  # a multiple of it is mentioned too, since GEMMs want at least that


def remedy(family: Family, config: Config, sizes: Mapping[str, int]) -> str:
    """What would load instead of these sizes: hidden sizes near theirs, and another class.

    Args:
        family, config: of the source.
        sizes: of the smaller model, by axis, which transformers refuses.
    """
    whole = family.sizes(config)["hidden"]
    loads = [size for size in range(1, whole) if _reason(family, config, sizes, size) is None]
    near = {
        *_around(loads, sizes["hidden"]),
        *_around([n for n in loads if n % _ROUND == 0], sizes["hidden"]),
    }
    said = ""
    if near:
        said = f"hidden_size {' or '.join(map(str, sorted(near)))} would load, with another divisor. "
    if config_value(config, "model_type") == "llama":
        said += "As a Mistral, which computes the same, it loads with any (docs/pruning.md). "
    return said


def warn_of_hidden(
    family: Family,
    config: Config,
    sizes: Mapping[str, int],
    searched: Collection[str],
    divisor: int | Mapping[str, int] | None,
) -> None:
    """Warns if a budget had to leave the hidden size as it is, since transformers loads no smaller multiple.

    Args:
        family, config: of the source.
        sizes: that were chosen, by axis.
        searched: the axes among which the budget was free to choose.
        divisor: of make_plan().
    """
    # where the config has no head_dim, hidden and heads are cut alike, if both are searched
    if "hidden" not in searched or ("heads" in searched and not family.keys_of("head_dim")):
        return
    whole, name = family.sizes(config)["hidden"], family.keys_of("hidden")[0]
    step = divisor_of(divisor, name, "hidden", SEARCH_DIVISOR)
    smaller = range(-(-whole // 4 // step) * step or step, whole, step)
    reasons = [_reason(family, config, sizes, size) for size in smaller]
    if sizes["hidden"] < whole or not reasons or None in reasons:
        return
    message = f"{name} stays {whole}: transformers would load no smaller multiple of {step}: {reasons[-1]}"
    warnings.warn(f"{message}. {remedy(family, config, {**sizes, 'hidden': smaller[-1]})}", stacklevel=3)


def _reason(family: Family, config: Config, sizes: Mapping[str, int], hidden: int) -> str | None:
    sizes = {**sizes, "hidden": hidden}
    return head_dim_changes(family, sizes) or family.refuses(write_sizes(family, config, sizes))


def _around(sizes: list[int], wanted: int) -> list[int]:
    """The greatest that is less than wanted, and the least that is greater."""
    below, above = [n for n in sizes if n < wanted], [n for n in sizes if n > wanted]
    return below[-1:] + above[:1]
