"""Checks that every op makes of its tensors, before a kernel sees them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")
_PLAIN = (Tensor, nn.Parameter)


def check_tensor(name: str, x: Any) -> None:
    """Checks that `x` is a plain dense tensor that has memory.

    Raises:
        TypeError: `x` is not a tensor, is a DTensor, or is not dense.
        ValueError: its storage was freed.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if is_dtensor(x):
        raise TypeError(
            f"{name} is a DTensor: pass {name}.full_tensor(), which gathers the shards and hands the "
            "gradient back to them; or .to_local() where every rank holds the whole"
        )
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {x.layout}: pass {name}.to_dense()")
    check_gathered(name, x)


def check_gathered(name: str, x: Tensor) -> None:
    """Checks that a tensor has the memory that its shape says.

    Raises:
        ValueError: its storage was freed, or DeepSpeed has partitioned it.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return  # these tensors have no memory; the kernels see the real ones
    # ZeRO-3 leaves shape (0,) and says so beside it; FSDP leaves the shape and frees the storage
    status = getattr(x, "ds_status", None)
    partitioned = status is not None and getattr(status, "name", status) != "AVAILABLE"
    if partitioned or (not is_dtensor(x) and x.numel() and x.untyped_storage().nbytes() == 0):
        raise ValueError(
            f"{name} has no memory: its storage was freed, as ZeRO-3 and FSDP do outside of the wrapped "
            "module's forward. Call inside of that forward, where its gradient is reduced too; or, where it "
            "needs no gradient, gather it first (deepspeed.zero.GatheredParameters, FSDP.summon_full_params)"
        )


def with_unit_stride(x: Tensor) -> Tensor:
    """The tensor, or a copy of it, with stride 1 in its last dimension."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check_no_tangent(op: str, **tensors: Tensor) -> None:
    """Checks that no tensor carries a tangent, for ops without a derivative: AD would silently give zero.

    Raises:
        ValueError: one of the tensors carries a tangent.
    """
    if torch.autograd.forward_ad._current_level < 0:  # nothing has a tangent
        return
    for name, x in tensors.items():
        if torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            raise ValueError(
                f"{name} carries a forward-mode tangent, and {op} has no derivative: pass {name}.detach()"
            )


def is_dtensor(x: Any) -> bool:
    """Whether `x` is a DTensor; does not import torch.distributed.tensor."""
    if type(x) is Tensor:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # no tensor is a DTensor before this is imported
    return module is not None and isinstance(x, module.DTensor)


def at_once(op: Callable[P, R], function: Callable[P, R], mutates: Sequence[int] = ()) -> Callable[P, R]:
    """`op`, a torch.library.custom_op of `function`, or for a plain call the function itself.

    The dispatcher's way to an op in Python costs 20 to 90 µs. Only who looks on needs it: torch.compile and
    other tracers, modes (fake tensors, counted flops, selective checkpoints), functorch's transforms, and
    subclasses of Tensor and tensors without memory, which are among the arguments themselves and in no list.

    Args:
        op: as torch.library.custom_op() gives it.
        function: what it was made of.
        mutates: places of the arguments that it changes, whose versions then rise as they do by the op.
    """

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if kwargs or not _is_plain_call(args):
            return op(*args, **kwargs)
        for place in mutates:
            changed = args[place]
            if isinstance(changed, Tensor):
                torch.autograd.graph.increment_version(changed)
        return function(*args, **kwargs)

    return call


def _is_plain_call(args: tuple[Any, ...]) -> bool:
    if torch.compiler.is_compiling():
        return False
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    # a loop, since a generator takes twice the time
    for x in args:  # noqa: SIM110
        if isinstance(x, Tensor) and (type(x) not in _PLAIN or x.is_meta):
            return False
    return True
