"""What a model says about a batch: hidden states and the head that makes logits of them, or cached tokens.

DenseSignal is both the student's and a live teacher's. Every tensor has one row a position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class DenseSignal:
    """A model's logits, as what they are made of: softcap(logit_scale (hidden headᵀ + bias))."""

    hidden: Tensor  # [..., H], what the head multiplies: after the final norm
    head: Tensor  # [V, H]; may be a DTensor
    bias: Tensor | None = None  # [V]
    logit_scale: float = 1.0
    softcap: float | None = None
    # {layer: its output [..., H]}; layers count from 0, and the last one's output is `hidden`, normed
    layers: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class SparseSignal:
    """A teacher's k tokens a position and what all others have together: see linear_sparse_kl_loss()."""

    ids: Tensor  # [..., k] int64; -1 fills a position up
    logprobs: Tensor  # [..., k] float32
    # [...], or {temperature: [...]}; None: the ids are sampled
    log_tail: Tensor | Mapping[float, Tensor] | None
    layers: Mapping[int, Tensor] = field(default_factory=dict)  # as in DenseSignal, where a cache keeps them
    vocab_size: int | None = None  # V of the teacher, where it is known: that of the student must be the same


TeacherSignal = DenseSignal | SparseSignal
