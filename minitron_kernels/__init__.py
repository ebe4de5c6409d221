"""Kernels for Minitron: score the activations of a big model, cut the least useful channels, distil.

`python -m minitron_kernels` shows what is built, and which backend serves each op on this machine.

Names are imported when they are asked for, so that commands which need no torch do not wait for it. Where
torch is loaded already all are imported at once: the ops are then under torch.ops.minitron_kernels.
"""

import sys
from typing import TYPE_CHECKING

from minitron_kernels._lazy import attach, load

if TYPE_CHECKING:
    from minitron_kernels._workspace import release_workspaces, workspace_bytes_held
    from minitron_kernels.ops.gather.index import ChannelIndex
    from minitron_kernels.ops.gather.op import gather_channels
    from minitron_kernels.ops.gather.optimizer import ParameterReplacement, gather_optimizer_state_
    from minitron_kernels.ops.importance.op import (
        accumulate_block_importance_,
        accumulate_expert_importance_,
        accumulate_importance_,
        head_scores_from_channels,
    )
    from minitron_kernels.ops.importance.state import ImportanceState, TokenMeanState
    from minitron_kernels.ops.kl_loss.heads import EffectiveHead, Head, head_of
    from minitron_kernels.ops.kl_loss.labels import shift_labels
    from minitron_kernels.ops.kl_loss.modules import KLLoss, LinearKLLoss, LinearSparseKLLoss
    from minitron_kernels.ops.kl_loss.op import kl_loss, linear_kl_loss
    from minitron_kernels.ops.kl_loss.op_plan import plan_linear_kl_loss
    from minitron_kernels.ops.kl_loss.plan import LinearKLPlan
    from minitron_kernels.ops.kl_loss.record import LossRecord
    from minitron_kernels.ops.kl_loss.sparse import linear_sparse_kl_loss, sparse_kl_loss

__version__ = "0.1.0"
__all__ = [
    "ChannelIndex",
    "EffectiveHead",
    "Head",
    "ImportanceState",
    "KLLoss",
    "LinearKLLoss",
    "LinearKLPlan",
    "LinearSparseKLLoss",
    "LossRecord",
    "ParameterReplacement",
    "TokenMeanState",
    "accumulate_block_importance_",
    "accumulate_expert_importance_",
    "accumulate_importance_",
    "gather_channels",
    "gather_optimizer_state_",
    "head_of",
    "head_scores_from_channels",
    "kl_loss",
    "linear_kl_loss",
    "linear_sparse_kl_loss",
    "plan_linear_kl_loss",
    "release_workspaces",
    "shift_labels",
    "sparse_kl_loss",
    "workspace_bytes_held",
]
# where they are
_HOMES = {
    "ChannelIndex": "minitron_kernels.ops.gather.index",
    "EffectiveHead": "minitron_kernels.ops.kl_loss.heads",
    "Head": "minitron_kernels.ops.kl_loss.heads",
    "ImportanceState": "minitron_kernels.ops.importance.state",
    "KLLoss": "minitron_kernels.ops.kl_loss.modules",
    "LinearKLLoss": "minitron_kernels.ops.kl_loss.modules",
    "LinearKLPlan": "minitron_kernels.ops.kl_loss.plan",
    "LinearSparseKLLoss": "minitron_kernels.ops.kl_loss.modules",
    "LossRecord": "minitron_kernels.ops.kl_loss.record",
    "ParameterReplacement": "minitron_kernels.ops.gather.optimizer",
    "TokenMeanState": "minitron_kernels.ops.importance.state",
    "accumulate_block_importance_": "minitron_kernels.ops.importance.op",
    "accumulate_expert_importance_": "minitron_kernels.ops.importance.op",
    "accumulate_importance_": "minitron_kernels.ops.importance.op",
    "gather_channels": "minitron_kernels.ops.gather.op",
    "gather_optimizer_state_": "minitron_kernels.ops.gather.optimizer",
    "head_of": "minitron_kernels.ops.kl_loss.heads",
    "head_scores_from_channels": "minitron_kernels.ops.importance.op",
    "kl_loss": "minitron_kernels.ops.kl_loss.op",
    "linear_kl_loss": "minitron_kernels.ops.kl_loss.op",
    "linear_sparse_kl_loss": "minitron_kernels.ops.kl_loss.sparse",
    "plan_linear_kl_loss": "minitron_kernels.ops.kl_loss.op_plan",
    "release_workspaces": "minitron_kernels._workspace",
    "shift_labels": "minitron_kernels.ops.kl_loss.labels",
    "sparse_kl_loss": "minitron_kernels.ops.kl_loss.sparse",
    "workspace_bytes_held": "minitron_kernels._workspace",
}

if not TYPE_CHECKING:  # else every name would be known to a type checker
    __getattr__, __dir__ = attach(__name__, _HOMES)


if "torch" in sys.modules:
    for _name in __all__:
        load(__name__, _HOMES, _name)
