"""Reading configs: of transformers, or the dict in a config.json, which may leave keys out or say null."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

Config = Any  # a transformers config, or the dict in a checkpoint's config.json


def as_dict(config: Config) -> dict[str, Any]:
    """A config as config.json holds it: a copy that shares nothing."""
    return json.loads(_text(config))


def completed(config: Config) -> dict[str, Any]:
    """as_dict() of a config, with the keys that a config.json may leave out as transformers takes them."""
    try:
        full = full_config(config)
    except (
        ValueError
    ):  # a model that runs in memory only: then what is missing cannot be told, when it is needed
        full = None
    return as_dict(config if full is None else full)


def config_value(config: Config, key: str, default: Any = None) -> Any:
    """`key` of a config; `default` where there is no value. null is not a value.

    A key that a config.json leaves out, or sets to null, is what transformers makes of that: its class's
    default, or what its class infers from other keys. `default` is for what transformers does not know.

    Raises:
        ValueError: transformers refuses the config; says why.
    """
    value = written_value(config, key)
    if value is None and isinstance(config, Mapping):
        full = full_config(config)
        value = None if full is None else getattr(full, key, None)
    return default if value is None else value


def written_value(config: Config, key: str) -> Any:
    """`key` as it is written in the config; None where it is absent or null."""
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def full_config(config: Config) -> Config | None:
    """The config that transformers makes of the dict in a config.json; None if it lacks the model type.

    A null that transformers refuses counts as left out. A config of transformers is returned as it is; what
    is returned for a dict is shared by all that ask: it must not be changed.

    Raises:
        ValueError: transformers refuses the config; says why.
    """
    if not isinstance(config, Mapping):
        return config
    model_type = config.get("model_type")
    return _parsed(model_type, _text(config)) if isinstance(model_type, str) else None


@functools.lru_cache(maxsize=64)
def _parsed(model_type: str, text: str) -> Config | None:
    from transformers import CONFIG_MAPPING  # only configs that leave out what is needed cost this import

    if model_type not in CONFIG_MAPPING:
        return None
    entries = json.loads(text)
    try:
        try:
            return CONFIG_MAPPING[model_type].from_dict(entries)
        except Exception:
            there = {key: value for key, value in entries.items() if value is not None}
            if there == entries:
                raise
            return CONFIG_MAPPING[model_type].from_dict(there)
    except Exception as error:  # transformers raises what its checks or its arithmetic come upon
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers refuses the config of this {model_type}: {reason}") from error


def _text(config: Config) -> str:
    entries = dict(config) if isinstance(config, Mapping) else config.to_dict()
    return json.dumps(entries, default=lambda value: str(value).removeprefix("torch."))
