"""prune_model(): a transformers model cut to a plan, in memory."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minitron_kernels.pruning.cut.cuts import Cut, Cuts
from minitron_kernels.pruning.cut.skeleton import check_shapes, skeleton, state_shapes
from minitron_kernels.pruning.families.family import TIE_KEY, Family
from minitron_kernels.pruning.families.names import family_names
from minitron_kernels.pruning.families.registry import family_of
from minitron_kernels.pruning.families.wrappers import unwrapped
from minitron_kernels.pruning.plan.pruning_plan import PruningPlan

Model = TypeVar("Model", bound=nn.Module)


def prune_model(
    model: Model, plan: PruningPlan, *, rescale_norms: bool = True, in_place: bool = False
) -> Model:
    """The smaller model of a plan, of the same class, with a config that transformers loads.

    Sizes, head_dim and what the config tells of each layer are written to the config; layers are numbered
    anew, for the KV cache as well. Whether the head is tied to the embedding is what the model's tensors say,
    and is written to the config where that says otherwise. Each parameter keeps its dtype, device and
    requires_grad, the model its mode (training or not) and its generation config; hooks are left behind.

    Under a plan that keeps everything each parameter is the same to the bit. Where neurons go whose down
    projection is zero, logits stay the same but for the rounding of sums that are taken in other steps. So
    they do where channels of the residual stream go that are zero for all tokens, if gains are rescaled, but
    for the norms' epsilon as well.

    Args:
        model: a causal language model of transformers, of a known family, or its decoder alone; of one in
            DistributedDataParallel or torch.compile the model inside is pruned. Unchanged unless in_place.
        plan: made for this model's config.
        rescale_norms: multiply norms' gains by the plan's factors; see make_plan().
        in_place: turn `model` itself into the smaller one, and free the weights that it had, whoever else
            holds them: an optimizer of them must be made anew. Both are in memory until all is cut, so that
            nothing has changed where anything fails; prune_checkpoint() takes no model in memory at all.

    Returns:
        The smaller model; with in_place, `model`.

    Raises:
        TypeError, ValueError: the plan is for another model; the model is quantised, adapted, offloaded,
            sharded, or has parameters or learned buffers that its family does not; transformers makes
            another model of the pruned config. Names the first, and says what to do.

    Warns:
        UserWarning: every parameter of the model is frozen, and so those of the smaller one are.

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
    places = {called: name for called, (name, _) in _named_tensors(smaller, cuts.family).items()}
    _check_result(smaller, places, todo)
    made = _buffers(source, smaller, cuts)
    for name, cut in todo:
        tensor = source.tensors[name]
        value = cut.apply(tensor)
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
        made[cut.name] = value
    for called, tensor in made.items():
        name = places[called]
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
        model: of transformers, out of torch's wrappers.
        tensors: its parameters and buffers, by the names that its family gives them.
        tied: whether its head is its embedding; in a decoder alone, as its config says.
    """

    model: Any
    tensors: dict[str, Tensor]
    tied: bool

    @classmethod
    def of(cls, model: Any, in_place: bool) -> _Source:
        """The model that was given, once it is one whose tensors can be cut."""
        inner = unwrapped(model)
        if not hasattr(inner, "initialize_weights"):
            raise TypeError(f"model must be a model of transformers 5, got {type(model).__name__}")
        if in_place and inner is not model:
            raise ValueError(
                f"in_place changes the model itself, which a {type(model).__name__} has prepared for: give "
                "the model inside, and wrap what comes back anew"
            )
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
        """Checks that the plan is for this model; ValueError."""
        planned, config = plan.source_config, self.model.config
        family = family_of(config)
        if config.model_type != planned["model_type"]:
            raise ValueError(
                f"plan is for a model with model_type {planned['model_type']!r}, got {config.model_type!r}"
            )
        tied = family.tied(planned)
        if tied not in (family.tied(config), self.tied):
            raise ValueError(f"plan is for a model with {TIE_KEY} {tied}, got {self.tied}")
        sizes, wanted = family.sizes(config), family.sizes(planned)
        for axis, size in wanted.items():
            if sizes.get(axis) != size:
                raise ValueError(f"plan is for a model of {size} {axis}, got one of {sizes.get(axis)}")

    def checked_cuts(self, cuts: Cuts) -> list[tuple[str, Cut]]:
        """The cuts of what stays, each with the name of what is cut; ValueError unless all fit."""
        names, head = cuts.names(), f"{cuts.family.head}.weight"
        if head not in self.tensors:
            names = [name for name in names if name != head]
        for name in names:
            if name not in self.tensors:
                raise ValueError(f"model has no parameter {name!r}, which the plan's family has")
        known = {*names, head} if cuts.tied else set(names)
        for name, tensor in sorted(self.tensors.items()):
            if isinstance(tensor, nn.Parameter) and name not in known:
                remedy = ": merge the adapters first" if ".lora_" in name else ""
                raise ValueError(
                    f"model has a parameter {name!r}, which the plan's family does not know{remedy}"
                )
        todo = []
        for name in names:
            cut = cuts.of(name)
            if cut is None:
                continue
            found = tuple(self.tensors[name].shape)
            if found != cut.source_shape:
                raise ValueError(f"{name} must have the shape {cut.source_shape}, got {found}")
            todo.append((name, cut))
        return todo


def _check_tensor(name: str, tensor: Tensor) -> None:
    """Checks that a tensor of the model has its elements at hand, and that they are numbers; ValueError."""
    instead = "load the whole model on one device, or prune its checkpoint by prune_checkpoint()"
    if tensor.is_meta:
        raise ValueError(f"{name} is offloaded: its values are not in memory. Take what is not: {instead}")
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
    """The model's own config, with what the plan changes in it, and the truth about its head."""
    target, plan = copy.deepcopy(source.model.config), cuts.plan
    for key, value in plan.target_config.items():
        if key not in plan.source_config or plan.source_config[key] != value:
            setattr(target, key, copy.deepcopy(value))
    if cuts.family.tied(target) != cuts.tied:
        setattr(target, TIE_KEY, cuts.tied)
    return target


def _check_result(smaller: nn.Module, places: dict[str, str], todo: list[tuple[str, Cut]]) -> None:
    """Checks that the cuts are what the smaller model's config asks for; ValueError."""
    shapes = state_shapes(smaller)
    state = {called: shapes[name] for called, name in places.items() if name in shapes}
    parameters = {name for name, _ in smaller.named_parameters()}
    wanted = {called for called, name in places.items() if name in parameters}
    check_shapes({cut.name: cut.shape for _, cut in todo}, state, wanted, "the pruned config")


def _buffers(source: _Source, smaller: nn.Module, cuts: Cuts) -> dict[str, Tensor]:
    """The smaller model's buffers that the family does not cut, by the family's names for them.

    They are the model's own, unless their value follows from a size that changed.

    Raises:
        ValueError: a buffer that others of its class have is not there, or is stored with the weights but
            neither stays nor follows from the config: it was learned, and would be lost.
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
    """Whether a buffer has the values of a fresh one, as its dtype and device hold them; NaN is NaN."""
    if fresh is None or mine.shape != fresh.shape:
        return False
    return torch.allclose(mine, fresh.to(mine), rtol=0, atol=0, equal_nan=True)


def _fresh_buffers(kind: type[nn.Module], config: Any, family: Family) -> dict[str, tuple[str, Tensor]]:
    """The buffers of a new model of this config, as from_pretrained() sets them; else NaN or 0.

    Each has its name in the model beside it, and the family's name as its key.
    """
    made = skeleton(kind, config)
    for name, buffer in list(made.named_buffers()):
        unset = float("nan") if buffer.is_floating_point() else 0
        _owner(made, name)._buffers[_leaf(name)] = torch.full_like(buffer, unset, device="cpu")
    made.initialize_weights()  # type: ignore[operator]
    named = _named_tensors(made, family).items()
    return {called: (name, t) for called, (name, t) in named if not isinstance(t, nn.Parameter)}


def _named_tensors(model: nn.Module, family: Family) -> dict[str, tuple[str, Tensor]]:
    """All parameters and buffers with their names, by the names that the family gives them."""
    there = dict(model.named_parameters(remove_duplicate=False))
    there |= dict(model.named_buffers(remove_duplicate=False))  # type: ignore[arg-type]
    return {called: (name, there[name]) for name, called in family_names(there, family).items()}


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
