"""A teacher's outputs for sequences, as the payloads of a tier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from minitron_kernels.distillation.cache.sampling import sample_ids
from minitron_kernels.distillation.cache.sequences import Sequence, described, digest
from minitron_kernels.distillation.cache.spec import CacheSpec
from minitron_kernels.distillation.signals import DenseSignal

LOGIT_BYTES = 256 << 20  # of fp32 logits that are there at a time
_HEAD_ROWS = 8192  # rows of the head that are there in fp32 at a time

Payload = dict[str, Tensor]


def run_teacher(teacher: Any, sequences: list[Sequence], device: torch.device | None) -> DenseSignal:
    """The teacher's signal for sequences, one a row, padded on the right: every causal model honours that."""
    longest = max(len(found.tokens) for found in sequences)
    ids = torch.zeros((len(sequences), longest), dtype=torch.int64, device="cpu")
    mask = torch.zeros_like(ids)
    for row, found in enumerate(sequences):
        ids[row, : len(found.tokens)] = found.tokens
        mask[row, : len(found.tokens)] = 1
    batch = {"input_ids": ids.to(device)}
    if not bool(mask.all()):
        batch["attention_mask"] = mask.to(device)
    with torch.no_grad():
        signal = teacher(batch)
    if not isinstance(signal, DenseSignal):
        raise TypeError(f"the teacher must give a DenseSignal, got {type(signal).__name__}")
    return signal


def payloads_of(
    teacher: Any, sequences: list[Sequence], spec: CacheSpec, device: torch.device | None
) -> Iterator[Payload]:
    """The payload of each sequence, on the CPU, from one forward pass."""
    signal = run_teacher(teacher, sequences, device)
    for row, found in enumerate(sequences):
        hidden = signal.hidden[row, : len(found.tokens)]
        if not bool(hidden.isfinite().all()):
            raise ValueError(f"the teacher's hidden states are not finite for {described(found.tokens)}")
        if spec.tier == "hidden":
            yield {"hidden": hidden.detach().to(torch.bfloat16).cpu()}
            continue
        chunks = list(_chunks(hidden, signal, spec, digest(found.tokens)))
        yield {name: _joined([chunk[name] for chunk in chunks], name) for name in chunks[0]}


def _joined(chunks: list[Tensor], name: str) -> Tensor:
    wide = max(chunk.shape[1] for chunk in chunks)
    fill = -1 if name == "ids" else 0
    padded = [torch.nn.functional.pad(chunk, (0, wide - chunk.shape[1]), value=fill) for chunk in chunks]
    return torch.cat(padded).cpu()


@torch.no_grad()
def _chunks(hidden: Tensor, signal: DenseSignal, spec: CacheSpec, key: bytes) -> Iterator[Payload]:
    """Payloads of a few positions at a time, so that no more logits than LOGIT_BYTES are there."""
    step = max(1, LOGIT_BYTES // (4 * spec.vocab_size))
    generator = None
    if spec.tier == "sampled":  # by the sequence alone, so that it is the same in any order and run
        generator = torch.Generator(hidden.device).manual_seed(int.from_bytes(key[:7], "little"))
    for rows in hidden.split(step):
        logits = logits_of(rows, signal, spec.vocab_size)
        if spec.tier == "topk":
            yield topk_payload(logits, spec.k or 1, spec.temperatures, spec.mass)
        else:
            yield sample_ids(logits, spec.samples or 1, generator)._asdict()


def logits_of(hidden: Tensor, signal: DenseSignal, vocab_size: int) -> Tensor:
    """The teacher's logits [N, V] in fp32, with products in fp32: bf16 logits have 8 bits."""
    head, x = signal.head[:vocab_size], hidden.float()
    logits = torch.empty((len(x), len(head)), device=x.device)
    for begin in range(0, len(head), _HEAD_ROWS):
        part = head[begin : begin + _HEAD_ROWS]
        torch.mm(x, part.float().T, out=logits[:, begin : begin + len(part)])
    if signal.bias is not None:
        logits += signal.bias[:vocab_size].float()
    if signal.logit_scale != 1:
        logits *= signal.logit_scale
    if signal.softcap is not None:
        logits.div_(signal.softcap).tanh_().mul_(signal.softcap)
    return logits


def topk_payload(
    logits: Tensor, k: int, temperatures: Iterable[float] = (1.0,), mass: float | None = None
) -> Payload:
    """The k likeliest tokens, and the logarithm of what all others have at each temperature.

    The tail is summed over the other tokens, at its own temperature: log Σ p^(1/τ), p at temperature 1.

    Args:
        logits: [N, V] fp32; they are overwritten.
        k: ids a position.
        temperatures: at which the tail is kept.
        mass: a position has no more ids than it needs to this probability, and at least one.
    """
    lse = logits.logsumexp(1, keepdim=True)
    best, ids = logits.topk(k, dim=1)
    logprobs = best - lse
    if mass is not None:
        before = logprobs.exp().cumsum(1) - logprobs.exp()
        spare = before >= mass
        spare[:, 0] = False
        # what is not kept stays in the tail
        logits.scatter_(1, ids, torch.where(spare, best, -torch.inf))
        ids = torch.where(spare, -1, ids)
        logprobs = torch.where(spare, -torch.inf, logprobs)
    else:
        logits.scatter_(1, ids, -torch.inf)
    logits -= lse
    tail = torch.stack(
        [(logits / t).logsumexp(1) if t != 1 else logits.logsumexp(1) for t in temperatures], 1
    )
    return {"ids": ids, "logprobs": logprobs, "log_tail": tail}
