"""The known families, by the model_type of their configs."""

from __future__ import annotations

from pathlib import Path

from minitron_kernels.pruning.families.axes import ONE, PRUNED, names_in
from minitron_kernels.pruning.families.configs import Config, as_dict, config_value, nested
from minitron_kernels.pruning.families.family import SIZE_KEYS, Family
from minitron_kernels.pruning.families.multimodal import Multimodal
from minitron_kernels.pruning.families.refused import refusal_of

_FAMILIES: dict[str, Family] = {}
_MULTIMODAL: dict[str, Multimodal] = {}
# by the ids of the first two, which it keeps
_AROUND: dict[tuple[int, int], tuple[Multimodal, Family, Family]] = {}


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
    known = {*SIZE_KEYS, *family.size_keys, *family.computed, ONE} - {"layers"}
    for state in (*family.states, *family.token_states):
        _check_axes(f"a state of {state.axes!r}", state.dims, known)
    for param in (*family.outer, *family.layer, *(family.stored_layer or ())):
        behind = {name for parts in param.dims[1:] for part in parts for name in names_in(part)}
        stacked = param.dims[:1] == (("experts",),)
        if len(param.dims) > 3 or (len(param.dims) == 3 and not stacked and behind & set(PRUNED)):
            raise ValueError(
                f"family has {param.name} with axes {param.axes!r}: they must be at most two, or three that "
                "begin with experts, or are never cut but for the first"
            )
        _check_axes(param.name, param.dims, known)
    for model_type in family.model_types:
        _FAMILIES[model_type] = family
        _MULTIMODAL.pop(model_type, None)


def _check_axes(what: str, dims: tuple[tuple[str, ...], ...], known: set[str]) -> None:
    for axis in (name for parts in dims for part in parts for name in names_in(part)):
        if axis not in known and not axis.isdecimal():
            raise ValueError(
                f"family has {what} with an axis {axis!r}, which is none of {', '.join(sorted(known))}: give "
                "its config key in size_keys"
            )


def register_multimodal(multimodal: Multimodal) -> None:
    """Makes a model around a text model known; its text model's family is looked up by its text config.

    Raises:
        TypeError: `multimodal` is not a Multimodal.
    """
    if not isinstance(multimodal, Multimodal):
        raise TypeError(f"multimodal must be a Multimodal, got {type(multimodal).__name__}")
    for model_type in multimodal.model_types:
        _MULTIMODAL[model_type] = multimodal
        _FAMILIES.pop(model_type, None)


def known_families() -> tuple[str, ...]:
    """The known model types, those around a text model included."""
    return tuple(sorted({*_FAMILIES, *_MULTIMODAL}))


def family_of(config: Config) -> Family:
    """The family of a model with this config.

    Raises:
        ValueError: its model_type is not known: says what its models have that is not described, or how to
            describe it; names those that are known.
    """
    model_type = config_value(config, "model_type")
    if model_type in _FAMILIES:
        return _FAMILIES[model_type]
    if model_type in _MULTIMODAL:
        whole = _MULTIMODAL[model_type]
        try:
            inside = nested(config, whole.text_key)
            text = whole.inner.get(config_value(inside, "model_type")) or family_of(inside)
        except ValueError as error:
            raise ValueError(f"the {whole.text_key} of this {model_type}: {error}") from None
        key = id(whole), id(text)
        if key not in _AROUND:
            _AROUND[key] = whole, text, whole.around(text)
        return _AROUND[key][2]
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


def family_in(path: Path, config: Config) -> Family:
    """family_of() a config that is in a file.

    Raises:
        ValueError: it is not known, or its sizes are no numbers that a model can have; names the file.
    """
    try:
        family = family_of(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    try:
        family.sizes(as_dict(config))
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path}: its sizes must be whole numbers from 1 on: {error}") from None
    return family
