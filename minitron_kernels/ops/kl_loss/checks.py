"""Checks of arguments that kl_loss and linear_kl_loss share; each error names the argument and what came."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from minitron_kernels._tensors import check_tensor, with_unit_stride

T = TypeVar("T", bound=Tensor | None)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def refuse(name: str, wanted: str, value: Any) -> NoReturn:
    """The error for a value out of range."""
    # torch.compile formats a number that it keeps symbolic in str.format() alone
    raise ValueError("{} must be {}, got {}".format(name, wanted, value))  # noqa: UP032


def number(name: str, value: Any, wanted: str = "a number") -> float:
    """An int or a float as it is, NumPy's scalars as floats; a TypeError for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    hint = ": pass .item()" if isinstance(value, Tensor) else ""
    raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}{hint}")


def positive(name: str, value: Any) -> float:
    """A finite number above 0. The comparisons are guards that torch.compile keeps for all such numbers."""
    value = number(name, value)
    if not 0 < value < math.inf:
        refuse(name, "finite and greater than 0", value)
    return value


def integer(name: str, value: Any) -> int:
    """An int; NumPy's integers too."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return operator.index(value)
    raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def byte_count(name: str, value: Any) -> int:
    """An integer(), or a float without a fraction, such as 1e9."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return integer(name, value)


def check_floating(**tensors: Tensor) -> None:
    """Each is a float tensor of a served dtype, all on one device."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        check_tensor(name, x)
        if x.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device}, but {first_name} is on {first.device}")
        if (x.dtype == torch.float64) != (first.dtype == torch.float64):
            raise TypeError(f"{name} is {x.dtype}, but {first_name} is {first.dtype}: float64 needs float64")


def check_constant(name: str, x: Tensor) -> None:
    """What the teacher computed is a constant here; silence would hide a teacher that is meant to learn."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, but no gradient flows to the teacher: run the teacher under "
            f"torch.no_grad(), or pass {name}.detach()"
        )


def check_transforms(op: str, *student: Tensor | None) -> None:
    """Kernels know backward alone: forward-mode AD would be silently 0, vmap would loop or fail."""
    if torch._C._are_functorch_transforms_active():
        what = "torch.func's transforms (grad, vjp, jvp, vmap, ...)"
    elif forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in student
    ):
        what = "forward-mode AD"
    else:
        return
    raise RuntimeError(
        f"the kernels of {op} do not work under {what}: use backend='reference' there, or loss.backward()"
    )


def as_saved(x: T) -> T:
    """The same memory as a tensor that autograd may save: those of torch.inference_mode() it refuses."""
    if x is None or torch.compiler.is_compiling() or not x.is_inference():
        return x
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(
        x.untyped_storage(), x.storage_offset(), x.size(), x.stride()
    )  # type: ignore[return-value]


def as_rows(x: Tensor) -> Tensor:
    """[..., C] -> [N, C] with stride 1 along C, itself or a view where possible."""
    if x.dim() == 2:
        return with_unit_stride(x)
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return with_unit_stride(rows)


def autocast(*tensors: Tensor) -> list[Tensor]:
    """Under autocast the operands take its dtype, as those of any linear layer do."""
    kind = tensors[0].device.type
    # meta has no autocast; torch.amp.is_autocast_available(), which knows, is not compiled by torch 2.11
    if kind == "meta" or not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return list(tensors)
    return [x.to(torch.get_autocast_dtype(kind)) for x in tensors]


def check_linear(side: str, hidden: Tensor, head: Tensor) -> None:
    """Hidden states and head have the same width."""
    if hidden.dim() < 1 or head.dim() != 2 or hidden.shape[-1] != head.shape[1]:
        raise ValueError(
            f"{side}_hidden [..., H] and {side}_head [V, H] must have the same H, got "
            f"{tuple(hidden.shape)} and {tuple(head.shape)}"
        )


def check_bias(name: str, bias: Tensor | None, head: Tensor) -> None:
    """One entry for each token, where the head is."""
    if bias is None:
        return
    check_floating(**{name: bias})
    if bias.shape != head.shape[:1] or bias.device != head.device:
        raise ValueError(
            f"{name} must be [V] = [{head.shape[0]}] on {head.device}, got {tuple(bias.shape)} on "
            f"{bias.device}"
        )


def check_accumulator(buffer: Tensor | None, head: Tensor) -> None:
    """As the head, in the precision of sums."""
    if buffer is None:
        return
    dtype = torch.float64 if head.dtype == torch.float64 else torch.float32
    check_tensor("grad_head_accumulator", buffer)
    if buffer.dtype != dtype:
        raise TypeError(f"grad_head_accumulator must be a {dtype} tensor, got {buffer.dtype}")
    fits = buffer.shape == head.shape and buffer.device == head.device
    if not fits or buffer.stride(1) != 1 or buffer.stride(0) < head.shape[1]:
        raise ValueError(
            f"grad_head_accumulator must have student_head's shape {tuple(head.shape)} on {head.device} with "
            "stride 1 along H and rows that do not overlap, got "
            f"{tuple(buffer.shape)} on {buffer.device} with strides {buffer.stride()}"
        )


def check_left_to_autograd(**given: Any) -> None:
    """The reference makes no gradient itself, and has no use for what says where to."""
    for name, place in given.items():
        if place is not None:
            raise ValueError(f"{name} needs native or triton; the reference leaves gradients to autograd")
