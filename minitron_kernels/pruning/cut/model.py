"""prune_model(): a transformers model cut to a plan, in memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minitron_kernels.pruning.cut.cuts import Cut, Cuts
from minitron_kernels.pruning.cut.skeleton import check_no_extra_state, check_shapes, skeleton, state_shapes
from minitron_kernels.pruning.families.configs import config_value, written_value
from minitron_kernels.pruning.families.family import TIE_KEY, Family
from minitron_kernels.pruning.families.names import family_names
from minitron_kernels.pruning.families.registry import family_of
from minitron_kernels.pruning.families.wrappers import unwrapped
from minitron_kernels.pruning.plan.checks import other_layers
from minitron_kernels.pruning.plan.pruning_plan import PruningPlan

Model = TypeVar("Model", bound=nn.Module)


def prune_model(
    model: Model, plan: PruningPlan, *, rescale_norms: bool = True, in_place: bool = False
) -> Model:
    """The smaller model of a plan, of the same class, with a config that transformers loads.

    Sizes, head_dim and the entries of each layer are written to the config; layers are renumbered, also for
    the KV cache. Whether the head is tied to the embedding is decided by the model's tensors, and the config
    is corrected where it says otherwise. Each parameter keeps its dtype, device and requires_grad; the model
    keeps its mode (training or not) and its generation config, but no hooks.

    Under a plan that keeps everything, each parameter is the same to the bit. If the dropped neurons have a
    down projection of zero, logits are the same up to rounding. If the dropped channels of the residual
    stream are zero for all tokens, and gains are rescaled, they are the same up to rounding and the norms'
    epsilon.

    Args:
        model: a causal language model of transformers, of a known family, or its decoder alone. If it is in
            DistributedDataParallel or torch.compile, the model inside is pruned. Unchanged unless in_place.
        plan: made for this model's config.
        rescale_norms: multiply norms' gains by the plan's factors; see make_plan().
        in_place: turn `model` itself into the smaller one and free its old weights, even if others refer to
            them: an optimizer must be created anew. Both models are in memory until everything is cut, so
            that an error leaves `model` unchanged. prune_checkpoint() needs no model in memory.

    Returns:
        The smaller model; with in_place, `model`.

    Raises:
        TypeError, ValueError: the plan is for another model; the model is quantised, has adapters, is
            offloaded or sharded, or has parameters, learned buffers or extra states that its family does not
            declare;
            transformers makes another model of the pruned config. Names the first, and says what to do.

    Warns:
        UserWarning: all parameters of the model are frozen, and so are those of the smaller one.

    Example:
        >>> plan = make_plan(scores, hidden_size=480, intermediate_size=1152, divisor=32)   # doctest: +SKIP
        >>> smaller = prune_model(model, plan)                                              # doctest: +SKIP
        >>> smaller.save_pretrained("smaller")                                              # doctest: +SKIP
    """
    if not isinstance(plan, PruningPlan):
        raise TypeError(f"plan must be a PruningPlan, got {type(plan).__name__}")
    source = _Source.of(model, in_place)
    source.check_plan(plan)
    cuts = Cuts(plan, rescale_norms=rescale_norms, tied=source.tied)
    smaller = skeleton(type(source.model), _target_config(source, cuts))
    todo = source.checked_cuts(cuts)
    names = {called: name for called, (name, _) in _named_tensors(smaller, cuts.family).items()}
    _check_result(smaller, names, todo)
    made = _buffers(source, smaller, cuts)
    for name, cut in todo:
        tensor = source.tensors[name]
        value = cut.apply(tensor)
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
        made[cut.name] = value
    for called, tensor in made.items():
        name = names[called]
        owner = _owner(smaller, name)
        inside: Any = owner._parameters if isinstance(tensor, nn.Parameter) else owner._buffers
        inside[_leaf(name)] = tensor
    smaller.tie_weights()
    smaller.train(source.model.training)
    if getattr(source.model, "generation_config", None) is not None:
        smaller.generation_config = copy.deepcopy(source.model.generation_config)
    if not any(parameter.requires_grad for parameter in smaller.parameters()):
        warnings.warn(
            "every parameter of the model is frozen, and so are those of the smaller one: "
            "smaller.requires_grad_(True) makes it ready for training",
            stacklevel=2,
        )
    if not in_place:
        return smaller
    old = list(model.parameters())
    vars(model).clear()
    vars(model).update(vars(smaller))
    for parameter in old:
        parameter.data = parameter.data.new_empty(0)
    return model


@dataclass(frozen=True)
class _Source:
    """The model to be pruned.

    Args:
        model: of transformers, without torch's wrappers.
        tensors: its parameters and buffers, by their names in the family's table.
        tied: whether its head is tied to its embedding; for a decoder alone, as its config says.
    """

    model: Any
    tensors: dict[str, Tensor]
    tied: bool

    @classmethod
    def of(cls, model: Any, in_place: bool) -> _Source:
        """From the model that was given; checks that its tensors can be cut."""
        inner = unwrapped(model)
        if not hasattr(inner, "initialize_weights"):
            raise TypeError(f"model must be a model of transformers 5, got {type(model).__name__}")
        if in_place and inner is not model:
            raise ValueError(
                f"in_place cannot change a model inside a {type(model).__name__}, which holds its old "
                "parameters: give the model inside, and wrap the result anew"
            )
        check_no_extra_state(inner)
        family = family_of(inner.config)
        named = _named_tensors(inner, family)
        for name, tensor in named.values():
            _check_tensor(name, tensor)
        tensors = {called: tensor for called, (_, tensor) in named.items()}
        head = tensors.get(f"{family.head}.weight")
        embedding = tensors.get(f"{family.embedding}.weight")
        tied = family.tied(inner.config) if head is None else _is_same(head, embedding)
        return cls(inner, tensors, tied)

    def check_plan(self, plan: PruningPlan) -> None:
        """Checks that the plan is for this model; raises ValueError."""
        planned, config = plan.source_config, self.model.config
        family = family_of(config)
        for part in (lambda config: config, family.text):
            here, there = (config_value(part(each), "model_type") for each in (config, planned))
            if here != there:
                raise ValueError(f"plan is for a model with model_type {there!r}, got {here!r}")
        tied = family.tied(planned)
        if tied not in (family.tied(config), self.tied):
            raise ValueError(f"plan is for a model with {TIE_KEY} {tied}, got {self.tied}")
        sizes, wanted = family.sizes(config), family.sizes(planned)
        for axis, size in wanted.items():
            if sizes.get(axis) != size:
                raise ValueError(f"plan is for a model of {size} {axis}, got one of {sizes.get(axis)}")
        if differ := other_layers(family, config, planned):
            raise ValueError(f"plan is for a model with other layers: its {differ}")

    def checked_cuts(self, cuts: Cuts) -> list[tuple[str, Cut]]:
        """(name of the tensor, its cut) for each that stays; raises ValueError unless all fit."""
        names, head = cuts.names(), f"{cuts.family.head}.weight"
        if head not in self.tensors:  # a decoder alone
            names = [name for name in names if not cuts.family.is_in_head(name)]
        for name in names:
            if name not in self.tensors:
                raise ValueError(f"model has no parameter {name!r}, which the plan's family has")
        known = {*names, head} if cuts.tied else set(names)
        for name, tensor in sorted(self.tensors.items()):
            if isinstance(tensor, nn.Parameter) and name not in known and not cuts.family.outside(name):
                remedy = ": merge the adapters first" if ".lora_" in name else ""
                raise ValueError(
                    f"model has a parameter {name!r}, which the plan's family does not know{remedy}"
                )
        todo = [] if cuts.family.text_key is None else self._outside(cuts)
        for name in names:
            cut = cuts.of(name)
            if cut is None:
                continue
            found = tuple(self.tensors[name].shape)
            if found != cut.source_shape:
                raise ValueError(f"{name} must have the shape {cut.source_shape}, got {found}")
            todo.append((name, cut))
        return todo

    def _outside(self, cuts: Cuts) -> list[tuple[str, Cut]]:
        """(name, copy) of each parameter outside of the text model that does not follow it."""
        there = {name: t for name, t in self.tensors.items() if isinstance(t, nn.Parameter)}
        copies = {name: cuts.untouched(name, tuple(tensor.shape)) for name, tensor in there.items()}
        return [(name, copy) for name, copy in copies.items() if copy is not None]


def _check_tensor(name: str, tensor: Tensor) -> None:
    """Checks that a tensor's values are in memory and are plain numbers; raises ValueError."""
    instead = "load the whole model on one device, or prune its checkpoint by prune_checkpoint()"
    if tensor.is_meta:
        raise ValueError(f"{name} is offloaded: its values are not in memory: {instead}")
    if type(tensor.data) is not Tensor:
        raise ValueError(
            f"{name} is a {type(tensor.data).__name__}, sharded or quantised, which cannot be cut: {instead}"
        )
    if isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
        raise ValueError(
            f"{name} is quantised, to {tensor.dtype}, and its scales would no longer fit: prune the model "
            "that it was made from"
        )


def _is_same(one: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors of one shape are the same memory."""
    if other is None or one is other:
        return one is other
    return (
        one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and one.device == other.device
        and one.numel() > 0
        and one.data_ptr() == other.data_ptr()
    )


def _target_config(source: _Source, cuts: Cuts) -> Any:
    """The model's own config with the plan's changes, and with tie_word_embeddings as the tensors have it."""
    target, plan = copy.deepcopy(source.model.config), cuts.plan
    _change(target, plan.source_config, plan.target_config)
    if cuts.family.tied(target) != cuts.tied:
        for part in {id(part): part for part in (target, cuts.family.text(target))}.values():
            setattr(part, TIE_KEY, cuts.tied)
    return target


def _change(config: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Writes the entries that differ to a config, and to the configs in it."""
    for key, value in after.items():
        inside, old = written_value(config, key), before.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and hasattr(inside, "to_dict"):
            _change(inside, old, value)
        elif key not in before or old != value:
            setattr(config, key, copy.deepcopy(value))


def _check_result(smaller: nn.Module, names: dict[str, str], todo: list[tuple[str, Cut]]) -> None:
    """Checks that the cuts give the tensors of the smaller model's config; raises ValueError.

    names: {name in the family's table: name in the smaller model}.
    """
    shapes = state_shapes(smaller)
    state = {called: shapes[name] for called, name in names.items() if name in shapes}
    parameters = {name for name, _ in smaller.named_parameters()}
    wanted = {called for called, name in names.items() if name in parameters}
    check_shapes({cut.name: cut.shape for _, cut in todo}, state, wanted, "the pruned config")


def _buffers(source: _Source, smaller: nn.Module, cuts: Cuts) -> dict[str, Tensor]:
    """The smaller model's buffers that the family does not cut, by their names in the family's table.

    They are copied from the model, unless their values follow from a size that has changed.

    Raises:
        ValueError: a buffer is missing that other models of this class have, or a buffer is stored with the
            weights but can neither be copied nor follows from the config: its learned values would be lost.
    """
    kind, declared = type(source.model), set(cuts.names())
    old, new = (_fresh_buffers(kind, model.config, cuts.family) for model in (source.model, smaller))
    learned = set(state_shapes(smaller))
    buffers: dict[str, Tensor] = {}
    for called, (name, value) in new.items():
        origin = cuts.source_module(called)
        if origin in declared:
            continue
        if origin not in source.tensors:
            raise ValueError(f"model has no buffer {origin!r}, which others of its class have")
        mine, before = source.tensors[origin], old[origin][1] if origin in old else None
        if _same(value, before):
            if mine.shape != value.shape:
                raise ValueError(
                    f"buffer {origin!r} must have the shape {tuple(value.shape)}, got {tuple(mine.shape)}"
                )
            buffers[called] = mine.detach().clone()
        elif name in learned and (mine.shape != value.shape or not _same(mine, before)):
            raise ValueError(
                f"buffer {origin!r} {list(mine.shape)} is stored with the weights, and its values would be "
                f"lost where it becomes {list(value.shape)}: register_family() a Family with "
                "Param(..., buffer=True) that says by which axes it is cut"
            )
        else:
            buffers[called] = value.to(mine.device, mine.dtype)
    return buffers


def _same(mine: Tensor, fresh: Tensor | None) -> bool:
    """Whether a buffer has the values of a fresh one, in its own dtype; NaN equals NaN."""
    if fresh is None or mine.shape != fresh.shape:
        return False
    return torch.allclose(mine, fresh.to(mine), rtol=0, atol=0, equal_nan=True)


def _fresh_buffers(kind: type[nn.Module], config: Any, family: Family) -> dict[str, tuple[str, Tensor]]:
    """{name in the family's table: (name in the model, buffer)} of a new model with this config.

    Buffers have the values that from_pretrained() sets; those that it does not set are NaN or 0.
    """
    made = skeleton(kind, config)
    for name, buffer in list(made.named_buffers()):
        unset = float("nan") if buffer.is_floating_point() else 0
        _owner(made, name)._buffers[_leaf(name)] = torch.full_like(buffer, unset, device="cpu")
    made.initialize_weights()  # type: ignore[operator]
    named = _named_tensors(made, family).items()
    return {called: (name, t) for called, (name, t) in named if not isinstance(t, nn.Parameter)}


def _named_tensors(model: nn.Module, family: Family) -> dict[str, tuple[str, Tensor]]:
    """{name in the family's table: (name in the model, tensor)} of all parameters and buffers."""
    there = dict(model.named_parameters(remove_duplicate=False))
    there |= dict(model.named_buffers(remove_duplicate=False))  # type: ignore[arg-type]
    return {called: (name, there[name]) for name, called in family_names(there, family).items()}


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
