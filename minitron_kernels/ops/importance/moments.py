"""The moments of each sequence from activations, by a backend's kernels; also over ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from minitron_kernels import _native
from minitron_kernels._backend import pick
from minitron_kernels._opaque import opaque_op
from minitron_kernels._tensors import with_unit_stride
from minitron_kernels.ops.importance import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# sequence aggregation -> the flag of the moments that it needs
MOMENT_OF = {"mean": reference.ABS, "L2": reference.SQUARE, "var": reference.CENTRED}


def num_moments(moment_flags: int) -> int:
    """How many moments `moment_flags` asks for: Σ|v|; Σv²; Σv and Σ(v − v̄)²."""
    absolute = bool(moment_flags & reference.ABS)
    square = bool(moment_flags & reference.SQUARE)
    return absolute + square + 2 * bool(moment_flags & reference.CENTRED)


class Moments(NamedTuple):
    """Sums over the tokens of each sequence.

    Attributes:
        values: [moments, B, M], those that `flags` asks for.
        counts: [B] tokens; [B, G] where G equal groups of the M values see different tokens, as experts do.
        flags: ABS | SQUARE | CENTRED of reference.py.
    """

    values: Tensor
    counts: Tensor
    flags: int

    def aggregate(self, seq: str) -> Tensor:
        """[B, M] float64: (1/n)Σ|v|, √Σv² or (1/n)Σ(v−v̄)² of each sequence; 0 for one without tokens."""
        at = {"mean": 0, "L2": int(bool(self.flags & reference.ABS)), "var": -1}[seq]
        value = self.values[at].to(torch.float64, copy=True)
        if seq == "L2":
            return value.sqrt_()
        return value.div_(_per_value(self.counts, value.shape[-1]).clamp(min=1))


def check_activations(name: str, x: Any, dims: tuple[int, ...]) -> None:
    """Checks that `x` is a float tensor whose number of dimensions is one of `dims`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.dim() not in dims:
        wanted = " or ".join(str(dim) for dim in dims)
        raise ValueError(f"{name} must have {wanted} dimensions, got {tuple(x.shape)}")


def backend_for(x: Tensor, backend: str) -> str:
    """The backend that serves importance for `x`: only the reference takes float64."""
    if x.dtype == torch.float64:
        if backend not in ("auto", "reference"):
            raise ValueError(f'x in float64 is served by backend="reference" only, got backend={backend!r}')
        return "reference"
    return pick("importance", x.device, backend, x.dtype)


def moments_of(
    x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, num_heads: int, moment_flags: int, backend: str
) -> Moments:
    """The moments of this rank's tokens, from arguments that op.py has checked. No host sync."""
    return moments_by(backend_for(x, backend), x, mask, cu_seqlens, num_heads, moment_flags)


def moments_by(
    chosen: str, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, num_heads: int, moment_flags: int
) -> Moments:
    """moments_of() by the backend `chosen`, for callers that ask backend_for() once for many tensors."""
    x, mask = operands(x, mask)
    if chosen == "native":
        values, counts = torch.ops.minitron_kernels.importance_moments.default(
            x, mask, cu_seqlens, num_heads, moment_flags
        )
    elif chosen == "triton":
        values, counts = _moments_triton(x, mask, cu_seqlens, num_heads, moment_flags)
    else:
        values, counts = reference.importance_moments(x, mask, cu_seqlens, num_heads, moment_flags)
    return Moments(values, counts, moment_flags)


def operands(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Activations and mask as kernels take them: channels side by side, the mask contiguous."""
    return with_unit_stride(x), None if mask is None else mask.contiguous()


def rows_of(x: Tensor, y: Tensor | None, backend: str) -> Tensor:
    """[N, D] -> [N] float32: ‖x‖₂, or 1 − cos(x, y)."""
    return rows_by(backend_for(x, backend), x, y)


def rows_by(chosen: str, x: Tensor, y: Tensor | None) -> Tensor:
    """rows_of() by the backend `chosen`, as backend_for() gives it."""
    x, y = with_unit_stride(x), None if y is None else with_unit_stride(y)
    if chosen == "native":
        return torch.ops.minitron_kernels.importance_rows.default(x, y)
    if chosen == "triton":
        return _rows_triton(x, y)
    return reference.importance_rows(x, y)


def _per_value(counts: Tensor, values: int) -> Tensor:
    """[B] or [B, G] counts -> float64 that broadcasts against [B, values]."""
    if counts.dim() == 1:
        return counts.double()[:, None]
    return counts.double().repeat_interleave(values // max(counts.shape[1], 1), dim=1)


def combine(moments: Moments, group: ProcessGroup | None) -> Moments:
    """The moments of whole sequences, in float64, where each rank of a context-parallel group has pieces."""
    values, counts = moments.values.double(), moments.counts.clone()
    local = _per_value(moments.counts, values.shape[-1])
    torch.distributed.all_reduce(counts, group=group)
    centred = None
    if moments.flags & reference.CENTRED:
        local_mean = values[-2] / local.clamp(min=1)
        centred = values[-1]
        values = values[:-1].contiguous()
    torch.distributed.all_reduce(values, group=group)
    if centred is not None:
        # Chan et al. 1979: Σ(v − v̄)² of the union is the parts' own, plus each part's count times the square
        # of its mean's distance from the union's mean
        mean = values[-1] / _per_value(counts, values.shape[-1]).clamp(min=1)
        centred = centred + local * (local_mean - mean).square()
        torch.distributed.all_reduce(centred, group=group)
        values = torch.cat([values, centred[None]])
    return Moments(values, counts, moments.flags)


# custom_op reads the schema off the signature: the arguments are those of the native ops, in their order
@opaque_op("minitron_kernels::importance_moments_triton")
def _moments_triton(
    x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, num_heads: int, moment_flags: int
) -> tuple[Tensor, Tensor]:
    from minitron_kernels.ops.importance.kernel_triton import importance_moments

    return importance_moments(x, mask, cu_seqlens, num_heads, moment_flags)


@opaque_op("minitron_kernels::importance_rows_triton")
def _rows_triton(x: Tensor, y: Tensor | None) -> Tensor:
    from minitron_kernels.ops.importance.kernel_triton import importance_rows

    return importance_rows(x, y)


def _fake_moments(
    x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, num_heads: int, moment_flags: int
) -> tuple[Tensor, Tensor]:
    B = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    values = x.new_empty((num_moments(moment_flags), B, num_heads or x.shape[-1]), dtype=torch.float32)
    return values, x.new_empty((B,), dtype=torch.int64)


def _fake_rows(x: Tensor, y: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0],), dtype=torch.float32)


for _suffix in ("_triton", "") if _native.available() else ("_triton",):
    torch.library.register_fake(f"minitron_kernels::importance_moments{_suffix}", _fake_moments)
    torch.library.register_fake(f"minitron_kernels::importance_rows{_suffix}", _fake_rows)
if _native.available():
    for _name in ("importance_add_", "importance_accumulate_"):
        torch.library.register_fake(f"minitron_kernels::{_name}", lambda *_: None)
