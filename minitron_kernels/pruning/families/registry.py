"""The known families, by the model_type of their configs."""

from __future__ import annotations

from minitron_kernels.pruning.families.configs import Config, config_value
from minitron_kernels.pruning.families.family import ONE, PER_HEAD_ONE, QKV, SIZE_KEYS, Family
from minitron_kernels.pruning.families.refused import refusal_of

_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Makes a family known to scoring, planning and pruning. It replaces earlier ones of its model types.

    Example:
        >>> import dataclasses
        >>> llama = family_of({"model_type": "llama"})
        >>> register_family(dataclasses.replace(llama, model_types=("my_llama",)))

    Raises:
        TypeError, ValueError: `family` is not a Family, or has a parameter with an axis of unknown size;
            names it.
    """
    if not isinstance(family, Family):
        raise TypeError(f"family must be a Family, got {type(family).__name__}")
    known = {*SIZE_KEYS, *family.size_keys, *PER_HEAD_ONE, QKV, ONE} - {"layers"}
    for param in (*family.outer, *family.layer, *(family.stored_layer or ())):
        if len(param.dims) > 3 or (len(param.dims) == 3 and param.dims[0] != ("experts",)):
            raise ValueError(
                f"family has {param.name} with axes {param.axes!r}: they must be at most two, or three that "
                "begin with experts"
            )
        for axis in (axis for parts in param.dims for axis in parts):
            if axis not in known:
                raise ValueError(
                    f"family has {param.name} with an axis {axis!r}, which is none of "
                    f"{', '.join(sorted(known))}: give its config key in size_keys"
                )
    for model_type in family.model_types:
        _FAMILIES[model_type] = family


def known_families() -> tuple[str, ...]:
    """The known model types."""
    return tuple(sorted(_FAMILIES))


def family_of(config: Config) -> Family:
    """The family of a model with this config.

    Raises:
        ValueError: its model_type is not known: says what its models have that is not described, or how to
            describe it; names those that are known.
    """
    model_type = config_value(config, "model_type")
    if model_type in _FAMILIES:
        return _FAMILIES[model_type]
    refusal = refusal_of(model_type)
    if refusal is not None:
        raise ValueError(
            f"config.model_type {model_type!r} is not supported: it has {refusal.lacks}; {refusal.remedy}. "
            f"Known are {', '.join(known_families())}"
        )
    raise ValueError(
        f"config.model_type must be one of {', '.join(known_families())}, got {model_type!r}. Describe its "
        "parameters and taps in a minitron_kernels.pruning.Family and pass it to register_family()"
    )
