"""A top-k payload from ids and log-probabilities that came without a tail, and checks that readers share."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

TAILS = ("rest", "renormalise")
_ABOVE_ZERO = 0.01  # nats; what 16-bit floats and fits leave of log p = 0


def check_tail(tail: Any, where: str) -> str:
    """One of TAILS, or an error that says what the choice is.

    Raises:
        ValueError: it is not.
    """
    if tail in TAILS:
        return str(tail)
    raise ValueError(
        f"tail must be 'rest' or 'renormalise', got {tail!r}: {where} has no tail. 'rest' gives all other "
        "tokens 1 - (sum of the known probabilities), right where they come of a softmax over the whole "
        "vocabulary; 'renormalise' gives them nothing and scales the known ones to 1, which makes the "
        "teacher surer than it is"
    )


def check_vocab_size(vocab_size: Any) -> int:
    """An int above 0.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 1:
        raise ValueError(f"vocab_size must be an int of at least 1, got {vocab_size!r}")
    return vocab_size


def refuse(where: str, what: str) -> NoReturn:
    """An error about a foreign file."""
    raise ValueError(f"{where}: {what}")


def topk_payload(
    where: str, ids: Tensor, logprobs: Tensor, *, tail: str, vocab_size: int, length: int, slack: float
) -> dict[str, Tensor]:
    """The payload of tier "topk" of a sequence of `length` tokens.

    Rows that are missing at the end, one at most, get no ids and all probability in the tail. Where ids'
    probabilities sum to more than 1 (rounding; at most by `slack`), they are scaled to 1.

    Args:
        where: names the file and sequence in errors.
        ids: [T or T - 1, k] integers.
        logprobs: [T or T - 1, k] floating point; an id of -inf is dropped.
        tail: one of TAILS.
        vocab_size: ids are below.
        length: T, of the token ids.
        slack: how far above 1 a sum may be.

    Returns:
        ids [T, k] int64 with -1 for none, logprobs [T, k] float32, log_tail [T] float32 at temperature 1.

    Raises:
        ValueError: lengths differ, an id is none of the vocabulary or stands twice, NaN, a log-probability
            above 0, a sum above 1 + slack; names the position.
    """
    if ids.dim() != 2 or ids.shape != logprobs.shape:
        refuse(where, f"ids {list(ids.shape)} and log-probabilities {list(logprobs.shape)} do not fit")
    rows, k = ids.shape
    if rows not in (length, length - 1):
        refuse(where, f"{rows} rows for {length} token ids: they must be as many, or one less")
    ids, logprobs = ids.to(torch.int64), logprobs.to(torch.float64)
    _refuse_where(
        ~(logprobs <= _ABOVE_ZERO), where, "log-probabilities must be at most 0 and not NaN", logprobs
    )
    given = logprobs > -math.inf
    wrong = given & ((ids < 0) | (ids >= vocab_size))
    _refuse_where(wrong, where, f"ids must be in [0, {vocab_size})", ids)
    ids = torch.where(given, ids, -1)
    if k > 1:
        order = ids.sort(-1).values
        twice = (order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0)
        _refuse_where(twice, where, "an id stands twice", order[:, 1:])
    logprobs = torch.where(given, logprobs.clamp_max(0.0), -math.inf)
    mass = logprobs.exp().sum(-1)
    _refuse_where(mass > 1 + slack, where, f"probabilities sum to more than 1 + {slack}", mass)
    _refuse_where(~given.any(-1), where, "a position has no id with a probability", mass)
    if tail == "rest":
        log_tail = torch.log((1 - mass).clamp_min(0.0))
        scale = mass.clamp_min(1.0)
    else:
        log_tail, scale = torch.full_like(mass, -math.inf), mass
    logprobs = (logprobs - scale.log()[:, None]).clamp_max(0.0)
    if rows < length:
        ids = torch.cat((ids, ids.new_full((1, k), -1)))
        logprobs = torch.cat((logprobs, logprobs.new_full((1, k), -math.inf)))
        log_tail = torch.cat((log_tail, log_tail.new_zeros(1)))
    return {"ids": ids, "logprobs": logprobs.to(torch.float32), "log_tail": log_tail.to(torch.float32)}


def _refuse_where(wrong: Tensor, where: str, what: str, values: Tensor) -> None:
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        refuse(where, f"{what}; got {float(values[place]):.9g} at position {place[0]}")
