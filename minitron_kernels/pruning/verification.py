"""Whether a checkpoint's tensors are those of the model that its own config makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from minitron_kernels.pruning.families import Family, family_of
from minitron_kernels.pruning.matching import is_headless, plain_names

Shapes = Mapping[str, tuple[int, ...]]


def check_against_config(shapes: Shapes, config: Mapping[str, Any], where: object) -> None:
    """Compares names and shapes of stored tensors with what `config` makes of them.

    The family's table says what is stored; where transformers knows and loads the config, its model says what
    there is. These two must agree, and with the tensors.

    Args:
        shapes: of the tensors, by the names in the checkpoint.
        config: what stands in the config.json beside them.
        where: named in errors.

    Raises:
        ValueError: they differ; names the first parameter that does.
    """
    family = family_of(config)
    plain, base = plain_names(shapes, family)
    found = {inside: shapes[name] for name, inside in plain.items()}
    in_model = _table(family, config, stored=False)
    if family.refuses(config) is None:
        _compare(skeleton_shapes(config, family), in_model, "the model that transformers makes of it", where)
    stored = not set(in_model) - {f"{family.head}.weight"} <= set(found)
    expected = _table(family, config, stored=stored)
    if is_headless(config, base):
        expected.pop(f"{family.head}.weight", None)
    _compare(expected, found, "a model of this config", where)


def _table(family: Family, config: Mapping[str, Any], *, stored: bool) -> dict[str, tuple[int, ...]]:
    sizes = family.sizes(config)
    return {param.name: param.shape(sizes) for param in family.parameters(config, stored=stored)}


def skeleton_shapes(config: Mapping[str, Any], family: Family) -> Shapes | None:
    """Names and shapes of the parameters of transformers' model of a config, but a tied head.

    Returns:
        None where transformers does not know the model type.

    Raises:
        ValueError: transformers refuses the config.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if config["model_type"] not in CONFIG_MAPPING:
        return None
    try:
        parsed = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(parsed)
    except Exception as error:  # whatever its checks or its arithmetic come upon
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers refuses the config of the result: {reason}") from None
    tied = f"{family.head}.weight" if family.tied(parsed) else None
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name != tied
    }


def _compare(wanted: Shapes | None, found: Shapes, of: str, where: object) -> None:
    for name in sorted({*(wanted or ()), *found}) if wanted is not None else ():
        if wanted.get(name) != found.get(name):
            there, here = (list(s[name]) if name in s else "none" for s in (wanted, found))
            raise ValueError(
                f"{where}: the result would not load from its own config.json: {of} has {name} of shape "
                f"{there}, and the cut makes {here}. The plan does not fit this checkpoint; if it was made "
                "for it, that is a fault of minitron_kernels"
            )
