"""From activations to a smaller model: scores, a plan, the cut."""

from minitron_kernels.pruning.collect import collect_importance
from minitron_kernels.pruning.plot import plot_importance
from minitron_kernels.pruning.scores import ImportanceScores

__all__ = ["ImportanceScores", "collect_importance", "plot_importance"]
