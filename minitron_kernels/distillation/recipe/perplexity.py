"""The mean cross-entropy of the next token of a model on windows of text, without logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from minitron_kernels.distillation.causal_lm import attach
from minitron_kernels.distillation.loss import DistillationLoss
from minitron_kernels.distillation.stepping import step
from minitron_kernels.distillation.text_teacher import TextTeacher


def mean_loss(model: Any, batches: Iterable[Tensor]) -> tuple[float, int]:
    """(mean, number of predicted tokens) of -log softmax(logits of token i)[token i + 1], in nats.

    Args:
        model: a causal language model; it stays attached, and in eval mode.
        batches: [B, T] int64; every token but the first of each row is predicted.
    """
    attach(model).eval()
    device = next(model.parameters()).device
    loss = DistillationLoss(kl_weight=0.0, ce_weight=1.0)
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in batches:
            batch = {"input_ids": ids.to(device), "labels": ids.to(device)}
            record = step(model, TextTeacher(), batch, loss)
            tokens = int(record.num_tokens)
            assert record.ce is not None
            total += float(record.ce) * tokens
            count += tokens
    if not count:
        raise ValueError("batches must hold tokens to predict, got none")
    return total / count, count
