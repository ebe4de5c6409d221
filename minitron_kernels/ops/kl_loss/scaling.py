"""The backward of linear_kl_loss: the gradients that the forward has made, times the incoming one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minitron_kernels import _native


def scale_grad_(grad: Tensor, factor: Tensor, backend: str) -> None:
    """grad *= factor, the product in the factor's precision and rounded once; free where the factor is 1.

    Args:
        grad: contiguous, any shape, float32, bfloat16 or float16; on the CPU also float64.
        factor: 0-dim, float32, float64 for a float64 grad; on the same device, and read there.
        backend: "native" or "triton", as pick() chose.
    """
    if backend == "triton":
        from minitron_kernels.ops.kl_loss.kernel_triton import scale

        scale.scale_grad_(grad, factor)
    else:
        torch.ops.minitron_kernels.kl_scale_grad_(grad, factor)
    torch.autograd.graph.increment_version(grad)


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """grad * factor in the parameter's dtype; see scale_grad_().

    In place where the graph ends here, so that the product costs no memory. A graph that is kept needs the
    gradient again, so that it hands out a copy: what is handed out is the caller's to change.
    """
    if torch.compiler.is_compiling():
        return (grad.to(factor.dtype) * factor).to(dtype)
    kept = torch._C._autograd._get_current_graph_task_keep_graph()
    out = grad.clone(memory_format=torch.contiguous_format) if kept else grad.contiguous()
    scale_grad_(out, factor, backend)
    return out.to(dtype)


def _fake(*_: Any) -> None:
    return None


if _native.available():
    torch.library.register_fake("minitron_kernels::kl_scale_grad_", _fake)
