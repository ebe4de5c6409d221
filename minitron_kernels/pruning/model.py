"""prune_model(): a transformers model cut to a plan, in memory."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minitron_kernels.pruning.cuts import Cut, Cuts
from minitron_kernels.pruning.families import config_value, family_of
from minitron_kernels.pruning.pruning_plan import PruningPlan

Model = TypeVar("Model", bound=nn.Module)


def prune_model(
    model: Model, plan: PruningPlan, *, rescale_norms: bool = True, in_place: bool = False
) -> Model:
    """The smaller model of a plan, of the same class, with a config that transformers loads.

    Sizes, head_dim and what the config tells of each layer are written to the config; layers are numbered
    anew, for the KV cache as well; tied embeddings stay tied. Each parameter keeps its dtype, device and
    requires_grad, the model its mode (training or not) and its generation config; hooks are left behind.

    Under a plan that keeps everything each parameter is the same to the bit. Where neurons go whose down
    projection is zero, logits stay the same but for the rounding of sums that are taken in other steps. So
    they do where channels of the residual stream go that are zero for all tokens, if gains are rescaled, but
    for the norms' epsilon as well.

    Args:
        model: a causal language model of transformers, of a known family; quantized or adapted ones are not
            known. Unchanged unless in_place.
        plan: made for this model's config.
        rescale_norms: multiply norms' gains by the plan's factors; see make_plan().
        in_place: turn `model` itself into the smaller one: each weight is freed as soon as it is cut, so that
            beyond the model itself only one weight is held at a time. An optimizer that holds its parameters
            must be made anew. Nothing has changed where a check fails.

    Returns:
        The smaller model; with in_place, `model`.

    Raises:
        TypeError, ValueError: the plan is for another model, or the model has parameters that its family does
            not; names the first.

    Example:
        >>> plan = make_plan(scores, hidden_size=480, intermediate_size=1152, divisor=32)   # doctest: +SKIP
        >>> smaller = prune_model(model, plan)                                              # doctest: +SKIP
        >>> smaller.save_pretrained("smaller")                                              # doctest: +SKIP
    """
    if not isinstance(plan, PruningPlan):
        raise TypeError(f"plan must be a PruningPlan, got {type(plan).__name__}")
    if not isinstance(model, nn.Module) or not hasattr(model, "initialize_weights"):
        raise TypeError(f"model must be a model of transformers 5, got {type(model).__name__}")
    cuts = Cuts(plan, rescale_norms=rescale_norms)
    todo = _checked_cuts(model, cuts)
    config = _target_config(model.config, plan)
    smaller, buffers = _skeleton(type(model), config), _buffers(model, config, cuts)
    uses = Counter(id(model.get_parameter(name)) for name, _ in todo)
    for name, cut in todo:
        source = model.get_parameter(name)
        if cut is not None:
            value = cut.apply(source)
            _owner(smaller, cut.name)._parameters[_leaf(cut.name)] = nn.Parameter(
                value, requires_grad=source.requires_grad
            )
        uses[id(source)] -= 1
        if in_place and not uses[id(source)]:
            source.data = source.data.new_empty(0)
    for name, value in buffers.items():
        _owner(smaller, name)._buffers[_leaf(name)] = value
    smaller.tie_weights()  # type: ignore[operator]
    smaller.train(model.training)
    if getattr(model, "generation_config", None) is not None:
        smaller.generation_config = copy.deepcopy(model.generation_config)
    if not in_place:
        return smaller
    vars(model).clear()
    vars(model).update(vars(smaller))
    return model


def _checked_cuts(model: nn.Module, cuts: Cuts) -> list[tuple[str, Cut | None]]:
    """Each parameter's name and cut, once it is sure that the plan is for this model."""
    planned, config = cuts.plan.source_config, model.config
    for kind in ("model_type", "tie_word_embeddings"):
        if config_value(config, kind) != config_value(planned, kind) and kind in planned:
            raise ValueError(
                f"plan is for a model with {kind} {planned[kind]!r}, got {config_value(config, kind)!r}"
            )
    sizes = family_of(config).sizes(config)
    for axis, size in cuts.source.items():
        if sizes.get(axis) != size:
            raise ValueError(f"plan is for a model of {size} {axis}, got one of {sizes.get(axis)}")
    names = cuts.names()
    there = dict(model.named_parameters(remove_duplicate=False))
    if missing := [name for name in names if name not in there]:
        raise ValueError(f"model has no parameter {missing[0]!r}, which the plan's family has")
    tied = {f"{cuts.family.head}.weight"} if cuts.family.tied(config) else set()
    if unknown := sorted(set(there) - set(names) - tied):
        raise ValueError(f"model has a parameter {unknown[0]!r}, which the plan's family does not know")
    todo = [(name, cuts.of(name)) for name in names]
    for name, cut in todo:
        if cut is not None and tuple(there[name].shape) != cut.source_shape:
            raise ValueError(f"{name} must have the shape {cut.source_shape}, got {tuple(there[name].shape)}")
    return todo


def _target_config(config: Any, plan: PruningPlan) -> Any:
    """The model's own config, with what the plan changes in it."""
    target = copy.deepcopy(config)
    for key, value in plan.target_config.items():
        if key not in plan.source_config or plan.source_config[key] != value:
            setattr(target, key, copy.deepcopy(value))
    return target


def _skeleton(kind: type[Model], config: Any) -> Model:
    """A model of this config without memory for its parameters."""
    with torch.device("meta"):
        return kind(config)


def _buffers(model: nn.Module, config: Any, cuts: Cuts) -> dict[str, Tensor]:
    """The smaller model's buffers: the model's own, unless their value follows from a size that changed."""
    old, new = _fresh_buffers(type(model), model.config), _fresh_buffers(type(model), config)
    now, buffers = dict(model.named_buffers()), {}
    for name, value in new.items():
        source = cuts.source_module(name)
        if source not in now:
            raise ValueError(f"model has no buffer {source!r}, which others of its class have")
        mine = now[source]
        if source in old and _same(old[source], value):
            if mine.shape != value.shape:
                raise ValueError(
                    f"buffer {source!r} must have the shape {tuple(value.shape)}, got {tuple(mine.shape)}"
                )
            buffers[name] = mine.detach().clone()
        else:
            buffers[name] = value.to(mine.device, mine.dtype)
    return buffers


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _fresh_buffers(kind: type[nn.Module], config: Any) -> dict[str, Tensor]:
    """The buffers of a new model of this config, as from_pretrained() sets them; else NaN or 0."""
    made = _skeleton(kind, config)
    for name, buffer in list(made.named_buffers()):
        unset = float("nan") if buffer.is_floating_point() else 0
        _owner(made, name)._buffers[_leaf(name)] = torch.full_like(buffer, unset, device="cpu")
    made.initialize_weights()  # type: ignore[operator]
    return dict(made.named_buffers())


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
