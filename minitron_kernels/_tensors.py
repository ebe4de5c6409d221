"""Checks that every op makes of its tensors, before a kernel sees them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_PIECE = 16 << 20  # elements that are copied off a device at a time


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
    # clone(), since any strides of an empty tensor pass for contiguous
    unit = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if unit else x.clone(memory_format=torch.contiguous_format)


def check_no_tangent(op: str, **tensors: Tensor) -> None:
    """Checks that no tensor carries a tangent, for ops without a derivative: AD would silently give zero.

    Raises:
        ValueError: one of the tensors carries a tangent.
    """
    if torch.autograd.forward_ad._current_level < 0:  # nothing has a tangent
        return
    for name, x in tensors.items():
        if _is_within(x):
            kind = "may carry a forward-mode tangent of an outer transform of torch.func"
        elif torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            kind = "carries a forward-mode tangent"
        else:
            continue
        raise ValueError(f"{name} {kind}, and {op} has no derivative: pass {name}.detach()")


def levels_of(x: Tensor) -> Iterator[Tensor]:
    """The tensor, and what it is to those transforms of torch.func that the innermost one runs in."""
    yield x
    while _in_transforms() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
        yield x


def _is_within(x: Tensor) -> bool:
    """Whether `x` belongs to a transform that the innermost one runs in: this one hides its tangent."""
    if not _in_transforms():
        return False
    functorch = torch._C._functorch
    level = functorch.peek_interpreter_stack().level()
    return any(
        functorch.is_functorch_wrapped_tensor(part) and functorch.maybe_get_level(part) < level
        for part in levels_of(x)
    )


def _in_transforms() -> bool:
    # torch.compile traces transforms without these functions
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def extent(x: Tensor) -> tuple[int, int]:
    """The addresses of a dense tensor's first byte and of the one after its last."""
    reach = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    return x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()


def extents_meet(x: Tensor, y: Tensor) -> bool:
    """Whether the memory that two dense tensors of elements span has a byte in common."""
    (begin, end), (first, last) = extent(x), extent(y)
    return first < end and begin < last


def is_dtensor(x: Any) -> bool:
    """Whether `x` is a DTensor; does not import torch.distributed.tensor."""
    if type(x) is Tensor:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # no tensor is a DTensor before this is imported
    return module is not None and isinstance(x, module.DTensor)


def bytes_of(x: Tensor, dtype: torch.dtype | None = None) -> Iterator[memoryview]:
    """The bytes of a tensor's values, in order, some MiB at a time; as `dtype`, or its own."""
    flat = x.detach().reshape(-1)
    for piece in flat.split(_PIECE) if len(flat) else ():
        host = piece.cpu() if dtype is None else piece.cpu().to(dtype)
        yield memoryview(host.contiguous().view(torch.uint8).numpy())
