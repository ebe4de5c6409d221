"""Plans linear_kl_loss on the CPU: which schedule, how many rows at a time, and what memory that takes.

    store      for a chunk of tokens: all logits of both models are kept, then turned into gradients.
               4 GEMMs. Where the budget ends, the last tiles of the vocabulary are made twice instead.
               Several chunks add their head gradients in fp32.
    recompute  a group of vocabulary tiles at a time: logits once for the sums, again for the gradient.
               6 GEMMs (8 for JSD), memory that does not grow with the vocabulary.
    forward    no gradient needed: logits are reduced and dropped. 2 GEMMs (4 for JSD).

A sparse teacher has no logits: 3, 4 and 1 GEMMs.

planner_cpu.py has the search; here is what a plan follows from.
"""

from __future__ import annotations

import functools

import torch

from minitron_kernels.ops.kl_loss.blocks_cpu import Caches
from minitron_kernels.ops.kl_loss.budget import CPU_WORKSPACE_BYTES
from minitron_kernels.ops.kl_loss.engines_cpu import ENGINES, copies_head, operand_type
from minitron_kernels.ops.kl_loss.plan import grad_dtype
from minitron_kernels.ops.kl_loss.planner_cpu import CpuPlan, Planner

__all__ = ["ENGINES", "CpuPlan", "operand_type", "plan"]


def plan(
    num_tokens: int,
    vocab_size: int,
    student_hidden_size: int,
    teacher_hidden_size: int,
    *,
    dtype: torch.dtype,
    grad_hidden: bool,
    grad_head: bool,
    grad_bias: bool,
    grad_head_accumulator: bool,
    divergence_needs_kl: bool,
    schedule: str,
    workspace_bytes: int | None,
    engine: str,
    metrics: bool = False,
    outcomes: int = 0,
    lent: bool = False,
) -> CpuPlan:
    """The cheapest plan within the budget; see plan_linear_kl_loss() for the arguments and errors.

    dtype: of the student's head. outcomes: k + 1 of a sparse teacher, whose hidden size is 0; 0 for a
    teacher with a head. lent: whether the head's gradient goes to memory of the caller's.
    """
    return _plan(
        num_tokens,
        vocab_size,
        student_hidden_size,
        teacher_hidden_size,
        dtype,
        grad_hidden,
        grad_head,
        grad_bias,
        grad_head_accumulator,
        divergence_needs_kl,
        schedule,
        CPU_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes,
        engine,
        metrics,
        outcomes,
        lent,
        torch.get_num_threads(),
        Caches.of_this_cpu(),
    )


# all that a plan follows from is among the arguments: what is not would give another call's plan
@functools.lru_cache(maxsize=256)
def _plan(
    num_tokens: int,
    vocab_size: int,
    student_hidden_size: int,
    teacher_hidden_size: int,
    dtype: torch.dtype,
    grad_hidden: bool,
    grad_head: bool,
    grad_bias: bool,
    grad_head_accumulator: bool,
    divergence_needs_kl: bool,
    schedule: str,
    budget: int,
    engine: str,
    metrics: bool,
    outcomes: int,
    lent: bool,
    threads: int,
    caches: Caches,
) -> CpuPlan:
    storage, dtype = dtype, grad_dtype(dtype)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    planner = Planner(
        num_tokens,
        vocab_size,
        student_hidden_size,
        teacher_hidden_size,
        engine=engine,
        accumulate_bytes=accumulate.itemsize,
        grad_hidden=grad_hidden,
        grad_head=grad_head,
        head_in_place=grad_head_accumulator or dtype == accumulate,
        adds_to_buffer=grad_head_accumulator,
        divergence_needs_kl=divergence_needs_kl,
        budget=budget,
        threads=threads,
        metrics=metrics,
        outcomes=outcomes,
        converts_head=copies_head(engine, storage),
        grad_head_bytes=dtype.itemsize,
        lent=lent,
        caches=caches,
    )
    return planner.plan(schedule if grad_hidden or grad_head or grad_bias else "forward")
