"""Warns of a model that is called around the wrapper which would average its gradients over ranks."""

from __future__ import annotations

import gc
import warnings
import weakref

import torch
import torch.distributed as dist
from torch import nn

from minitron_kernels._tensors import is_dtensor

# model -> how often it was looked at; 0: it has been warned of
_CALLS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def warn_if_around_ddp(model: nn.Module) -> None:
    """Warns once if a model within DistributedDataParallel is trained by a call that is not the wrapper's.

    Its gradients then stay those of this rank: no error says so, and ranks drift apart. (FSDP and ZeRO-3
    leave no whole weights outside of their forward, so there it is an error anyway.) A model that nothing
    wraps is left alone, since its caller may average gradients.

    Wrappers are looked for among all objects of the process, which takes a tenth of a second, so only in the
    first call, the second, the fourth, and so on.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    wrapper = nn.parallel.DistributedDataParallel
    if wrapper._active_ddp_module is not None or _CALLS.get(model) == 0:
        return
    _CALLS[model] = calls = _CALLS.get(model, 0) + 1
    if calls & (calls - 1) or not any(x.requires_grad and not is_dtensor(x) for x in model.parameters()):
        return
    for found in gc.get_objects():
        # not isinstance(), which would ask proxies what they stand for
        if not issubclass(type(found), wrapper) or getattr(found, "_use_python_reducer", False):
            continue
        if any(module is model for module in found.modules()):
            _CALLS[model] = 0
            warnings.warn(
                f"this {type(model).__name__} is inside a DistributedDataParallel but was called around it: "
                "its gradients stay those of this rank, and ranks drift apart. Call the wrapper: "
                "step(ddp, ...), not step(ddp.module, ...)",
                stacklevel=2,
            )
            return
