"""From activations to a smaller model: score, plan what stays, then cut a model or a checkpoint."""

from typing import TYPE_CHECKING

from minitron_kernels._lazy import attach

if TYPE_CHECKING:
    from minitron_kernels.pruning.checkpoint.prune import PrunedCheckpoint, prune_checkpoint
    from minitron_kernels.pruning.cut.cuts import Cut, Cuts
    from minitron_kernels.pruning.cut.model import prune_model
    from minitron_kernels.pruning.families.family import Family, Located, Param, Taps
    from minitron_kernels.pruning.families.multimodal import Multimodal
    from minitron_kernels.pruning.families.registry import (
        family_of,
        known_families,
        register_family,
        register_multimodal,
    )
    from minitron_kernels.pruning.families.states import State
    from minitron_kernels.pruning.families.stored_names import StoredNames
    from minitron_kernels.pruning.plan.counts import Usage, count_usage
    from minitron_kernels.pruning.plan.find_sizes import Candidate, find_sizes
    from minitron_kernels.pruning.plan.make_plan import make_plan
    from minitron_kernels.pruning.plan.pruning_plan import PruningPlan
    from minitron_kernels.pruning.plan.runtimes import runtime_notes
    from minitron_kernels.pruning.score.collect import collect_importance
    from minitron_kernels.pruning.score.plot import plot_importance
    from minitron_kernels.pruning.score.scores import ImportanceScores
    from minitron_kernels.pruning.search.lm_loss import LMLoss
    from minitron_kernels.pruning.search.search_layers import LayerSearch, search_layers
    from minitron_kernels.pruning.search.search_plan import PlanSearch, search_plan

__all__ = [
    "Candidate",
    "Cut",
    "Cuts",
    "Family",
    "ImportanceScores",
    "LMLoss",
    "LayerSearch",
    "Located",
    "Multimodal",
    "Param",
    "PlanSearch",
    "PrunedCheckpoint",
    "PruningPlan",
    "State",
    "StoredNames",
    "Taps",
    "Usage",
    "collect_importance",
    "count_usage",
    "family_of",
    "find_sizes",
    "known_families",
    "make_plan",
    "plot_importance",
    "prune_checkpoint",
    "prune_model",
    "register_family",
    "register_multimodal",
    "runtime_notes",
    "search_layers",
    "search_plan",
]
# where they are
_HOMES = {
    "Candidate": "minitron_kernels.pruning.plan.find_sizes",
    "Cut": "minitron_kernels.pruning.cut.cuts",
    "Cuts": "minitron_kernels.pruning.cut.cuts",
    "Family": "minitron_kernels.pruning.families.family",
    "ImportanceScores": "minitron_kernels.pruning.score.scores",
    "LMLoss": "minitron_kernels.pruning.search.lm_loss",
    "LayerSearch": "minitron_kernels.pruning.search.search_layers",
    "Located": "minitron_kernels.pruning.families.family",
    "Multimodal": "minitron_kernels.pruning.families.multimodal",
    "Param": "minitron_kernels.pruning.families.family",
    "PlanSearch": "minitron_kernels.pruning.search.search_plan",
    "PrunedCheckpoint": "minitron_kernels.pruning.checkpoint.prune",
    "PruningPlan": "minitron_kernels.pruning.plan.pruning_plan",
    "State": "minitron_kernels.pruning.families.states",
    "StoredNames": "minitron_kernels.pruning.families.stored_names",
    "Taps": "minitron_kernels.pruning.families.family",
    "Usage": "minitron_kernels.pruning.plan.counts",
    "collect_importance": "minitron_kernels.pruning.score.collect",
    "count_usage": "minitron_kernels.pruning.plan.counts",
    "family_of": "minitron_kernels.pruning.families.registry",
    "find_sizes": "minitron_kernels.pruning.plan.find_sizes",
    "known_families": "minitron_kernels.pruning.families.registry",
    "make_plan": "minitron_kernels.pruning.plan.make_plan",
    "plot_importance": "minitron_kernels.pruning.score.plot",
    "prune_checkpoint": "minitron_kernels.pruning.checkpoint.prune",
    "prune_model": "minitron_kernels.pruning.cut.model",
    "register_family": "minitron_kernels.pruning.families.registry",
    "register_multimodal": "minitron_kernels.pruning.families.registry",
    "runtime_notes": "minitron_kernels.pruning.plan.runtimes",
    "search_layers": "minitron_kernels.pruning.search.search_layers",
    "search_plan": "minitron_kernels.pruning.search.search_plan",
}

if not TYPE_CHECKING:  # else every name would be known to a type checker
    __getattr__, __dir__ = attach(__name__, _HOMES)
