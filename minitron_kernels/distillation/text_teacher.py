"""TextTeacher: the next token of the text as a teacher, so that trainers can train by cross-entropy alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from minitron_kernels.distillation.signals import SparseSignal


class TextTeacher:
    """A Teacher that gives the next token of each sequence probability 1; no model runs.

        KL(onehot ‖ q) = -log q[next token]

    With DistillationLoss(kl_weight=0, ce_weight=1) a trainer then computes the cross-entropy with the labels,
    from one product of hidden states and head. Positions without a label do not count, whatever is said of
    them here.

    Source: cross-entropy as the baseline of distillation, Minitron (arXiv 2407.14679) section 3.
    """

    def __call__(self, batch: Mapping[str, Any], layers: Iterable[int] = ()) -> SparseSignal:
        """The signal for a batch with `input_ids` [B, T].

        Raises:
            ValueError: no input_ids; outputs of layers, which a text does not have.
        """
        if layers := tuple(layers):
            raise ValueError(f"a text has no layer {layers[0]}: losses of hidden states need a ModelTeacher")
        if "input_ids" not in batch:
            raise ValueError(f"batch must have input_ids, whose next tokens teach, got {', '.join(batch)}")
        ids = batch["input_ids"].roll(-1, dims=-1)[..., None].long()
        return SparseSignal(ids, torch.zeros(ids.shape, device=ids.device), None)
