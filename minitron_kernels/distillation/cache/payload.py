"""Payloads: what a cache keeps of a sequence, tier by tier; their checks, and their fields in a shard.

A payload is a mapping of tensors with one row a position, T of them:

    sampled   ids [T, n], counts [T, n] integers; a position's draws: token ids, each once, and how often
    topk      ids [T, k], logprobs [T, k] at temperature 1, and log_tail: [T, temperatures], a mapping
              {temperature: [T]}, or with one declared temperature [T]
    hidden    hidden [T, H], after the final norm

Ids of -1 fill a position up. In a shard nothing fills up: token ids have ceil(log2 V) bits, ids lie ascending
as sets (id_sets.py), k and counts in as many bits as the spec needs, log-probabilities as the quantiser's
codes, and tails in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minitron_kernels.distillation.cache.bits import pack_bits, pack_ids, unpack_bits, unpack_ids
from minitron_kernels.distillation.cache.id_sets import pack_id_sets, unpack_id_sets
from minitron_kernels.distillation.cache.quantise import quantiser
from minitron_kernels.distillation.cache.spec import CacheSpec

NAMES = {
    "sampled": ("ids", "counts"),
    "topk": ("ids", "logprobs", "log_tail"),
    "hidden": ("hidden",),
}
_SLACK = 0.01  # of a position's probability, as linear_sparse_kl_loss() allows


def check_tokens(tokens: Any, spec: CacheSpec) -> Tensor:
    """Token ids [T] int64 on the CPU, or an error that says what is wrong."""
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        what = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"token_ids must be an integer tensor [T], got {what}")
    if tokens.dim() != 1 or len(tokens) == 0:
        raise ValueError(f"token_ids must be [T] with T at least 1, got {tuple(tokens.shape)}")
    tokens = tokens.detach().to("cpu", torch.int64)
    if int(tokens.min()) < 0 or int(tokens.max()) >= spec.vocab_size:
        raise ValueError(
            f"token_ids must be in [0, {spec.vocab_size}), the cache's vocabulary; got "
            f"{int(tokens.min())} to {int(tokens.max())}"
        )
    return tokens


def encode(tokens: Tensor, payload: Mapping[str, Any], spec: CacheSpec) -> dict[str, Tensor]:
    """The fields of a shard for one sequence, after all checks.

    Raises:
        TypeError, ValueError: the payload is not one of this spec; names the entry and the position.
    """
    if not isinstance(payload, Mapping) or set(payload) != set(NAMES[spec.tier]):
        got = ", ".join(map(str, payload)) if isinstance(payload, Mapping) else type(payload).__name__
        raise ValueError(f"payload of tier {spec.tier} must have {', '.join(NAMES[spec.tier])}; got {got}")
    fields = {"tokens": pack_ids(tokens, spec.vocab_size, padded=False)}
    if spec.tier == "hidden":
        return fields | {"hidden": _hidden(payload["hidden"], len(tokens), spec)}
    ids = _rows("ids", payload["ids"], len(tokens)).to(torch.int64)
    given = ids != -1
    _check_ids(ids, given, spec)
    ids, order = torch.where(given, ids, spec.vocab_size).sort(dim=1)
    given, k = ids < spec.vocab_size, given.sum(1)
    whole = bool(k.eq(spec.k or 0).all())
    fields["k"] = ids.new_empty(0, dtype=torch.uint8) if whole else pack_bits(k, _bits_of(spec.k))
    fields["ids"] = pack_id_sets(ids[given], k, spec.vocab_size)
    if spec.tier == "sampled":
        counts = _rows("counts", payload["counts"], len(tokens))
        _same_shape(ids, counts, "counts")
        if counts.is_floating_point():
            raise TypeError(f"counts must be integers, got {counts.dtype}")
        counts = counts.gather(1, order)
        _refuse(given & (counts < 1), "counts must be at least 1", counts)
        _refuse(k < 1, "a position must have sampled ids", k)
        total = torch.where(given, counts, 0).sum(1)
        _refuse(total > (spec.samples or 0), f"a position's counts must be {spec.samples} together", total)
        return fields | {"counts": pack_bits(counts[given], _bits_of(spec.samples))}
    logprobs = _rows("logprobs", payload["logprobs"], len(tokens))
    _same_shape(ids, logprobs, "logprobs")
    logprobs = logprobs.to(torch.float32).gather(1, order)
    _refuse(given & ~(logprobs <= _SLACK), "logprobs must be logarithms of probabilities, not NaN", logprobs)
    tail = _tail(payload["log_tail"], len(tokens), spec).to(torch.float32)
    _refuse(~(tail < torch.inf), "log_tail must be a logarithm, not NaN", tail)
    if 1.0 in spec.temperatures:
        mass = torch.where(given, logprobs, -torch.inf).exp().sum(1)
        total = mass + tail[:, spec.temperatures.index(1.0)].exp()
        _refuse(
            ~((total - 1).abs() <= _SLACK),
            "the probabilities of a position's ids and tail must sum to 1",
            total,
        )
    codes = quantiser(spec.quantiser or "").encode(logprobs[given].clamp(max=0))
    fields["logprobs"] = pack_bits(codes, quantiser(spec.quantiser or "").bits)
    return fields | {"log_tail": tail}


def decode_tokens(fields: Mapping[str, Tensor], length: int, spec: CacheSpec) -> Tensor:
    """The token ids [T] int64 of encode()."""
    return unpack_ids(fields["tokens"], spec.vocab_size, length, padded=False)


def decode(fields: Mapping[str, Tensor], length: int, spec: CacheSpec) -> dict[str, Tensor]:
    """The payload of encode(): ids [T, k] int64, ascending with -1 behind them; log_tail [T, temperatures].

    Log-probabilities are as near as the quantiser keeps them, shifted so that they sum to 1 with the tail.
    """
    if spec.tier == "hidden":
        return {"hidden": fields["hidden"]}
    assert spec.k is not None
    k = torch.full((length,), spec.k, device="cpu")
    if len(fields["k"]):
        k = unpack_bits(fields["k"], _bits_of(spec.k), length)
    given = torch.arange(int(k.max()), device="cpu") < k[:, None]
    count = int(k.sum())
    payload = {"ids": torch.full(given.shape, -1, dtype=torch.int64, device="cpu")}
    payload["ids"][given] = unpack_id_sets(fields["ids"], k, spec.vocab_size)
    if spec.tier == "sampled":
        payload["counts"] = torch.zeros(given.shape, dtype=torch.int64, device="cpu")
        payload["counts"][given] = unpack_bits(fields["counts"], _bits_of(spec.samples), count)
        return payload
    kept = quantiser(spec.quantiser or "")
    logprobs = torch.full(given.shape, -torch.inf, dtype=torch.float32, device="cpu")
    logprobs[given] = kept.decode(unpack_bits(fields["logprobs"], kept.bits, count))
    if kept.name != "fp32" and 1.0 in spec.temperatures:
        logprobs = kept.sum_to_one(logprobs, fields["log_tail"][:, spec.temperatures.index(1.0)])
    return payload | {"logprobs": logprobs, "log_tail": fields["log_tail"]}


def _bits_of(most: int | None) -> int:
    """Bits of a number from 0 to `most`."""
    return max(most or 0, 1).bit_length()


def _rows(name: str, x: Any, length: int) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != 2 or x.shape[0] != length:
        raise ValueError(f"{name} must be [T, ...] for the {length} token_ids, got {tuple(x.shape)}")
    return x.detach().cpu()


def _same_shape(ids: Tensor, x: Tensor, name: str) -> None:
    if ids.shape != x.shape:
        raise ValueError(f"ids and {name} differ in shape: {tuple(ids.shape)} and {tuple(x.shape)}")


def _check_ids(ids: Tensor, given: Tensor, spec: CacheSpec) -> None:
    assert spec.k is not None
    _refuse(
        given & ((ids < 0) | (ids >= spec.vocab_size)), f"ids must be -1 or in [0, {spec.vocab_size})", ids
    )
    _refuse(given.sum(1) > spec.k, f"a position has at most k {spec.k} ids", given.sum(1))
    order = torch.where(given, ids, -1).sort(dim=1).values
    _refuse(
        (order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0),
        "ids must differ within a position",
        order[:, 1:],
    )


def _tail(tail: Any, length: int, spec: CacheSpec) -> Tensor:
    """[T, temperatures] from any of its forms."""
    declared = spec.temperatures
    if isinstance(tail, Mapping):
        if set(map(float, tail)) != set(declared):
            raise ValueError(f"log_tail must have temperatures {declared}, got {tuple(tail)}")
        by_float = {float(key): value for key, value in tail.items()}
        tail = torch.stack([by_float[t] for t in declared], 1)
    if not isinstance(tail, Tensor) or not tail.is_floating_point():
        raise TypeError("log_tail must be a floating-point tensor or a mapping {temperature: tensor}")
    if tail.dim() == 1 and len(declared) == 1:
        tail = tail[:, None]
    if tuple(tail.shape) != (length, len(declared)):
        raise ValueError(
            f"log_tail must be {(length, len(declared))}, one at each temperature of {declared}; got "
            f"{tuple(tail.shape)}"
        )
    return tail.detach().cpu()


def _hidden(hidden: Any, length: int, spec: CacheSpec) -> Tensor:
    hidden = _rows("hidden", hidden, length)
    if hidden.shape[1] != spec.hidden_size:
        raise ValueError(f"hidden must be [T, {spec.hidden_size}], got {tuple(hidden.shape)}")
    if not hidden.is_floating_point():
        raise TypeError(f"hidden must be floating point, got {hidden.dtype}")
    hidden = hidden.to(torch.bfloat16)
    _refuse(~hidden.isfinite(), "hidden states must be finite in bfloat16", hidden)
    return hidden


def _refuse(wrong: Tensor, what: str, values: Tensor) -> None:
    """An error that names the first wrong position."""
    if bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"{what}; got {values[place].item():.9g} at position {place[0]}")
