"""Hooks on a model: its modules by the table of its family, hooks on them, and their removal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minitron_kernels.ops.importance.state import ImportanceState, TokenMeanState
from minitron_kernels.pruning.families.family import Family
from minitron_kernels.pruning.families.registry import family_of
from minitron_kernels.pruning.families.wrappers import (
    COMPILED,
    is_offloaded,
    parameters_without_data,
    unwrapped,
)
from minitron_kernels.pruning.score.expert_hooks import ExpertsHook
from minitron_kernels.pruning.score.recorder import Recorder
from minitron_kernels.pruning.score.scores import AXES, ENERGY, Axis, ImportanceScores, Options


class HookedModel:
    """A Hugging Face decoder, and what can be scored in it.

    Args:
        model: the causal language model or its decoder alone, plain or in DistributedDataParallel, compiled,
            or under FSDP2.

    Raises:
        TypeError: it has no config.
        ValueError: its family is not known, or the family's modules are not there; it has adapters, or
            parameters without data that nobody fetches.
    """

    def __init__(self, model: Any) -> None:
        self.root = unwrapped(model)
        self.config: Any = self.root.config
        self.family: Family = family_of(self.config)
        self.sizes = self.family.sizes(self.config)
        decoder = self.family.layers.rpartition(".")[0]
        self._prefix = f"{decoder}." if decoder else ""
        try:
            self.decoder = _original(self.root.get_submodule(decoder))
        except AttributeError:  # the decoder alone, AutoModel's: then names in it lack the prefix
            self.decoder = self.root
        layers = range(self.sizes["layers"])
        self.sparse = tuple(i for i in layers if self.family.is_sparse(self.config, i))
        self.dense = tuple(i for i in layers if i not in self.sparse)
        _check_data(self.root)

    @property
    def axes(self) -> tuple[str, ...]:
        """Those of AXES that the model has."""
        taps = self.family.taps
        have = {"hidden", "heads", "layers"}
        if self.dense and taps.mlp_down is not None:
            have.add("mlp")
        if self.sparse and taps.experts is not None:
            have |= {"experts", "expert_mlp"}
        return tuple(axis for axis in AXES if axis in have)

    def module(self, name: str, axis: str) -> nn.Module:
        """A module by its name in the causal language model.

        Raises:
            ValueError: it is not there; says how to name another.
        """
        try:
            return _original(self.decoder.get_submodule(name.removeprefix(self._prefix)))
        except AttributeError:
            raise ValueError(
                f"the model has no module {name}, where the family {self.family.model_types[0]!r} taps "
                f"{axis!r}: pass register_family() a Family whose Taps name the modules of "
                f"{type(self.root).__name__}"
            ) from None

    def layer(self, index: int, tap: str | None, axis: str) -> tuple[str, nn.Module]:
        """(name, module) of a tap in a layer; the layer itself without a tap."""
        if tap is None:
            raise ValueError(
                f"the family {self.family.model_types[0]!r} does not say where {axis!r} is tapped: see "
                "minitron_kernels.pruning.families.family.Taps"
            )
        name = f"{self.family.layers}.{index}{'.' if tap else ''}{tap}"
        return name, self.module(name, axis)

    def norms(self, names: Sequence[str]) -> tuple[str, ...]:
        """Norms of all layers in the order of the forward pass, and the final one."""
        layers = range(self.sizes["layers"])
        inside = [f"{self.family.layers}.{i}.{name}" for i in layers for name in names]
        return (*inside, self.family.final_norm)

    def empty_scores(self, axes: Sequence[str], options: Options) -> ImportanceScores:
        """Scores of nothing yet. `axes` are some of self.axes."""
        sizes, taps, places = self.sizes, self.family.taps, tuple(range(self.sizes["layers"]))
        made: dict[str, Axis] = {}

        def channels(
            name: str, at: tuple[Any, ...], width: int, seq: tuple[str, ...], experts: int = 1
        ) -> None:
            groups = len(at) * experts
            state = ImportanceState(groups * width, seq=seq, groups=groups)
            made[name] = Axis(state, at, experts if name == "expert_mlp" else None)

        for axis in axes:
            if axis == "hidden":
                channels(axis, self.norms(taps.scored_norms), sizes["hidden"], options.seq)
                channels(ENERGY, self.norms(taps.norms), sizes["hidden"], ("L2",))
            elif axis == "mlp":
                channels(axis, self.dense, sizes["mlp"], options.seq)
            elif axis == "heads":
                per_head = sizes["head_dim"] if options.head_score == "channels" else 1
                channels(axis, places, sizes["heads"] * per_head, options.seq)
            elif axis == "layers":
                made[axis] = Axis(TokenMeanState(len(places)), places)
            elif axis == "experts":
                made[axis] = Axis(
                    TokenMeanState(len(self.sparse) * sizes["experts"]), self.sparse, sizes["experts"]
                )
            else:
                channels(axis, self.sparse, sizes["expert_mlp"], options.seq, sizes["experts"])
        return ImportanceScores(self.config.to_dict(), made, options=options, head_count=sizes["heads"])

    @contextlib.contextmanager
    def hooked(self, recorder: Recorder) -> Iterator[None]:
        """The model in eval mode, with hooks that feed the recorder; afterwards as it was, come what may."""
        modes = [(module, module.training) for module in self.root.modules()]
        handles: list[Any] = []
        try:
            self._hook(recorder, handles)
            self.root.eval()
            with _uncompiled(self.root):
                yield
        finally:
            for handle in handles:
                handle.remove()
            for module, training in modes:
                module.training = training

    def _hook(self, recorder: Recorder, handles: list[Any]) -> None:
        axes, taps, options = recorder.scores.axes, self.family.taps, recorder.scores.options
        if "hidden" in axes:
            width = self.sizes["hidden"]
            energies, scored = (
                {place: i for i, place in enumerate(axes[axis].places)} for axis in (ENERGY, "hidden")
            )
            for place in energies | scored:
                tap = _norm_tap(recorder, str(place), energies.get(place), scored.get(place), width)
                handles.append(self.module(str(place), "hidden").register_forward_hook(tap))
        for i, layer in enumerate(axes["mlp"].places if "mlp" in axes else ()):
            if options.mlp_tap == "down_proj_input":
                name, module = self.layer(int(layer), taps.mlp_down, "mlp")
                tap = _input_tap(recorder, name, "mlp", i, self.sizes["mlp"])
                handles.append(module.register_forward_pre_hook(tap))
            else:
                name, module = self.layer(int(layer), taps.mlp_up, "mlp")
                tap = _output_tap(recorder, name, "mlp", i, self.sizes["mlp"], taps.mlp_up_part)
                handles.append(module.register_forward_hook(tap))
        for i, layer in enumerate(axes["heads"].places if "heads" in axes else ()):
            name, module = self.layer(int(layer), taps.attention_out, "heads")
            num_heads = self.sizes["heads"] if options.head_score == "norm" else 0
            width = self.sizes["heads"] * self.sizes["head_dim"]
            tap = _input_tap(recorder, name, "heads", i, width, num_heads)
            handles.append(module.register_forward_pre_hook(tap))
        for i, layer in enumerate(axes["layers"].places if "layers" in axes else ()):
            _, module = self.layer(int(layer), "", "layers")
            handles.append(module.register_forward_hook(_block_tap(recorder, i), with_kwargs=True))
        experts = axes.get("experts", axes.get("expert_mlp"))
        for i, layer in enumerate(experts.places if experts else ()):
            name, module = self.layer(int(layer), taps.experts, "experts")
            self._check_experts(name, module)
            handles.append(module.register_forward_hook(ExpertsHook(recorder, i), with_kwargs=True))

    def _check_experts(self, name: str, module: nn.Module) -> None:
        sizes = self.sizes
        E, F, H = sizes["experts"], sizes["expert_mlp"], sizes["hidden"]
        for weight, shape in (("gate_up_proj", (E, 2 * F, H)), ("down_proj", (E, H, F))):
            found = getattr(module, weight, None)
            if not isinstance(found, Tensor) or tuple(found.shape) != shape:
                got = tuple(found.shape) if isinstance(found, Tensor) else "none"
                raise ValueError(
                    f"{name} must have {weight} {shape}, all experts' weights as Mixtral's, got {got}. Of "
                    "expert-parallel ranks score each one's experts by accumulate_expert_importance_() and "
                    "all_gather() the states"
                )


def _original(module: nn.Module) -> nn.Module:
    """A module that torch.compile() wraps: hooks belong to what it runs."""
    inner = module._modules.get(COMPILED)
    return module if inner is None else inner


def _check_data(model: nn.Module) -> None:
    """Parameters on the meta device are fetched by accelerate's hook on their module, or there are none."""
    modules = dict(model.named_modules())
    for name in parameters_without_data(model):
        owner = name.rpartition(".")[0]
        while owner and not (owner in modules and is_offloaded(modules[owner])):
            owner = owner.rpartition(".")[0]
        if not owner:
            raise ValueError(
                f"model must have its parameters' data, but {name} is on the meta device: load it by "
                "from_pretrained(), with device_map=... where it is too large for one device"
            )


@contextlib.contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """What torch.compile() made of parts of the model stands back: its graphs know nothing of new hooks."""
    compiled = any(
        COMPILED in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _check(recorder: Recorder, what: str, x: Any, width: int) -> None:
    wanted = (*recorder.tokens.shape, width)
    if not isinstance(x, Tensor) or x.shape != wanted:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"{what} must be {list(wanted)}, as the batch and the config say, got {got}. Of tensor-parallel "
            "ranks score each one's channels by accumulate_importance_() and all_gather() the states"
        )


def _input_tap(recorder: Recorder, name: str, axis: str, place: int, width: int, num_heads: int = 0) -> Any:
    what = f"the input of {name}"

    def tap(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if recorder.listens:
            _check(recorder, what, args[0], width)
            recorder.channels(axis, place, args[0], num_heads)

    return tap


def _output_tap(
    recorder: Recorder, name: str, axis: str, place: int, width: int, part: tuple[int, int]
) -> Any:
    what = f"the output of {name}"
    index, parts = part

    def tap(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if not recorder.listens:
            return
        _check(recorder, what, output, width * parts)
        if parts > 1:
            output = output[..., index * width : (index + 1) * width]
        recorder.channels(axis, place, output)

    return tap


def _norm_tap(recorder: Recorder, name: str, energy: int | None, scored: int | None, width: int) -> Any:
    """Of a norm its input's energy and its output, at their places. In one hook: each hook costs as much as
    reading 100 KB."""
    take_input = _input_tap(recorder, name, ENERGY, energy, width) if energy is not None else None
    take_output = _output_tap(recorder, name, "hidden", scored, width, (0, 1)) if scored is not None else None

    def tap(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if take_input is not None:
            take_input(module, args)
        if take_output is not None:
            take_output(module, args, output)

    return tap


def _block_tap(recorder: Recorder, place: int) -> Any:
    def tap(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not recorder.listens:
            return
        block_input = args[0] if args else kwargs["hidden_states"]
        recorder.blocks(place, block_input, output[0] if isinstance(output, tuple) else output)

    return tap
