"""The model that transformers makes of a config, without memory: its names and shapes."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minitron_kernels.pruning.families.configs import Config, full_config
from minitron_kernels.pruning.families.registry import family_of

Model = TypeVar("Model", bound=nn.Module)
Shapes = dict[str, tuple[int, ...]]
_EXTRA_STATE = "_extra_state"  # the end of the name under which a state_dict() has what is no tensor


def skeleton(kind: type[Model], config: Any) -> Model:
    """A model of this class and config of transformers, without memory for its parameters.

    Raises:
        ValueError: transformers cannot make it; says why.
    """
    if isinstance(getattr(config, "dtype", None), str):  # as in config.json; some modules read it
        config = copy.copy(config)
        config.dtype = getattr(torch, config.dtype)
    try:
        with torch.device("meta"):
            return kind(config)
    except Exception as error:  # its checks and its arithmetic raise various errors
        raise ValueError(f"transformers cannot make a {kind.__name__} of its config: {error}") from error


def state_shapes(model: nn.Module) -> Shapes:
    """Names and shapes of a model's parameters and persistent buffers, including a tied head.

    What a module keeps beside them (get_extra_state()) is no tensor of the model; see check_no_extra_state().
    """
    state = model.state_dict().items()
    return {name: tuple(tensor.shape) for name, tensor in state if not name.endswith(_EXTRA_STATE)}


def check_no_extra_state(model: nn.Module) -> None:
    """Refuses a module that keeps something beside its tensors, which no table says how to cut.

    Raises:
        ValueError: a module's get_extra_state() gives something; names the module.
    """
    for name, module in model.named_modules():
        if type(module).get_extra_state is nn.Module.get_extra_state:
            continue
        state = module.get_extra_state()
        if state is not None and not (isinstance(state, Tensor) and state.numel() == 0):
            raise ValueError(
                f"model has a {type(module).__name__} {name!r} with an extra state ({type(state).__name__}, "
                "get_extra_state()), which is not cut with the weights and would be lost: put a module "
                "without one in its place"
            )


def expected_shapes(config: Config, *, stored: bool = False, headless: bool = False) -> Shapes:
    """Names and shapes of the tensors of a model with this config, from its family's table.

    The table is compared with the model that transformers makes of this config: tensors of these names and
    shapes are those that from_pretrained() looks for. Model types that transformers does not know are not
    compared.

    Args:
        config: the dict of a config.json, or a config of transformers.
        stored: whether to give names as in checkpoints, which hold experts one by one.
        headless: for the decoder alone, as AutoModel makes it; names are still those of the whole model.

    Raises:
        ValueError: transformers refuses the config, or its model differs from the table; names the first
            difference.
    """
    family = family_of(config)

    def table(stored: bool) -> Shapes:
        sizes = family.sizes(config)
        params = family.parameters(config, stored=stored)
        return {
            one.name: one.shape(sizes) for one in params if not (headless and family.is_in_head(one.name))
        }

    made = _made_by_transformers(config, headless)
    if made is not None:
        prefix = f"{family.layers.partition('.')[0]}." if headless else ""
        state = {f"{prefix}{name}": shape for name, shape in state_shapes(made).items()}
        parameters = {f"{prefix}{name}" for name, _ in made.named_parameters()}
        known = table(False)
        parameters = {name for name in parameters if name in known or not family.outside(name)}
        check_shapes(known, state, parameters, f"this {family.model_types[0]} config")
    return table(stored)


def check_outside(before: Config, after: Config) -> None:
    """Checks that what is outside of a text model, and does not follow it, has the same shapes in both.

    Raises:
        ValueError: a tensor has not; names it.
    """
    family = family_of(before)
    if family.text_key is None:
        return
    old, new = (_made_by_transformers(config, False) for config in (before, after))
    if old is None or new is None:
        return
    declared = {param.name for param in family.parameters(before)}
    shapes = state_shapes(new)
    for name, shape in state_shapes(old).items():
        if family.outside(name) and name not in declared and shapes.get(name) != shape:
            raise ValueError(
                f"{name} {list(shape)} becomes {shapes.get(name)} in the smaller model, but is not said to "
                f"follow the text model: register_multimodal() a Multimodal of {family.model_types[0]} whose "
                "params name it"
            )


def check_shapes(cut: Shapes, state: Shapes, parameters: set[str], what: str) -> None:
    """Checks that the tensors of a smaller model are those of its config.

    Args:
        cut: names and shapes of the smaller model's tensors.
        state: those of the parameters and persistent buffers that transformers makes of the config.
        parameters: names in `state` that are parameters, each of which must be in `cut`.
        what: the config, for error messages.

    Raises:
        ValueError: they differ; names the first difference.
    """
    for name, shape in cut.items():
        if name not in state:
            raise ValueError(f"{name} is not in the model that transformers makes from {what}")
        if state[name] != shape:
            raise ValueError(
                f"{name} would be {list(shape)}, but transformers makes it {list(state[name])} from {what}"
            )
    if missing := sorted(parameters - set(cut)):
        raise ValueError(f"{missing[0]}, which transformers makes from {what}, is missing")


def _made_by_transformers(config: Config, headless: bool) -> nn.Module | None:
    full = full_config(config)
    if full is None:
        return None
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_MAPPING,
    )

    whole = family_of(config).text_key is not None
    with_head = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if whole else MODEL_FOR_CAUSAL_LM_MAPPING
    kind: Any = (MODEL_MAPPING if headless else with_head).get(type(full), None)
    return None if kind is None else skeleton(kind, full)
