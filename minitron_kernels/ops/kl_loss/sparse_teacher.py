"""A teacher of few tokens a position: its checks, and the k + 1 outcomes that a loss compares.

The outcomes of a position are its k ids and "any other token". Of a distribution over the vocabulary they
keep the probabilities of the ids and, in one, the rest: their KL is a lower bound of the whole one, and is
exact where student and teacher agree on how the rest divides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from minitron_kernels import _native
from minitron_kernels._opaque import opaque_op
from minitron_kernels.ops.kl_loss.checks import check_constant, check_tensor, positive

LogTail = Tensor | Mapping[float, Tensor] | None
_SLACK = 0.01  # of a row's probability: what 8-bit log-probabilities of many ids may add up to


class SparseTeacher(NamedTuple):
    """Made by sparse_teacher()."""

    ids: Tensor  # [N, k] int64, ascending in a row, -1 behind them
    outcomes: Tensor  # [N, k + 1]: their log-probabilities up to a constant, then that of any other token


def sparse_teacher(
    ids: Tensor,
    logprobs: Tensor,
    log_tail: LogTail,
    *,
    student: Tensor,
    shape: torch.Size,
    valid: Tensor | None,
    vocab_size: int,
    temperature: float,
    beta: float,
) -> SparseTeacher:
    """Checks what is given for tokens of `shape`, and brings it into the form of the kernels.

    `student`: in its dtype, on its device.

    `valid` [N]: rows that count, whose entries are looked at; None for all. See linear_sparse_kl_loss() for
    the rest.
    """
    device = student.device
    for name, x in (("ids", ids), ("logprobs", logprobs)):
        check_tensor(name, x)
        if x.dim() != len(shape) + 1 or x.shape[:-1] != shape:
            raise ValueError(f"{name} must be [..., k] with {tuple(shape)} before k, got {tuple(x.shape)}")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}, but the student is on {device}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be int64 or int32, got {ids.dtype}")
    if not logprobs.is_floating_point():
        raise TypeError(f"logprobs must be floating point, got {logprobs.dtype}")
    if ids.shape != logprobs.shape:
        raise ValueError(f"ids and logprobs differ in shape: {tuple(ids.shape)} and {tuple(logprobs.shape)}")
    tail = _tail_at(log_tail, temperature, shape, student)
    if tail is None and beta != 0:
        raise ValueError(
            "log_tail=None, for sampled ids, goes with divergence='forward_kl' alone: a token that was not "
            "sampled may have any probability"
        )
    check_constant("logprobs", logprobs)
    dtype, k = torch.promote_types(student.dtype, torch.float32), ids.shape[-1]
    if ids.dim() != 2:
        ids = ids.reshape(-1, k) if ids.numel() else ids.reshape(shape.numel(), k)
        logprobs = logprobs.reshape(shape.numel(), k)
    ids, outcomes = _sorted_outcomes(
        ids,
        logprobs.detach().to(dtype),
        None if tail is None else tail.detach().reshape(-1).to(dtype),
        valid,
        vocab_size,
        temperature == 1,
    )
    if temperature != 1:
        outcomes = torch.cat((outcomes[:, :-1] / temperature, outcomes[:, -1:]), 1)
    return SparseTeacher(ids, outcomes)


def _tail_at(log_tail: LogTail, temperature: float, shape: torch.Size, student: Tensor) -> Tensor | None:
    """The tail at this temperature, of those that are declared."""
    if log_tail is None:
        if temperature != 1:
            raise ValueError(
                f"log_tail=None, for sampled ids, goes with temperature=1 alone, got {temperature}: their "
                "weights are those of the temperature that they were sampled for"
            )
        return None
    declared = log_tail if isinstance(log_tail, Mapping) else {1.0: log_tail}
    for of, tail in declared.items():
        positive("a temperature of log_tail", of)
        check_tensor("log_tail", tail)
        if tail.shape != shape:
            raise ValueError(f"log_tail must have shape {tuple(shape)}, one a token; got {tuple(tail.shape)}")
        if tail.device != student.device:
            raise ValueError(f"log_tail is on {tail.device}, but the student is on {student.device}")
        if not tail.is_floating_point():
            raise TypeError(f"log_tail must be floating point, got {tail.dtype}")
    for of, tail in declared.items():
        if of == temperature:
            check_constant("log_tail", tail)
            return tail
    raise ValueError(
        f"log_tail is declared for temperature {', '.join(map(str, declared))}, but the loss is at "
        f"{temperature}, and the one does not follow from the other: give log_tail={{{temperature}: log of "
        f"the sum of p ** (1 / {temperature}) over the other tokens}}"
    )


@opaque_op("minitron_kernels::sorted_outcomes")
def _sorted_outcomes(
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor | None,
    valid: Tensor | None,
    vocab_size: int,
    untempered: bool,
) -> tuple[Tensor, Tensor]:
    """Ids ascending with -1 behind, and outcomes: their log-probabilities with -inf there, then the tail.

    After all checks. Rows that do not count have no ids, and a tail of 1.
    """
    if ids.device.type == "cpu" and _native.available():
        order, outcomes, fits = torch.ops.minitron_kernels.sparse_outcomes.default(
            ids.to(torch.int64).contiguous(),
            logprobs.contiguous(),
            None if tail is None else tail.contiguous(),
            valid,
            vocab_size,
            untempered,
        )
        if fits:
            return order, outcomes
    # without the extension; and what says what is wrong
    order, logprobs, tail = _sorted_by_torch(ids, logprobs, tail, valid, vocab_size, untempered)
    return order, torch.cat((logprobs, tail[:, None]), 1)


def _sorted_by_torch(
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor | None,
    valid: Tensor | None,
    vocab_size: int,
    untempered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by torch, on any device; ids, their log-probabilities, and the tail."""
    k = ids.shape[1]
    given = ids != -1
    if valid is not None:
        given = given & valid[:, None]
    order = torch.where(given, ids.to(torch.int64), torch.iinfo(torch.int64).max)
    order, places = order.sort(dim=1)
    given = given.gather(1, places)
    logprobs = logprobs.gather(1, places)
    counts = torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device) if valid is None else valid
    _refuse(given & ((order < 0) | (order >= vocab_size)), f"ids must be -1 or in [0, {vocab_size})", order)
    twice = torch.zeros_like(given)
    if k > 1:
        twice[:, 1:] = given[:, 1:] & (order[:, 1:] == order[:, :-1])
    _refuse(twice, "ids must differ within a token's", order)
    # new_full and not new_tensor: on a GPU that would copy from the host, and wait
    most = logprobs.new_full((), _SLACK).log1p()
    wrong = given & ~((logprobs < math.inf) & (logprobs <= most))
    if tail is None:
        wrong = given & ~(logprobs < math.inf)
    _refuse(wrong, "logprobs must be logarithms of probabilities, at most 0 and not NaN", logprobs)
    ids = torch.where(given, order, -1)
    logprobs = torch.where(given, logprobs, -math.inf)
    if tail is None:
        weighty = (logprobs > -math.inf).sum(1)
        _refuse(counts & (weighty == 0), "a token must have sampled ids of a weight above 0", weighty)
        return ids, logprobs, torch.where(counts, logprobs.new_full((), -math.inf), 0.0)
    mass = logprobs.exp().sum(1)
    if untempered:
        total = mass + tail.exp()
        wrong = ~((total - 1).abs() <= _SLACK)
        what = "the probabilities of a token's ids and exp(log_tail) must sum to 1"
        _refuse(counts & wrong, what, total)
    else:
        wrong = ~(tail <= math.log(vocab_size) + _SLACK)
        _refuse(counts & wrong, "log_tail must be at most log(vocab_size) and not NaN", tail)
    # where all tokens are ids there is no other: what is left of 1 is what rounding has left
    tail = torch.where(given.sum(1) == vocab_size, -math.inf, tail)
    return ids, logprobs, torch.where(counts, tail, 0.0)


def _refuse(wrong: Tensor, what: str, values: Tensor) -> None:
    """An error that names the first wrong row; on a GPU it comes from the device, without waiting for it."""
    if wrong.device.type != "cpu":
        torch._assert_async(~wrong.any(), f"minitron_kernels: {what}")
        return
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"{what}; got {values[place].item():.9g} in row {place[0]}")


@_sorted_outcomes.register_fake
def _(
    ids: Tensor, logprobs: Tensor, tail: Tensor | None, valid: Tensor | None, *_: object
) -> tuple[Tensor, Tensor]:
    return (
        ids.new_empty(ids.shape, dtype=torch.int64),
        logprobs.new_empty((ids.shape[0], ids.shape[1] + 1)),
    )
