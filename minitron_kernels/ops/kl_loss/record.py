"""What return_parts=True returns, and the terms of tokens that it is made of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LossRecord(NamedTuple):
    """A loss and its parts. All but `loss` are detached, and none makes the host wait for a GPU.

    Each is reduced as the loss is, with the same divisor and token weights, so that
    loss = kl_weight kl + ce_weight ce; with reduction="none" each is [...], 0 at tokens that do not count.
    The KL is that of `temperature`, times its square with temperature_squared. Cross-entropy, entropy and
    log p(label) are those of the student at temperature 1, as F.cross_entropy has it.
    """

    loss: Tensor
    kl: Tensor
    ce: Tensor | None  # None without labels
    entropy: Tensor
    label_logprob: Tensor | None  # None without labels
    num_tokens: Tensor  # 0-dim int64, those that count


class TokenTerms(NamedTuple):
    """The terms of each token, [N]; those that nobody asked for are None."""

    kl: Tensor
    ce: Tensor | None = None
    entropy: Tensor | None = None
    label_logprob: Tensor | None = None
