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
    step = _rows_at_a_time(rows.shape[1], _WORKSPACE_BYTES)
    drawn = [_draw(rows[i : i + step], u[i : i + step], i) for i in range(0, rows.shape[0], step)]
    return _merged(torch.cat(drawn) if drawn else u.to(torch.int64), logits.shape[:-1])


def sample_ids_of_hidden(
    hidden: Tensor,
    head: Tensor,
    n: int,
    generator: torch.Generator | None = None,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    workspace_bytes: int = _WORKSPACE_BYTES,
) -> SampledIds:
    """sample_ids() of softcap(logit_scale (hidden headᵀ + bias)), whose [..., V] is never made as a whole.

    Args:
        hidden: [..., H] what the head multiplies, after the final norm.
        head: [V, H], of the same dtype and device.
        n: draws a position, at least 1.
        generator: on the device of `hidden`; by default torch's own.
        bias: [V].
        logit_scale: factor of the logits, see DenseSignal.
        softcap: logits become softcap tanh(logits / softcap).
        vocab_size: number of tokens, where the head has rows behind them that are padding.
        workspace_bytes: for the logits and sums of some positions at a time; at least one is worked on.

    Returns:
        SampledIds [..., n].

    Raises:
        TypeError: as sample_ids().
        ValueError: as sample_ids(); shapes do not fit.
    """
    for name, x in (("hidden", hidden), ("head", head)):
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a tensor of floating point numbers, got {got}")
    if head.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != head.shape[1]:
        raise ValueError(
            f"head must be [V, H] and hidden [..., H], got {list(head.shape)} and {list(hidden.shape)}"
        )
    V = head.shape[0] if vocab_size is None else vocab_size
    if not 1 <= V <= head.shape[0]:
        raise ValueError(f"vocab_size must be in 1..{head.shape[0]}, the rows of head; got {vocab_size}")
    if bias is not None and bias.shape != head.shape[:1]:
        raise ValueError(f"bias must be [{head.shape[0]}], got {list(bias.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0 or None, got {softcap}")
    rows, weight = hidden.detach().reshape(-1, hidden.shape[-1]), head.detach()[:V]
    u = _uniform(rows.shape[0], n, rows.device, generator)
    step = _rows_at_a_time(V, workspace_bytes)
    drawn = []
    for i in range(0, rows.shape[0], step):
        logits = (rows[i : i + step] @ weight.t()).to(torch.float32)
        if bias is not None:
            logits += bias.detach()[:V]
        logits *= logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        drawn.append(_draw(logits, u[i : i + step], i))
    return _merged(torch.cat(drawn) if drawn else u.to(torch.int64), hidden.shape[:-1])


def sampled_logprobs(counts: Tensor) -> Tensor:
    """log(counts / n) [..., n] float32, n being a position's sum: what linear_sparse_kl_loss() takes.

    Raises:
        TypeError: `counts` are not integers.
        ValueError: a count is negative, or a position has none.
    """
    if not isinstance(counts, Tensor) or counts.dtype.is_floating_point or counts.dtype == torch.bool:
        got = counts.dtype if isinstance(counts, Tensor) else type(counts).__name__
        raise TypeError(f"counts must be a tensor of integers, got {got}")
    total = counts.sum(-1, keepdim=True)
    if counts.numel() and (int(counts.min()) < 0 or int(total.min()) < 1):
        raise ValueError("counts must be at least 0, and some of a position's above 0")
    return counts.to(torch.float32).log() - total.to(torch.float32).log()


def _uniform(rows: int, n: Any, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """[rows, n] float64 in [0, 1), drawn at once: the same for any number of rows at a time."""
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"n must be an int, got {type(n).__name__}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return torch.rand(rows, n, dtype=torch.float64, device=device, generator=generator)


def _rows_at_a_time(V: int, workspace_bytes: int) -> int:
    return max(1, workspace_bytes // (V * _BYTES_A_LOGIT))


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
