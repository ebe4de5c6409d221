"""The tokens of a call: which count, with which label and weight, and how their terms become its result."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_kernels.ops.kl_loss.checks import check_tensor, number, positive
from minitron_kernels.ops.kl_loss.labels import check_per_token, row_labels, rows_mask
from minitron_kernels.ops.kl_loss.options import as_scalar
from minitron_kernels.ops.kl_loss.record import LossRecord, TokenTerms
from minitron_kernels.ops.kl_loss.reduction import row_factor
from minitron_kernels.ops.kl_loss.sums import sum_rows


@dataclass(frozen=True)
class Tokens:
    """Made by of(). Rows are the tokens in one dimension, [N]."""

    shape: torch.Size
    device: torch.device
    valid: Tensor | None  # rows that count; None for all
    computed: Tensor | None  # those of them whose weight is not 0
    targets: Tensor | None  # int64, -1 at rows that do not count; None without labels
    token_weights: Tensor | None  # 0 at rows that do not count
    kl_weight: float
    ce_weight: float
    temperature_squared: float | None  # of the KL; None where it is not asked for
    reduction: str
    scale: float
    divisor: Tensor | None  # 0-dim
    return_parts: bool

    @staticmethod
    def of(
        student: Tensor,
        labels: Tensor | None,
        ignore_index: int,
        mask: Tensor | None,
        token_weights: Tensor | None,
        *,
        kl_weight: float,
        ce_weight: float,
        temperature: float | None,
        reduction: str,
        num_items: float | Tensor | None,
        return_parts: bool,
        vocab_sizes: tuple[int, int],
        shape: torch.Size | None = None,
    ) -> Tokens:
        """Checks what is said of the tokens of `student`, [..., C], or of `shape`.

        temperature: where the KL carries its square. vocab_sizes: the tokens that are shared, and those that
        a label may name where it only says which tokens count.
        """
        shape, device = student.shape[:-1] if shape is None else shape, student.device
        kl_weight, ce_weight = (
            value if number(name, value) == 0 else positive(name, value)
            for name, value in (("kl_weight", kl_weight), ("ce_weight", ce_weight))
        )
        if ce_weight and labels is None:
            raise ValueError(f"ce_weight={ce_weight} needs labels, the targets of the cross-entropy")
        looks_up = bool(ce_weight) or return_parts
        valid = rows_mask(labels, ignore_index, mask, shape, vocab_sizes[0 if looks_up else 1], device)
        scale, divisor = row_factor(reduction, num_items, shape.numel(), valid)
        weights = _token_weights(token_weights, valid, student, shape)
        computed = valid
        if weights is not None:  # a token of weight 0 adds nothing, even if its loss is infinite
            computed = weights != 0 if valid is None else valid & (weights != 0)
        return Tokens(
            shape,
            device,
            valid,
            computed,
            row_labels(labels, valid) if looks_up else None,
            weights,
            kl_weight,
            ce_weight,
            None if temperature is None else temperature * temperature,
            reduction,
            scale,
            divisor,
            return_parts,
        )

    @property
    def needs_metrics(self) -> bool:
        """Whether more than the KL is to be computed."""
        return self.return_parts or bool(self.ce_weight)

    @property
    def _kl_factor(self) -> float | None:
        if self.temperature_squared is None:
            return None if self.kl_weight == 1 else self.kl_weight
        return self.kl_weight * self.temperature_squared

    def row_weights(self) -> tuple[Tensor | None, Tensor | None]:
        """What each row's KL and cross-entropy are multiplied by in the loss: 0-dim float64, or [N].

        None and None for reduction="none"; the second None where there is no cross-entropy in the loss.
        """
        if self.reduction == "none":
            return None, None
        kl_factor = 1.0 if self._kl_factor is None else self._kl_factor
        return self._row_weight(kl_factor), self._row_weight(self.ce_weight) if self.ce_weight else None

    def _row_weight(self, factor: float) -> Tensor:
        weight = as_scalar(self.scale * factor, self.device)
        weight = weight if self.divisor is None else weight * self.divisor
        return weight if self.token_weights is None else self.token_weights * weight

    def loss(self, terms: TokenTerms) -> Tensor:
        """The loss out of each token's terms."""
        if terms.ce is None or not self.ce_weight:
            return self._reduced(terms.kl, self._kl_factor)
        ce = self._reduced(terms.ce, self.ce_weight)
        return ce if self.kl_weight == 0 else self._reduced(terms.kl, self._kl_factor) + ce

    def result(self, loss: Tensor, terms: TokenTerms | None) -> Tensor | LossRecord:
        """What the call returns, of a loss that has been reduced."""
        if not self.return_parts:
            return loss
        assert terms is not None and terms.entropy is not None
        kl, entropy = self._reduced(terms.kl.detach(), self.temperature_squared), terms.entropy.detach()
        ce, label_logprob = (
            None if x is None or self.targets is None else self._reduced(x.detach())
            for x in (terms.ce, terms.label_logprob)
        )
        if self.valid is None:
            count = torch.full((), self.shape.numel(), dtype=torch.int64, device=self.device)
        else:
            count = self.valid.sum()
        return LossRecord(loss, kl, ce, self._reduced(entropy), label_logprob, count)

    def _reduced(self, rows: Tensor, factor: float | None = None) -> Tensor:
        """[N] -> 0-dim, or [...] for "none"; times `factor`."""
        if self.token_weights is not None:
            rows = rows * self.token_weights
        if self.reduction == "none":
            return (rows if factor is None else rows * factor).reshape(self.shape)
        total, scale = sum_rows(rows), self.scale if factor is None else self.scale * factor
        return total * scale if self.divisor is None else total * (self.divisor * scale).to(total.dtype)


def _token_weights(
    token_weights: Tensor | None, valid: Tensor | None, student: Tensor, shape: torch.Size
) -> Tensor | None:
    """[N] in the dtype of the loss, 0 at rows that do not count, whatever stood there."""
    if token_weights is None:
        return None
    check_tensor("token_weights", token_weights)
    check_per_token("token_weights", token_weights, shape, student.device)
    if not token_weights.is_floating_point():
        raise TypeError(f"token_weights must be floating point, got {token_weights.dtype}")
    if token_weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "token_weights requires grad, but no gradient flows to it: pass token_weights.detach()"
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    weights = token_weights.detach().reshape(-1).to(dtype)
    return weights if valid is None else torch.where(valid, weights, 0.0)
