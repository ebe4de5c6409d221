"""Takes a model out of its wrappers, or says why the caller must do so first.

Scoring and pruning both begin here, so that they accept the same models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

COMPILED = "_orig_mod"  # the name under which torch.compile() keeps the module that it wraps
# names that wrappers add to a parameter's: torch.compile(), activation checkpointing
_TRANSPARENT = (COMPILED, "_checkpoint_wrapped_module")


def unwrapped(model: Any) -> nn.Module:
    """The transformers model inside torch.compile(), DistributedDataParallel or DataParallel, in any order.

    fully_shard() (FSDP2) does not wrap a model but changes it; it is returned as it is: see is_fsdp().

    Raises:
        TypeError: it is not a model of transformers.
        ValueError: adapters are attached to it, or it is in an FSDP1 wrapper; says what to do.
    """
    given = model
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(model, nn.Module) and COMPILED in model._modules:
            model = model._modules[COMPILED]
        else:
            break
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Hugging Face model with a config, got {type(given).__name__}")
    _refuse_wrapped_inside(model)
    if not hasattr(getattr(model, "config", None), "to_dict"):
        raise TypeError(f"model must be a Hugging Face model with a config, got {type(given).__name__}")
    return model


def _refuse_wrapped_inside(model: nn.Module) -> None:
    """Raises ValueError for wrappers under which the model's parameters are not its weights."""
    for name, module in model.named_modules():
        # compared by name, since neither package need be installed
        kinds = {kind.__name__ for kind in type(module).__mro__}
        where = f"its module {name!r}" if name else "it"
        if kinds & {"PeftModel", "BaseTuner", "BaseTunerLayer"}:
            raise ValueError(
                f"model must be without adapters, but {where} is a {type(module).__name__} of PEFT, whose "
                "weights are beside the model's: merge first, model = peft_model.merge_and_unload()"
            )
        if "FullyShardedDataParallel" in kinds:
            raise ValueError(
                f"model must not be in FullyShardedDataParallel (FSDP1), but {where} is, with its parameters "
                "flattened: use torch.distributed.fsdp.fully_shard() (FSDP2), or give the plain model"
            )


def plain_name(name: str) -> str:
    """A parameter's or module's name without what torch.compile() and activation checkpointing add to it."""
    return ".".join(part for part in name.split(".") if part not in _TRANSPARENT)


def is_fsdp(module: Any) -> bool:
    """Whether fully_shard() (FSDP2) was applied to this module itself."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate fetches this module's own parameters (device_map: "cpu", "disk")."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # a SequentialHook holds several
    return any(bool(getattr(each, "offload", False)) for each in hooks)


@contextlib.contextmanager
def fetched(module: nn.Module) -> Iterator[None]:
    """Fetches this module's own parameters to its device while the block runs, if they are offloaded."""
    if not is_offloaded(module):
        yield
        return
    hook: Any = module._hf_hook
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def parameters_without_data(model: nn.Module) -> list[str]:
    """Names of the parameters on the meta device, whether offloaded or never loaded."""
    return [plain_name(name) for name, parameter in model.named_parameters() if parameter.is_meta]
