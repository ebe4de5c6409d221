"""Which divergence a call computes, and what is kept of a row: the numbers that all backends share."""

from __future__ import annotations

import enum

# columns of `stats`, [N, NUM_STATS]: max_s, 1 / sum_s, max_t, 1 / sum_t, lse_diff, kl; Stat in
# csrc/kl_loss/loss_options.h, whose number and last column a test compares
NUM_STATS = 6
STAT_KL = 5
# what a part of the vocabulary leaves of a row, mergeable: max_s, sum_s, max_t, sum_t, kl
NUM_STATE = 5
# columns of `metrics`, [N, NUM_METRICS]: 1 / sum_y, cross-entropy, entropy, log p(label) at temperature 1;
# Metric there
NUM_METRICS = 4
METRIC_CE = 1
# what a part of the vocabulary leaves of them, mergeable with its max_s: sum_y, dot_y, total_y, label;
# MetricState there
NUM_METRIC_STATE = 4
# JSD's second look: terms of KL(T || M) and of KL(S || M)
NUM_SUMS = 2


class Divergence(enum.Enum):
    """As in csrc/kl_loss/loss_options.h; the numbers are those that the Triton kernels are compiled with."""

    FORWARD_KL = 0  # KL(teacher || student)
    REVERSE_KL = 1  # KL(student || teacher)
    JSD = 2  # beta KL(teacher || M) + (1 - beta) KL(student || M), M = beta teacher + (1 - beta) student

    @staticmethod
    def of(beta: float) -> Divergence:
        """Of the one number by which the ops know the divergence: 0 and 1 are JSD's limits, scaled."""
        if beta <= 0:
            return Divergence.FORWARD_KL
        return Divergence.REVERSE_KL if beta >= 1 else Divergence.JSD

    @property
    def needs_second_look(self) -> bool:
        """Whether its loss can only be summed once each row's normalisers are known."""
        return self is Divergence.JSD
