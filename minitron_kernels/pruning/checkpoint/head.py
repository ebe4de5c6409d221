"""Finds the output layer among the tensors of a checkpoint, also where it is tied to the embedding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from minitron_kernels.pruning.checkpoint.matching import is_class_of_base
from minitron_kernels.pruning.checkpoint.safetensors_files import SourceFolder, StoredTensor
from minitron_kernels.pruning.cut.skeleton import skeleton
from minitron_kernels.pruning.families.configs import full_config
from minitron_kernels.pruning.families.family import Family
from minitron_kernels.pruning.families.names import family_names
from minitron_kernels.pruning.families.registry import family_of

_USUAL = "lm_head.weight"  # in checkpoints of models that nobody here knows


def stored_head(source: SourceFolder, config: Mapping[str, Any]) -> tuple[StoredTensor, StoredTensor | None]:
    """(weight [V, H], bias) of a checkpoint's output layer; the embedding where the head is tied to it.

    The name is that of the model's family. For other model types it is asked of the model that transformers
    makes of the config.

    Args:
        source: the checkpoint's weights.
        config: its config.json, or {}.

    Raises:
        ValueError: there is none, as in the checkpoint of a decoder alone whose head is not tied.
    """
    try:
        family = family_of(config)
    except ValueError:
        family = None
    try:
        found = _by_model(source, config) if family is None else _by_family(source, config, family)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from None
    if found is None:
        raise ValueError(
            f"{source.path}: has no output layer that its {config.get('model_type')} model is known to have"
        )
    return found


def _by_family(
    source: SourceFolder, config: Mapping[str, Any], family: Family
) -> tuple[StoredTensor, StoredTensor | None] | None:
    tensors = {called: source.tensors[name] for name, called in family_names(source.tensors, family).items()}
    weight = tensors.get(f"{family.head}.weight")
    # of two tied tensors one is stored, whatever the config says; a decoder alone has lost its own head
    if weight is None and (family.tied(config) or not is_class_of_base(config)):
        weight = tensors.get(f"{family.embedding}.weight")
    return None if weight is None else (weight, tensors.get(f"{family.head}.bias"))


def _by_model(
    source: SourceFolder, config: Mapping[str, Any]
) -> tuple[StoredTensor, StoredTensor | None] | None:
    names, biases = _names_of_head(config)
    weight = next((source.tensors[name] for name in names if name in source.tensors), None)
    bias = next((source.tensors[name] for name in biases if name in source.tensors), None)
    return None if weight is None else (weight, bias)


def _names_of_head(config: Mapping[str, Any]) -> tuple[Iterable[str], Iterable[str]]:
    """The names that the head's weight and its bias have in the model that transformers makes."""
    full = full_config(config)
    if full is None:
        return (_USUAL,), (_USUAL.replace("weight", "bias"),)
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    kinds = MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    kind: Any = next((mapping[type(full)] for mapping in kinds if type(full) in mapping), None)
    made: Any = None if kind is None else skeleton(kind, full)
    head = None if made is None else made.get_output_embeddings()
    if not isinstance(head, nn.Module):
        return (), ()
    made.tie_weights()
    there = list(made.named_parameters(remove_duplicate=False))
    wanted = head.weight, getattr(head, "bias", None)
    weights, biases = ([name for name, part in there if part is one] for one in wanted)
    return weights, biases
