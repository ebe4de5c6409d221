"""HookedModel: finds the modules to score by the family's table, hooks them, and removes the hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minitron_kernels._modules import eval_mode
from minitron_kernels.ops.importance.state import ImportanceState, TokenMeanState
from minitron_kernels.pruning.families.family import Family
from minitron_kernels.pruning.families.registry import family_of
from minitron_kernels.pruning.families.wrappers import (
    COMPILED,
    is_offloaded,
    parameters_without_data,
    unwrapped,
)
from minitron_kernels.pruning.score.expert_hooks import GATED, UNGATED, ExpertsHook
from minitron_kernels.pruning.score.recorder import Recorder
from minitron_kernels.pruning.score.scores import AXES, ENERGY, Axis, ImportanceScores, Options


class HookedModel:
    """A Hugging Face decoder, and the axes that can be scored in it.

    Args:
        model: the causal language model or its decoder alone, plain or in DistributedDataParallel, compiled,
            or under FSDP2.

    Raises:
        TypeError: the model has no config.
        ValueError: its family is not known, or it lacks the family's modules; it has adapters, or parameters
            whose data are neither there nor fetched by a hook.
    """

    def __init__(self, model: Any) -> None:
        self.root = unwrapped(model)
        self.config: Any = self.root.config
        self.family: Family = family_of(self.config)
        self.sizes = self.family.sizes(self.config)
        self.text_config: Any = self.family.text(self.config)
        decoder = self.family.layers.rpartition(".")[0]
        self._prefix = f"{decoder}." if decoder else ""
        self.decoder = _original(_inside(self.root, decoder))
        layers = range(self.sizes["layers"])
        self.sparse = tuple(i for i in layers if self.family.is_sparse(self.config, i))
        axes = [self.family.layer_axes(self.config, i) for i in layers]
        self.dense = tuple(i for i in layers if "mlp" in axes[i])
        self.attention = tuple(i for i in layers if "heads" in axes[i])
        self.convolutions = tuple(i for i in layers if "conv" in axes[i])
        self.mamba = tuple(i for i in layers if "mamba_heads" in axes[i])
        self.delta = tuple(i for i in layers if "delta_heads" in axes[i])
        _check_data(self.root)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes, of AXES, that the model has."""
        taps = self.family.taps
        have = {"hidden", "layers"}
        if self.attention:
            have.add("heads")
        if self.dense and taps.mlp_down is not None:
            have.add("mlp")
        if self.sparse and taps.experts is not None:
            have |= {"experts", "expert_mlp"}
        if self.convolutions:
            have.add("conv")
        if self.mamba and not {"mamba_heads", "mamba_dim"} <= set(self.family.fixed(self.config)):
            have.add("mamba")
        if self.delta and self.family.taps.delta_out is not None:
            have.add("delta")
        have -= set(self.family.fixed(self.config))
        return tuple(axis for axis in AXES if axis in have)

    def module(self, name: str, axis: str) -> nn.Module:
        """A module by its name in the causal language model.

        Raises:
            ValueError: there is no such module; says how to name another.
        """
        try:
            return _original(self.decoder.get_submodule(name.removeprefix(self._prefix)))
        except AttributeError:
            raise ValueError(
                f"the model has no module {name}, where the family {self.family.model_types[0]!r} taps "
                f"{axis!r}: pass register_family() a Family whose Taps name the modules of "
                f"{type(self.root).__name__}"
            ) from None

    def layer(self, index: int, inside: str | None, axis: str) -> tuple[str, nn.Module]:
        """(name, module) of the module `inside` a layer; of the layer itself where that is ""."""
        if inside is None:
            raise ValueError(
                f"the family {self.family.model_types[0]!r} does not say where {axis!r} is tapped: see "
                "minitron_kernels.pruning.Taps"
            )
        name = f"{self.family.layers}.{index}{'.' if inside else ''}{inside}"
        return name, self.module(name, axis)

    def norms(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The names of these norms in all layers, in the order of the forward pass, and of the final norm."""
        in_layers = [
            f"{self.family.layers}.{i}.{name}"
            for i in range(self.sizes["layers"])
            for name in self.family.norms_in(self.config, i, names)
        ]
        return (*in_layers, self.family.final_norm)

    def empty_scores(self, axes: Sequence[str], options: Options) -> ImportanceScores:
        """Scores of no tokens yet. `axes` are some of self.axes."""
        sizes, taps, layers = self.sizes, self.family.taps, tuple(range(self.sizes["layers"]))
        made: dict[str, Axis] = {}

        def channels(
            name: str, modules: tuple[Any, ...], width: int, seq: tuple[str, ...], experts: int = 1
        ) -> None:
            groups = len(modules) * experts
            state = ImportanceState(groups * width, seq=seq, groups=groups)
            made[name] = Axis(state, modules, experts if name == "expert_mlp" else None)

        for axis in axes:
            if axis == "hidden":
                channels(axis, self.norms(taps.scored_norms), sizes["hidden"], options.seq)
                channels(ENERGY, self.norms(taps.norms), sizes["hidden"], ("L2",))
            elif axis == "mlp":
                channels(axis, self.dense, sizes["mlp"], options.seq)
            elif axis == "heads":
                per_head = sizes["head_dim"] if options.head_score == "channels" else 1
                channels(axis, self.attention, sizes["heads"] * per_head, options.seq)
            elif axis == "conv":
                channels(axis, self.convolutions, sizes["conv"], options.seq)
            elif axis == "mamba":
                channels(axis, self.mamba, sizes["mamba_heads"] * sizes["mamba_dim"], options.seq)
            elif axis == "delta":
                channels(axis, self.delta, sizes["delta_heads"], options.seq)
            elif axis == "layers":
                made[axis] = Axis(TokenMeanState(len(layers)), layers)
            elif axis == "experts":
                made[axis] = Axis(
                    TokenMeanState(len(self.sparse) * sizes["experts"]), self.sparse, sizes["experts"]
                )
            else:
                channels(axis, self.sparse, sizes["expert_mlp"], options.seq, sizes["experts"])
        return ImportanceScores(self.config.to_dict(), made, options=options, head_count=sizes["heads"])

    @contextlib.contextmanager
    def hooked(self, recorder: Recorder) -> Iterator[None]:
        """Puts the model into eval mode with hooks that feed the recorder; always restores it afterwards."""
        handles: list[Any] = []
        try:
            self._hook(recorder, handles)
            with eval_mode(self.root), _uncompiled(self.root):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, recorder: Recorder, handles: list[Any]) -> None:
        axes, taps, options = recorder.scores.axes, self.family.taps, recorder.scores.options
        if "hidden" in axes:
            width = self.sizes["hidden"]
            energies, scored = (
                {norm: i for i, norm in enumerate(axes[axis].modules)} for axis in (ENERGY, "hidden")
            )
            for norm in energies | scored:
                hook = _norm_hook(recorder, str(norm), energies.get(norm), scored.get(norm), width)
                handles.append(self.module(str(norm), "hidden").register_forward_hook(hook))
        for i, layer in enumerate(axes["mlp"].modules if "mlp" in axes else ()):
            if options.mlp_tap == "down_proj_input":
                name, module = self.layer(int(layer), taps.mlp_down, "mlp")
                hook = _input_hook(recorder, name, "mlp", i, self.sizes["mlp"])
                handles.append(module.register_forward_pre_hook(hook))
            else:
                name, module = self.layer(int(layer), taps.mlp_up, "mlp")
                hook = _output_hook(recorder, name, "mlp", i, self.sizes["mlp"], taps.mlp_up_part)
                handles.append(module.register_forward_hook(hook))
        for i, layer in enumerate(axes["heads"].modules if "heads" in axes else ()):
            name, module = self.layer(int(layer), taps.attention_out, "heads")
            num_heads = self.sizes["heads"] if options.head_score == "norm" else 0
            width = self.sizes["heads"] * self.sizes["head_dim"]
            hook = _input_hook(recorder, name, "heads", i, width, num_heads)
            handles.append(module.register_forward_pre_hook(hook))
        for i, layer in enumerate(axes["conv"].modules if "conv" in axes else ()):
            name, module = self.layer(int(layer), taps.conv_out, "conv")
            hook = _input_hook(recorder, name, "conv", i, self.sizes["conv"])
            handles.append(module.register_forward_pre_hook(hook))
        for i, layer in enumerate(axes["mamba"].modules if "mamba" in axes else ()):
            name, module = self.layer(int(layer), taps.mamba_in, "mamba")
            handles.append(module.register_forward_hook(self._mamba_hook(recorder, name, i)))
        for i, layer in enumerate(axes["delta"].modules if "delta" in axes else ()):
            name, module = self.layer(int(layer), taps.delta_out, "delta")
            heads = self.sizes["delta_heads"]
            hook = _input_hook(recorder, name, "delta", i, heads * self.sizes["delta_dim"], heads)
            handles.append(module.register_forward_pre_hook(hook))
        for i, layer in enumerate(axes["layers"].modules if "layers" in axes else ()):
            _, module = self.layer(int(layer), "", "layers")
            handles.append(module.register_forward_hook(_block_hook(recorder, i), with_kwargs=True))
        experts = axes.get("experts", axes.get("expert_mlp"))
        for i, layer in enumerate(experts.modules if experts else ()):
            name, module = self.layer(int(layer), taps.experts, "experts")
            transposed = self._check_experts(name, module)
            expert_hook = ExpertsHook(recorder, i, transposed)
            if taps.router is not None:
                _, router = self.layer(int(layer), taps.router, "experts")
                handles.append(router.register_forward_hook(expert_hook.route))
            handles.append(module.register_forward_hook(expert_hook, with_kwargs=True))

    def _mamba_hook(self, recorder: Recorder, name: str, position: int) -> Any:
        """Takes x of the output of a state space's projection to z, x, B, C and Δ."""
        located = self.family.locate(f"{name}.weight", self.config)
        if located is None:
            raise ValueError(f"the family {self.family.model_types[0]!r} must have {name}.weight")
        whole, width = located.shape(self.sizes)[0], self.sizes["mamba_heads"] * self.sizes["mamba_dim"]

        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if recorder.listens:
                output = _checked(recorder, f"the output of {name}", output, whole)
                recorder.channels("mamba", position, output[..., width : 2 * width])

        return hook

    def _check_experts(self, name: str, module: nn.Module) -> bool:
        """Checks the shapes of the experts' weights; returns whether they are [in, out]."""
        kind = GATED if self.family.locate(f"{name}.{GATED[0]}", self.config) else UNGATED
        weights = {weight: self.family.locate(f"{name}.{weight}", self.config) for weight in kind}
        for weight, located in weights.items():
            found = getattr(module, weight, None)
            if located is None:
                raise ValueError(f"the family {self.family.model_types[0]!r} must have {name}.{weight}")
            shape = located.shape(self.sizes)
            if not isinstance(found, Tensor) or tuple(found.shape) != shape:
                got = tuple(found.shape) if isinstance(found, Tensor) else "none"
                raise ValueError(
                    f"{name} must have {weight} {shape}, the stacked weights of all experts, got {got}. With "
                    "expert parallelism, score each rank's experts by accumulate_expert_importance_() and "
                    "all_gather() the states"
                )
        down = weights["down_proj"]
        return down is not None and down.dims[-1] == ("hidden",)


def _inside(root: nn.Module, decoder: str) -> nn.Module:
    """The decoder in a model; the model itself where it is a decoder alone, as AutoModel gives it."""
    while decoder:
        try:
            return root.get_submodule(decoder)
        except AttributeError:  # of a base model, whose names lack the first part
            decoder = decoder.partition(".")[2]
    return root


def _original(module: nn.Module) -> nn.Module:
    """The module that a torch.compile() wrapper runs: hooks belong there; any other module as it is."""
    inner = module._modules.get(COMPILED)
    return module if inner is None else inner


def _check_data(model: nn.Module) -> None:
    """Checks that parameters on the meta device are fetched by a hook of accelerate on their module."""
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
    """Runs the model without torch.compile(), whose existing graphs would not call the new hooks."""
    compiled = any(
        COMPILED in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _checked(recorder: Recorder, what: str, x: Any, width: int) -> Tensor:
    """x as [B, S, C]; some layers (OPT) lay all tokens of a batch in one row."""
    wanted = (*recorder.tokens.shape, width)
    if isinstance(x, Tensor) and x.shape == (wanted[0] * wanted[1], width):
        return x.reshape(wanted)
    if not isinstance(x, Tensor) or x.shape != wanted:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"{what} must be {list(wanted)}, as the batch and the config say, got {got}. With tensor "
            "parallelism, score each rank's channels by accumulate_importance_() and all_gather() the states"
        )
    return x


def _input_hook(
    recorder: Recorder, name: str, axis: str, position: int, width: int, num_heads: int = 0
) -> Any:
    what = f"the input of {name}"

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if recorder.listens:
            recorder.channels(axis, position, _checked(recorder, what, args[0], width), num_heads)

    return hook


def _output_hook(
    recorder: Recorder, name: str, axis: str, position: int, width: int, part: tuple[int, int]
) -> Any:
    what = f"the output of {name}"
    index, parts = part

    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if not recorder.listens:
            return
        output = _checked(recorder, what, output, width * parts)
        if parts > 1:
            output = output[..., index * width : (index + 1) * width]
        recorder.channels(axis, position, output)

    return hook


def _norm_hook(recorder: Recorder, name: str, energy: int | None, scored: int | None, width: int) -> Any:
    """One hook for a norm's input (its energy) and its output, since a second hook would cost as much time as
    reading 100 KB. `energy` and `scored` are the norm's positions in these axes; None where it is not there.
    """
    take_input = take_output = None
    if energy is not None:
        take_input = _input_hook(recorder, name, ENERGY, energy, width)
    if scored is not None:
        take_output = _output_hook(recorder, name, "hidden", scored, width, (0, 1))

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if take_input is not None:
            take_input(module, args)
        if take_output is not None:
            take_output(module, args, output)

    return hook


def _block_hook(recorder: Recorder, position: int) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not recorder.listens:
            return
        block_input = args[0] if args else kwargs["hidden_states"]
        recorder.blocks(position, block_input, output[0] if isinstance(output, tuple) else output)

    return hook
