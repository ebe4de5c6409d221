"""Kernels for Minitron: score the activations of a big model, cut the least useful channels, distil.

`python -m minitron_kernels` tells what is built and which backend serves each op on this machine.
"""

from minitron_kernels._workspace import release_workspaces, workspace_bytes_held
from minitron_kernels.ops.kl_loss.modules import KLLoss, LinearKLLoss
from minitron_kernels.ops.kl_loss.op import kl_loss, linear_kl_loss
from minitron_kernels.ops.kl_loss.plan import LinearKLPlan, plan_linear_kl_loss

__version__ = "0.1.0"
__all__ = [
    "KLLoss",
    "LinearKLLoss",
    "LinearKLPlan",
    "kl_loss",
    "linear_kl_loss",
    "plan_linear_kl_loss",
    "release_workspaces",
    "workspace_bytes_held",
]
