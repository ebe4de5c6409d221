"""From activations to a smaller model: score, plan what stays, then cut a model or a checkpoint."""

from minitron_kernels.pruning.checkpoint import PrunedCheckpoint, prune_checkpoint
from minitron_kernels.pruning.collect import collect_importance
from minitron_kernels.pruning.cuts import Cut, Cuts
from minitron_kernels.pruning.families import Family, Located, Param, Taps, known_families, register_family
from minitron_kernels.pruning.model import prune_model
from minitron_kernels.pruning.plan import make_plan
from minitron_kernels.pruning.plot import plot_importance
from minitron_kernels.pruning.pruning_plan import PruningPlan
from minitron_kernels.pruning.scores import ImportanceScores
from minitron_kernels.pruning.sizes import Candidate, find_sizes

__all__ = [
    "Candidate",
    "Cut",
    "Cuts",
    "Family",
    "ImportanceScores",
    "Located",
    "Param",
    "PrunedCheckpoint",
    "PruningPlan",
    "Taps",
    "collect_importance",
    "find_sizes",
    "known_families",
    "make_plan",
    "plot_importance",
    "prune_checkpoint",
    "prune_model",
    "register_family",
]
