"""Reads configs: objects of transformers, or the dict in a config.json, where keys may be absent or null."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

# older names of kinds of layers, which transformers replaces when it reads a config
OLDER_KINDS = {"mamba": "linear_attention", "attention": "full_attention"}

Config = Any  # a transformers config, or the dict in a checkpoint's config.json


def as_dict(config: Config) -> dict[str, Any]:
    """A config as the dict that config.json holds; a deep copy."""
    return json.loads(_text(config))


def completed(config: Config) -> dict[str, Any]:
    """as_dict() of a config, with transformers' values for the keys that a config.json may leave out.

    Raises:
        ValueError: see check_names().
    """
    check_names(config)
    try:
        full = full_config(config)
    except ValueError:  # transformers refuses it, but the model may exist in memory: use what is written
        full = None
    return as_dict(config if full is None else full)


def config_value(config: Config, key: str, default: Any = None) -> Any:
    """`key` of a config; `default` where there is no value. null is not a value.

    A key that a config.json leaves out, or sets to null, has the value that transformers gives it: the
    default of its class, or what the class infers from other keys. `default` is used where transformers does
    not know the model type or the key.

    Raises:
        ValueError: transformers refuses the config; says why.
    """
    value = written_value(config, key)
    if value is None and isinstance(config, Mapping):
        full = full_config(config)
        value = None if full is None else written_value(full, key)
    return default if value is None else value


def written_value(config: Config, key: str) -> Any:
    """`key` as it is written in the config; None where it is absent or null."""
    if isinstance(config, Mapping):
        return config.get(key)
    try:
        return getattr(config, key, None)
    except RuntimeError:  # transformers' for entries that some layers have for themselves: it is the others'
        return vars(config).get(key)


def nested(config: Config, key: str) -> Config:
    """The config under `key` of another, such as the text model's in that of a model for text and images.

    A dict may say less than transformers makes of it: its text config may lack a model_type, or be absent,
    with all its entries in the dict itself. What transformers makes of them is then returned.
    """
    inside = written_value(config, key)
    if not isinstance(config, Mapping) or (isinstance(inside, Mapping) and inside.get("model_type")):
        return inside
    made = getattr(full_config(config), key, None)
    if made is None:
        raise ValueError(f"config must have {key} with a model_type, got {inside!r:.80}")
    return made


def full_config(config: Config) -> Config | None:
    """The config that transformers makes of the dict in a config.json; None for unknown model types.

    If transformers refuses a null, the key is treated as left out. A config of transformers is returned as it
    is. The config that is returned for a dict is shared by all callers and must not be changed.

    Raises:
        ValueError: transformers refuses the config; says why.
    """
    if not isinstance(config, Mapping):
        return config
    model_type = config.get("model_type")
    return _parsed(model_type, _text(config)) if isinstance(model_type, str) else None


def other_names(config: Config) -> Mapping[str, str]:
    """{other name of a key: its own name} of a config's keys, which transformers reads by both.

    Checkpoints may have either: Qwen3-MoE's "num_experts" is transformers' "num_local_experts".
    """
    from transformers import CONFIG_MAPPING  # slow

    model_type = written_value(config, "model_type")
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    return CONFIG_MAPPING[model_type].attribute_map if known else {}


def check_names(config: Config) -> None:
    """Refuses a config.json that gives an entry under both of its names, at different values.

    transformers reads both and takes one of the values. A config of transformers has each entry once.

    Raises:
        ValueError: there is such an entry; names both keys.
    """
    if not isinstance(config, Mapping):
        return
    for other, own in other_names(config).items():
        here, there = config.get(own), config.get(other)
        if None not in (here, there) and newer_kinds(here) != newer_kinds(there):
            raise ValueError(
                f"the config has {own} {here!r:.80}, and {other} {there!r:.80}, which is another name of the "
                "same: leave out the one that is wrong"
            )
    for inside in config.values():
        check_names(inside)


def of_layers_alone(config: Config) -> tuple[str, ...]:
    """The keys of what some layers have for themselves, in an entry per_layer_config; () where none has."""
    if isinstance(config, Mapping):
        entries = config.get("per_layer_config")
        inside = entries.values() if isinstance(entries, Mapping) else ()
        return tuple(sorted({str(key) for layer in inside if isinstance(layer, Mapping) for key in layer}))
    return tuple(sorted(getattr(config, "per_layer_attributes", None) or ()))


def newer_kinds(value: Any) -> Any:
    """A config's value, with the new names of kinds of layers."""
    if not isinstance(value, (list, tuple)):
        return value
    return [OLDER_KINDS.get(one, one) if isinstance(one, str) else one for one in value]


@functools.lru_cache(maxsize=64)
def _parsed(model_type: str, text: str) -> Config | None:
    from transformers import CONFIG_MAPPING  # slow; needed only for configs that leave keys out

    if model_type not in CONFIG_MAPPING:
        return None
    entries = json.loads(text, object_hook=_plain_float)
    try:
        try:
            return CONFIG_MAPPING[model_type].from_dict(entries)
        except Exception:
            there = {key: value for key, value in entries.items() if value is not None}
            if there == entries:
                raise
            return CONFIG_MAPPING[model_type].from_dict(there)
    except Exception as error:  # its checks and its arithmetic raise various errors
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers refuses the config of this {model_type}: {reason}") from error


def _plain_float(entry: dict[str, Any]) -> Any:
    """A number that transformers writes to config.json as {"__float__": "Infinity"}, as it reads it again."""
    return float(entry["__float__"]) if set(entry) == {"__float__"} else entry


def _text(config: Config) -> str:
    entries = dict(config) if isinstance(config, Mapping) else config.to_dict()
    return json.dumps(entries, default=lambda value: str(value).removeprefix("torch."))
