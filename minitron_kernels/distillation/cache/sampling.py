"""Random-sampling distillation: a few ids a position, drawn from the teacher's softmax with replacement.

With counts c_i of n draws, c_i / n is p_i on average, so that the gradient q - c / n of the loss with these
weights is on average the whole KL's, q - p; the k most probable tokens alone would be biased towards
themselves. Source: Anshumann et al., "Sparse Logit Sampling", arXiv 2503.16870, where a dozen of draws train
as well as the whole softmax. Draws are from p itself (the paper's temperature 1): of another proposal the
weights p / proposal do not sum to 1, and the loss, which divides by their sum, would be biased.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

_WORKSPACE_BYTES = 256 << 20
_BYTES_A_LOGIT = 32  # a logit, its fp32 copy, and in fp64 the difference to the highest and the sum
_NO_TOKEN = -1


class SampledIds(NamedTuple):
    """What a position's draws were."""

    ids: Tensor  # [..., n] int64, each once, ascending, -1 behind them
    counts: Tensor  # [..., n] int32, how often each was drawn; 0 where the id is -1


def sample_ids(logits: Tensor, n: int, generator: torch.Generator | None = None) -> SampledIds:
    """Draws n ids a position from softmax(logits), with replacement, and merges equal ones.

    The sum of probabilities is made in float64, so that a token of p = 1e-9 is drawn as often as it should;
    one of -inf never. Which ids are drawn does not depend on how many positions are worked on at a time.

    Args:
        logits: [..., V] floating point logits at temperature 1, or log-probabilities (softmax of which are
            the probabilities), on any device.
        n: draws a position, at least 1.
        generator: on the device of `logits`; by default torch's own.

    Returns:
        SampledIds [..., n]. log(counts / n) are the `logprobs` of linear_sparse_kl_loss(), see
        sampled_logprobs().

    Raises:
        TypeError: `logits` is not a tensor of floating point numbers, or n not an int.
        ValueError: n is below 1, a position has NaN or inf, or no token above -inf.
    """
    if not isinstance(logits, Tensor) or not logits.dtype.is_floating_point:
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits must be a tensor of floating point numbers, got {got}")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must be [..., V] with a token at least, got {list(logits.shape)}")
    rows = logits.detach().reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    u = _uniform(rows.shape[0], n, rows.device, generator)
    step = max(1, _WORKSPACE_BYTES // (rows.shape[1] * _BYTES_A_LOGIT))
    drawn = [_draw(rows[i : i + step], u[i : i + step], i) for i in range(0, rows.shape[0], step)]
    return _merged(torch.cat(drawn) if drawn else u.to(torch.int64), logits.shape[:-1])


def sampled_logprobs(counts: Tensor) -> Tensor:
    """log(counts / n) [..., n] float32, n being a position's sum: what linear_sparse_kl_loss() takes.

    -inf where nothing was drawn, as at all entries of a position of padding.

    Raises:
        TypeError: `counts` are not integers.
        ValueError: a count is negative; on a GPU the device asserts it.
    """
    if not isinstance(counts, Tensor) or counts.dtype.is_floating_point or counts.dtype == torch.bool:
        got = counts.dtype if isinstance(counts, Tensor) else type(counts).__name__
        raise TypeError(f"counts must be a tensor of integers, got {got}")
    if counts.device.type != "cpu":  # the device raises it: a cached teacher's step does not wait for the GPU
        torch._assert_async((counts >= 0).all(), "counts must be at least 0")
    elif counts.numel() and int(counts.min()) < 0:
        raise ValueError(f"counts must be at least 0, got {int(counts.min())}")
    total = counts.sum(-1, keepdim=True).clamp(min=1)
    return counts.to(torch.float32).log() - total.to(torch.float32).log()


def _uniform(rows: int, n: Any, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """[rows, n] float64 in [0, 1), drawn at once: the same for any number of rows at a time."""
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"n must be an int, got {type(n).__name__}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return torch.rand(rows, n, dtype=torch.float64, device=device, generator=generator)


def _draw(logits: Tensor, u: Tensor, first: int) -> Tensor:
    """Ids [rows, n] by the inverse of the distribution function; `first` numbers the rows in errors."""
    top = logits.amax(-1, keepdim=True)
    wrong = ~(top.abs() < math.inf).squeeze(-1)  # NaN passes through amax, too
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise ValueError(
            "logits must be below inf and not NaN, and a position must have one above -inf; the highest of "
            f"position {first + place} is {float(top[place])}"
        )
    below = (logits.to(torch.float64) - top.to(torch.float64)).exp_().cumsum(-1)
    total = below[:, -1:].contiguous()
    # were u 1, as a generator may round it, the place would be behind the last token
    at = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(below, at, right=True)


def _merged(drawn: Tensor, shape: torch.Size) -> SampledIds:
    """Equal ids of a row as one with its count."""
    ids, _ = drawn.sort(dim=-1)
    new = torch.ones_like(ids)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = new.cumsum(-1) - 1
    counts = torch.zeros_like(ids, dtype=torch.int32)
    counts.scatter_add_(-1, place, torch.ones_like(counts))
    merged = torch.full_like(ids, _NO_TOKEN).scatter_(-1, place, ids)
    n = ids.shape[-1]
    return SampledIds(merged.reshape(*shape, n), counts.reshape(*shape, n))
