"""The loss in a plan: what linear_kl_loss holds and sends, and what the way with full logits does."""

from __future__ import annotations

from typing import Any

import torch

from minitron_kernels.distillation.scale.parts import BACKWARD, LOSS, Collective, Part
from minitron_kernels.distillation.scale.shape import ModelShape
from minitron_kernels.ops.kl_loss.divergence import NUM_METRIC_STATE, NUM_METRICS, NUM_STATE, NUM_STATS
from minitron_kernels.ops.kl_loss.op_plan import plan_linear_kl_loss
from minitron_kernels.ops.kl_loss.plan import LinearKLPlan, grad_dtype

HANDSHAKE_BYTES = 64  # each rank says how it calls: find_shard.py
# Of F.kl_div(log_softmax(student_logits.float()), softmax(teacher_logits.float())), forward and backward: the
# most that lives at once for each pair of logits, by the bytes of a logit. A test measures it.
STOCK_LOGIT_BYTES = {2: 24, 4: 28}


def loss_plan(
    student: ModelShape, teacher: ModelShape, tokens: int, dtypes: tuple[torch.dtype, torch.dtype], **how: Any
) -> LinearKLPlan:
    """What plan_linear_kl_loss() says of one rank's call; `how` are more of its arguments."""
    dtype, teacher_dtype = dtypes
    if torch.device(how["device"]).type == "cuda":
        how["tp_size"] = student.tp
    sizes = (tokens, student.rows_of_vocab, student.hidden, teacher.hidden)
    return plan_linear_kl_loss(*sizes, dtype=dtype, teacher_dtype=teacher_dtype, **how)


def loss_parts(
    plan: LinearKLPlan, dtype: torch.dtype, tp: int, parts_wanted: bool, on_cpu: bool
) -> list[Part]:
    """Memory of a call: its scratch, and the outputs that autograd keeps from its forward to its backward."""
    tokens, hidden, size = plan.num_tokens, plan.student_hidden_size, grad_dtype(dtype).itemsize
    numbers = 1 + NUM_STATS + NUM_METRICS * parts_wanted
    scratch = plan.total_bytes
    if on_cpu and tp > 1 and size < 4:
        scratch += 4 * tokens * hidden  # the sum over ranks, which a GPU's plan counts
    return [
        Part("the loss: scratch memory", scratch, (LOSS,)),
        Part("the loss: losses and statistics of tokens", 4 * numbers * tokens, (LOSS,)),
        Part("the loss: gradient to the hidden states", size * tokens * hidden, (LOSS, BACKWARD)),
        Part("the loss: gradient to the head", size * plan.vocab_size * hidden, (LOSS, BACKWARD)),
    ]


def exchanges(plan: LinearKLPlan) -> int:
    """How often the ranks of tp exchange what they know of tokens: once a chunk of rows."""
    dz_rows = getattr(plan, "dz_rows", None)
    if dz_rows is None:
        return 1  # on a CPU once a call
    if plan.schedule == "recompute":
        return -(-plan.num_tokens // plan.chunk_rows)
    whole, rest = divmod(plan.num_tokens, dz_rows)
    return whole * -(-dz_rows // plan.chunk_rows) + -(-rest // plan.chunk_rows)


def loss_collectives(plan: LinearKLPlan, tp: int, parts_wanted: bool, micro_steps: int) -> list[Collective]:
    """What a step's calls exchange over tp; see vocab_parallel.py."""
    numbers = NUM_STATE + NUM_METRIC_STATE * parts_wanted
    states = HANDSHAKE_BYTES + 4 * numbers * plan.num_tokens
    gradient = 4 * plan.num_tokens * plan.student_hidden_size
    count = 1 + exchanges(plan)
    return [
        Collective(
            "the loss: statistics of tokens",
            "all-gather",
            "tp",
            tp,
            micro_steps * count,
            micro_steps * states,
        ),
        Collective(
            "the loss: gradient to the hidden states",
            "all-reduce",
            "tp",
            tp,
            micro_steps,
            micro_steps * gradient,
        ),
    ]


def stock_parts(plan: LinearKLPlan, vocab: int, dtype: torch.dtype) -> list[Part]:
    """Memory of the way with full logits, on every rank of the whole vocabulary."""
    logits = STOCK_LOGIT_BYTES[dtype.itemsize] * plan.num_tokens * vocab
    head = dtype.itemsize * plan.vocab_size * plan.student_hidden_size
    return [
        Part("full logits of both models, and what softmax and KL make of them", logits, (LOSS,)),
        Part("gradient to the head", head, (BACKWARD,)),
    ]


def stock_collectives(
    plan: LinearKLPlan, dtypes: tuple[torch.dtype, torch.dtype], tp: int, micro_steps: int
) -> list[Collective]:
    """Both models' logits are gathered, and the gradient to the hidden states is summed over the ranks."""
    pairs = micro_steps * plan.num_tokens * plan.vocab_size
    gradient = micro_steps * dtypes[0].itemsize * plan.num_tokens * plan.student_hidden_size
    return [
        Collective(f"full logits of the {name}", "all-gather", "tp", tp, micro_steps, dtype.itemsize * pairs)
        for name, dtype in zip(("student", "teacher"), dtypes, strict=True)
    ] + [Collective("gradient to the hidden states", "all-reduce", "tp", tp, micro_steps, gradient)]
