"""Ops in Python that torch.compile does not look into, without the dispatcher where nobody looks on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


class OpaqueOp:
    """Made by opaque_op(); `op` is the torch.library.custom_op."""

    def __init__(self, name: str, function: Callable[..., Any], mutates_args: Iterable[str]) -> None:
        self.op = torch.library.custom_op(name, function, mutates_args=tuple(mutates_args))
        self._function = function
        self._signature = inspect.signature(function)
        names = list(self._signature.parameters)
        self._mutates = [(names.index(name), name) for name in mutates_args]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _is_plain_call(args, kwargs):
            return self.op(*args, **kwargs)
        for place, name in self._mutates:
            changed = args[place] if place < len(args) else kwargs.get(name)
            if changed is not None:
                torch.autograd.graph.increment_version(changed)
        return self._function(*args, **kwargs)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """As that of the custom_op, but `fake` gets those of the function's arguments that it names.

        One that ends in *args gets them all, in order.
        """
        wanted = inspect.signature(fake).parameters
        if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in wanted.values()):
            self.op.register_fake(fake)
            return fake

        def of_named(*args: Any, **kwargs: Any) -> Any:
            given = self._signature.bind(*args, **kwargs)
            given.apply_defaults()
            return fake(**{name: given.arguments[name] for name in wanted})

        self.op.register_fake(of_named)
        return fake


def opaque_op(name: str, *, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], OpaqueOp]:
    """torch.library.custom_op, whose function a plain call runs at once.

    The dispatcher's way to an op in Python takes longer than a small problem. Only those who look on need it:
    torch.compile and other tracers, modes (fake tensors, counted flops, selective checkpoints), functorch's
    transforms, subclasses of Tensor, and tensors without memory. Arguments that the function changes get a
    new version either way. Tensors must be arguments themselves, not items of a list; results must be new.
    """
    return lambda function: OpaqueOp(name, function, mutates_args)


def _is_plain_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if torch.compiler.is_compiling():
        return False
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    # a loop, since a generator takes twice the time
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor) and (type(x) not in _PLAIN or x.is_meta):
            return False
    return True
