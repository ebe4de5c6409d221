"""Which function of the library belongs to which part of a call."""

from __future__ import annotations

import torch

import minitron_kernels as mk
from minitron_kernels import _workspace
from minitron_kernels.ops.gather import op as gather
from minitron_kernels.ops.gather import optimizer
from minitron_kernels.ops.importance import op as importance
from minitron_kernels.ops.kl_loss import linear, linear_cpu, op, rows, sparse
from minitron_kernels.ops.kl_loss.tokens import Tokens
from overhead_rows.stopwatch import Boundary, Stopwatch

CHECKS = "checks and options"
TOKENS = "tokens and their weights"
TEACHER = "a sparse teacher's ids: checked, sorted"
INDEX = "indices, checked"
AUTOGRAD = "autograd: the way in"
BEFORE = "outputs and operands"
PLAN = "plan"
WORKSPACE = "workspace"
NATIVE = "native"
SUMS = "sums over tokens"
EACH = "gather_channels of each moment"
BACKWARD = "autograd: the backward of the loss"
ENGINE = "autograd: its engine; the caller's loop"
PARTS = (
    *(CHECKS, TOKENS, TEACHER, INDEX, AUTOGRAD, BEFORE, PLAN, WORKSPACE, NATIVE, SUMS, EACH),
    *(BACKWARD, ENGINE),
)
PUBLIC = (
    "kl_loss",
    "linear_kl_loss",
    "linear_sparse_kl_loss",
    "gather_channels",
    "accumulate_importance_",
    "gather_optimizer_state_",
)
OPS = (
    "linear_kl_loss_cpu_",
    "linear_sparse_kl_loss_cpu_",
    "kl_loss_forward",
    "kl_loss_backward",
    "kl_scale_grad_",
    "gather_channels_",
)


def watch() -> Stopwatch:
    """Times the library's parts; outside of all of them is the autograd engine's time, and the caller's."""
    ops = torch.ops.minitron_kernels
    return Stopwatch(
        [
            *(Boundary(mk, name, CHECKS) for name in PUBLIC),
            Boundary(Tokens, "of", TOKENS),
            Boundary(Tokens, "row_weights", TOKENS),
            Boundary(sparse, "sparse_teacher", TEACHER),
            Boundary(gather, "_index", INDEX),
            *(Boundary(module, "linear_result", AUTOGRAD) for module in (op, sparse)),
            Boundary(op, "kl_rows", AUTOGRAD),
            Boundary(linear, "linear_kl_loss_op", BEFORE),
            Boundary(linear_cpu, "plan", PLAN),
            Boundary(_workspace, "borrow", WORKSPACE, lends=True),
            *(Boundary(ops, name, NATIVE) for name in OPS),
            Boundary(importance, "_accumulate_native", BEFORE),
            Boundary(ops.importance_accumulate_, "default", NATIVE),
            Boundary(linear, "_weighted_sum", SUMS),
            Boundary(Tokens, "loss", SUMS),
            Boundary(optimizer, "gather_channels", EACH),
            Boundary(linear._Reduced, "backward", BACKWARD),
            Boundary(rows._Rows, "backward", BACKWARD),
        ],
        ENGINE,
    )
