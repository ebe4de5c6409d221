"""The primitives of importance in plain torch: the definition, any dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor

ABS, SQUARE, CENTRED = 1, 2, 4  # flags of the moments to add up: |v|; v²; v and (v − mean)²


def importance_moments(
    x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, num_heads: int, moment_flags: int
) -> tuple[Tensor, Tensor]:
    """x [B, S, C] or [T, C] -> moments [moments, B, M] and counts [B] int64, as the native op.

    Moments are float32, of float64 activations float64.
    """
    tokens, owner, B = _flat(x, cu_seqlens)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    v = tokens.to(wide)
    if num_heads:
        v = torch.linalg.vector_norm(v.unflatten(-1, (num_heads, -1)), dim=-1)
    valid = torch.ones_like(owner) if mask is None else mask.reshape(-1).long()
    v = v.masked_fill(valid[:, None] == 0, 0.0)  # masked tokens may hold NaN
    counts = torch.zeros(B, dtype=torch.int64, device=x.device).index_add_(0, owner, valid)

    def total(values: Tensor) -> Tensor:
        zeros = torch.zeros(B, v.shape[1], dtype=torch.float64, device=x.device)
        return zeros.index_add_(0, owner, values.double())

    moments = []
    if moment_flags & ABS:
        moments.append(total(v.abs()))
    if moment_flags & SQUARE:
        moments.append(total(v.double().square()))
    if moment_flags & CENTRED:
        moments.append(total(v))
        mean = moments[-1] / counts.clamp(min=1)[:, None]
        moments.append(total((v.double() - mean[owner]).square() * valid[:, None]))
    return torch.stack(moments).to(wide), counts


def importance_rows(x: Tensor, y: Tensor | None) -> Tensor:
    """[N, D] -> [N]: ‖x‖₂, or 1 − cos(x, y), which is 1 where a row is zero."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(x.double(), dim=-1)
    if y is None:
        return norm.to(wide)
    norms = norm * torch.linalg.vector_norm(y.double(), dim=-1)
    distance = (norms - (x.double() * y.double()).sum(-1)) / norms
    return torch.where(norms == 0, 1.0, distance.clamp(min=0)).to(wide)


def _flat(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Tokens [T, C], the sequence that each belongs to [T], and how many sequences there are."""
    if cu_seqlens is None:
        B, S, C = x.shape
        owner = torch.arange(B, device=x.device).repeat_interleave(S)
        return x.reshape(B * S, C), owner, B
    at = torch.arange(x.shape[0], device=x.device)
    owner = torch.searchsorted(cu_seqlens[1:].contiguous(), at, right=True)
    return x, owner, cu_seqlens.numel() - 1
