"""A caller's memory for the head's gradient: what can be lent, and whether a gradient in it is another's.

Autograd adds gradients up where nobody sees them, and a checkpoint, of either kind, makes a loss again in the
middle of that: it must not write over a gradient that waits. Saved tensors have a version, but not where
hooks, as those of a checkpoint, take their place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_kernels._tensors import check_tensor, extents_meet

_OWN = "lend each call a buffer of its own"
_TWICE = f"grad_head_buffer holds the gradient of another call of this backward, which would be lost: {_OWN}"
# addresses of buffers that hold a gradient, from a backward on until they are lent again outside of any
_given: set[int] = set()


def check_buffer(
    buffer: Tensor | None, accumulator: Tensor | None, head: Tensor, parameter: Tensor, *inputs: Tensor | None
) -> None:
    """Memory for the gradient to `head`, shared with nothing. `parameter`: what the caller gave as head."""
    check_places(accumulator is not None, buffer is not None, head.dtype)
    if accumulator is not None:
        _check_apart(accumulator, parameter, *inputs)
    if buffer is None:
        return
    if torch.compiler.is_compiling():
        raise ValueError("grad_head_buffer is not for compiled calls: the compiler plans their memory")
    check_tensor("grad_head_buffer", buffer)
    if buffer.dtype != head.dtype:
        raise TypeError(f"grad_head_buffer must be {head.dtype} as student_head is here, got {buffer.dtype}")
    if buffer.shape != head.shape or buffer.device != head.device or not buffer.is_contiguous():
        raise ValueError(
            f"grad_head_buffer must be contiguous and have student_head's shape {tuple(head.shape)} on "
            f"{head.device}, got {tuple(buffer.shape)} on {buffer.device} with strides {buffer.stride()}"
        )
    if buffer.requires_grad:
        raise ValueError("grad_head_buffer must not require grad: it is memory that is written over")
    if buffer.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            "grad_head_buffer was made under torch.inference_mode(), where tensors have no versions: make it "
            "outside"
        )
    memory = buffer.untyped_storage().data_ptr()
    for x in inputs:
        if x is not None and x.numel() and x.untyped_storage().data_ptr() == memory:
            raise ValueError("grad_head_buffer shares memory with an input, which would be written over")
    if not parameter.is_leaf:
        raise ValueError(
            "grad_head_buffer needs student_head to be the parameter itself, not made from one: its .grad "
            "might become the buffer without this call's knowing, and the next one write over it"
        )
    grad = parameter.grad
    if grad is not None and grad.numel() and grad.untyped_storage().data_ptr() == memory:
        raise ValueError(
            "grad_head_buffer is the memory of student_head.grad, which this call would write over. Between "
            "steps set it free with zero_grad(set_to_none=True); where micro-batches add up, lend it to "
            "the first one alone, or use grad_head_accumulator"
        )
    if torch._C._current_graph_task_id() < 0:
        _given.discard(memory)
    elif memory in _given:
        raise RuntimeError(_TWICE)


def _check_apart(accumulator: Tensor, *inputs: Tensor | None) -> None:
    """Checks that adding to the accumulator changes no input."""
    if torch.compiler.is_compiling() or not _has_memory(accumulator):
        return
    if any(x is not None and _has_memory(x) and extents_meet(accumulator, x) for x in inputs):
        raise ValueError("grad_head_accumulator shares memory with an input, which would be changed")


def _has_memory(x: Tensor) -> bool:
    """Neither empty, nor without data, nor a subclass (a fake tensor, say), whose address is not known."""
    return type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta and x.numel() > 0


def check_places(accumulator: bool, buffer: bool, dtype: torch.dtype) -> None:
    """Which of both are given for the gradient to a head of this dtype."""
    if not buffer:
        return
    if accumulator:
        raise ValueError(
            "grad_head_buffer and grad_head_accumulator are places for the same gradient: give one"
        )
    if dtype == torch.float16:
        raise TypeError(
            "grad_head_buffer is not for a float16 student_head, whose gradient is made in float32 and "
            "rounded when the loss scale is known: leave it out"
        )


def version_of(buffer: Tensor | None) -> Tensor | None:
    """0-dim int64, to be saved beside what is in the buffer now; None for None."""
    return None if buffer is None else torch.tensor(buffer._version, device="cpu")


def check_version(buffer: Tensor | None, version: Tensor | None) -> None:
    """Checks that nothing was written to the buffer since version_of().

    Raises:
        RuntimeError: something was.
    """
    if buffer is None or version is None:
        return
    if buffer._version != int(version):
        raise RuntimeError(
            "grad_head_buffer was written to between this loss and its backward, so that it may be the "
            f"gradient of another call: {_OWN}"
        )


def give(buffer: Tensor | None, grad: Tensor | None) -> None:
    """Notes that autograd gets a gradient that may be in the buffer."""
    if buffer is None or grad is None or not buffer.numel():
        return
    memory = buffer.untyped_storage().data_ptr()
    if grad.untyped_storage().data_ptr() == memory:
        _given.add(memory)
