"""From activations to a smaller model: scores, a plan, the cut."""

from minitron_kernels.pruning.scores import ImportanceScores

__all__ = ["ImportanceScores"]
