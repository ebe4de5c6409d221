"""Outputs of a decoder's layers, of those alone that are wanted."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_INSTALLED = "_output_capturing_hooks_installed"  # transformers' word for it


def num_layers(config: Any) -> int:
    """The layers of a config's text decoder."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(text.num_hidden_layers)


def decoder_layers(decoder: nn.Module, config: Any) -> nn.ModuleList | None:
    """The list of a decoder's layers: the one list that long, nearest to the top; None: it is not known."""
    get_decoder = getattr(decoder, "get_decoder", None)
    text: Any = get_decoder() if get_decoder is not None else None  # within a vision-language model
    root: nn.Module = decoder if text is None else text
    found: dict[int, list[nn.ModuleList]] = {}
    for name, module in root.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers(config):
            found.setdefault(name.count("."), []).append(module)
    nearest = found[min(found)] if found else []
    return nearest[0] if len(nearest) == 1 else None


def collect_layers(
    decoder: Any,
    config: Any,
    inputs: Mapping[str, Any],
    layers: tuple[int, ...],
    *,
    states_are_layers: bool = True,
) -> tuple[Any, dict[int, Tensor]]:
    """Runs a decoder; its output, and {layer: its output [B, T, H]}, the last one's after the final norm.

    Hooks on the wanted layers take them, so that no others are kept. Within a graph that is being compiled,
    and where the list of layers is not known, they are the model's own hidden_states.

    Raises:
        ValueError: a layer that does not exist, or whose output in a reentrant checkpoint has no gradient.
    """
    last = num_layers(config) - 1
    for layer in layers:
        if not 0 <= layer <= last:
            raise ValueError(f"layers must be in [0, {last + 1}), got {layer}")
    inner = [layer for layer in layers if layer != last]
    if not inner:
        out = decoder(**inputs, use_cache=False, return_dict=True)
        return out, {layer: out.last_hidden_state for layer in layers}
    # hooks that come and go are not for a compiled graph
    modules = None if torch.compiler.is_compiling() else decoder_layers(decoder, config)
    if modules is None:
        out = decoder(**inputs, use_cache=False, output_hidden_states=True, return_dict=True)
        states = out.hidden_states
        if states is None or len(states) != last + 2 or not states_are_layers:
            raise ValueError(
                f"{type(decoder).__name__} does not give the outputs of its {last + 1} layers as "
                "hidden_states: leave out the terms that need them"
            )
        kept = {layer: states[layer + 1] for layer in inner}
    else:
        out, kept = _hooked(decoder, modules, inputs, inner)
    if last in layers:
        kept[last] = out.last_hidden_state
    return out, kept


@contextmanager
def forget_recorders(decoder: nn.Module) -> Iterator[None]:
    """Removes the hooks that transformers leaves on layers when hidden states are first asked for.

    A model that has them cannot be pickled.
    """
    modules = list(decoder.modules())
    before = [dict(module._forward_hooks) for module in modules]
    flagged = [module for module in modules if _INSTALLED in vars(module)]
    try:
        yield
    finally:
        for module, hooks in zip(modules, before, strict=True):
            for key in [key for key in module._forward_hooks if key not in hooks]:
                del module._forward_hooks[key]
            if _INSTALLED in vars(module) and module not in flagged:
                delattr(module, _INSTALLED)


def prepare_recorders(decoder: Any) -> None:
    """Has transformers put those hooks on layers now: within a graph that is being compiled it cannot."""
    recorders: Any = sys.modules.get("transformers.utils.output_capturing")
    if recorders is not None and hasattr(decoder, "config"):
        recorders.maybe_install_capturing_hooks(decoder)


def compare_states(decoder: Any, config: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """(last hidden states, whether hidden_states[layer + 1] is a layer's output), of a decoder run once."""
    modules, last = decoder_layers(decoder, config), num_layers(config) - 1
    inputs = {**inputs, "output_hidden_states": True}
    if modules is None:
        out = decoder(**inputs, use_cache=False, return_dict=True)
        return out.last_hidden_state, True
    try:
        out, kept = _hooked(decoder, modules, inputs, list(range(last)))
    except ValueError:  # layers that run twice, or never
        out, kept = decoder(**inputs, use_cache=False, return_dict=True), {}
    states = getattr(out, "hidden_states", None)
    if states is None or len(states) != last + 2 or len(kept) != last:
        return out.last_hidden_state, False
    alike = all(torch.equal(states[layer + 1], x) for layer, x in kept.items())
    return out.last_hidden_state, alike and torch.equal(states[-1], out.last_hidden_state)


def _hooked(
    decoder: Any, modules: nn.ModuleList, inputs: Mapping[str, Any], layers: list[int]
) -> tuple[Any, dict[int, Tensor]]:
    kept: dict[int, Tensor] = {}
    wants_grad = torch.is_grad_enabled()

    def hook_of(layer: int) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            if wants_grad and not torch.is_grad_enabled():
                raise ValueError(
                    f"layer {layer} runs in a reentrant checkpoint, where its output has no gradient: use "
                    "gradient_checkpointing_enable({'use_reentrant': False})"
                )
            if layer in kept:
                raise ValueError(
                    f"layer {layer} runs more than once in a forward pass: its output is not one"
                )
            kept[layer] = out if isinstance(out, Tensor) else out[0]

        return hook

    hooks = [modules[layer].register_forward_hook(hook_of(layer)) for layer in dict.fromkeys(layers)]
    try:
        out = decoder(**inputs, use_cache=False, return_dict=True)
    finally:  # before a checkpoint runs its layers again
        for hook in hooks:
            hook.remove()
    if missing := [layer for layer in layers if layer not in kept]:
        raise ValueError(f"layers {missing} of {type(decoder).__name__} did not run in its forward pass")
    return out, kept
