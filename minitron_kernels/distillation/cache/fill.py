"""cache_teacher(): runs a teacher over batches, and keeps what it says."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minitron_kernels._command.progress import tqdm_for
from minitron_kernels.distillation.cache.fingerprint import (
    head_fingerprint,
    model_fingerprint,
    tokenizer_hash,
)
from minitron_kernels.distillation.cache.outputs import payloads_of, run_teacher
from minitron_kernels.distillation.cache.reader import TeacherCache
from minitron_kernels.distillation.cache.sequences import Sequence, sequences_of
from minitron_kernels.distillation.cache.spec import SPEC_FILE, CacheSpec
from minitron_kernels.distillation.cache.summary import CacheSummary
from minitron_kernels.distillation.cache.writer import SHARD_BYTES, TeacherCacheWriter
from minitron_kernels.distillation.teacher import ModelTeacher


@dataclass(frozen=True)
class CacheRun:
    """What one call of cache_teacher() did, and the cache behind it."""

    added: int  # sequences
    skipped: int  # sequences that were there
    tokens: int  # of those added
    seconds: float
    cache: CacheSummary


def teacher_spec(
    teacher: Any,
    *,
    tier: str,
    k: int | None = None,
    mass: float | None = None,
    samples: int | None = None,
    temperatures: Iterable[float] = (),
    quantiser: str | None = None,
    vocab_size: int | None = None,
    teacher_name: str | None = None,
    tokenizer: Any = None,
) -> CacheSpec:
    """The spec of a cache of this teacher; see cache_teacher()."""
    lm, device = as_teacher(teacher)
    signal = run_teacher(lm, [Sequence(0, 0, 1, torch.zeros(1, dtype=torch.int64))], device)
    model: Any = getattr(lm, "model", None)
    if teacher_name is None and not isinstance(model, nn.Module):
        raise ValueError("teacher_name must be given for a teacher that is not a ModelTeacher")
    rows = signal.head.shape[0]
    if vocab_size is not None and not 0 < vocab_size <= rows:
        raise ValueError(
            f"vocab_size must be at most the {rows} rows of the teacher's head, got {vocab_size}"
        )
    vocab_size = vocab_size or rows
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "teacher": teacher_name
        or model_fingerprint(model, disable_adapters=getattr(lm, "disable_adapters", False)),
        "tokenizer": None if tokenizer is None else tokenizer_hash(tokenizer),
    }
    if tier == "sampled":
        if k is not None:
            raise ValueError("k is for tier topk; tier sampled has samples=, draws a position")
        samples = samples or 12
        k = min(samples, vocab_size)
    elif tier == "topk":
        k = min(k or 128, vocab_size)
    elif tier == "hidden":
        common |= {
            "hidden_size": signal.hidden.shape[-1],
            "num_layers": getattr(getattr(model, "config", None), "num_hidden_layers", None),
            "head": head_fingerprint(signal.head, signal.bias),
            "head_dtype": str(signal.head.dtype).removeprefix("torch."),
            "logit_scale": signal.logit_scale,
            "softcap": signal.softcap,
        }
    return CacheSpec(
        tier, k=k, samples=samples, mass=mass, temperatures=tuple(temperatures), quantiser=quantiser, **common
    )


def cache_teacher(
    teacher: Any,
    batches: Iterable[Mapping[str, Any] | Tensor],
    folder: str | Path,
    *,
    tier: str = "topk",
    k: int | None = None,
    mass: float | None = None,
    samples: int | None = None,
    temperatures: Iterable[float] = (),
    quantiser: str | None = None,
    vocab_size: int | None = None,
    teacher_name: str | None = None,
    tokenizer: Any = None,
    resume: bool = True,
    shard_bytes: int = SHARD_BYTES,
    progress: bool | None = None,
) -> CacheRun:
    """Runs a teacher over batches and keeps its outputs in a cache; what is there already is skipped.

    The sequences of a batch are run one a row and padded on the right, however they came (padded on either
    side, packed). Logits are made in fp32 for a few positions at a time, never for a batch. Several
    processes may fill one folder, each with batches of its own.

    Args:
        teacher: a ModelTeacher, or a model of transformers, which becomes one.
        batches: see sequences_of(); a list or a DataLoader, whose length gives the time left.
        folder: of the cache; made if there is none.
        tier: "topk", "sampled" or "hidden".
        k: topk: ids a position; by default 128.
        mass: topk: no more ids than reach this probability.
        samples: sampled: draws a position; by default 12.
        temperatures: topk: at which the tail is kept; by default 1 alone.
        quantiser: topk: how log-probabilities are stored.
        vocab_size: number of tokens, where the head has more rows than that.
        teacher_name: who the teacher is; by default a hash of its config and weights.
        tokenizer: whose tokens these are; its hash is kept, for readers to compare.
        resume: go on with a cache that is there; False: an error if there is one.
        shard_bytes: size of a shard, and of what a kill can lose.
        progress: whether tqdm shows tokens per second and the time left; None: where standard error is a
            terminal.

    Returns:
        What was done, and what is in the cache now.

    Raises:
        ValueError: the cache there is of another spec, a batch is not known, the outputs are not finite.
        FileExistsError: resume=False and there is a cache.
        OSError: the disk fails; finished shards are kept.
    """
    folder = Path(folder)
    if not resume and (folder / SPEC_FILE).exists():
        raise FileExistsError(f"{folder}: is a cache already: give resume=True to go on, or another folder")
    spec = teacher_spec(
        teacher,
        tier=tier,
        k=k,
        mass=mass,
        samples=samples,
        temperatures=temperatures,
        quantiser=quantiser,
        vocab_size=vocab_size,
        teacher_name=teacher_name,
        tokenizer=tokenizer,
    )
    lm, device = as_teacher(teacher)
    begin = time.perf_counter()
    added = skipped = tokens = 0
    with (
        TeacherCacheWriter(folder, spec, shard_bytes=shard_bytes) as writer,
        _Progress(batches, progress) as bar,
    ):
        for batch in batches:
            mapping = {"input_ids": batch} if isinstance(batch, Tensor) else batch
            found = sequences_of(mapping)
            todo = [one for one in _distinct(found) if one.tokens not in writer]
            if todo:
                for one, payload in zip(todo, payloads_of(lm, todo, spec, device), strict=True):
                    writer.add(one.tokens, payload)
            added += len(todo)
            skipped += len(found) - len(todo)
            tokens += sum(len(one.tokens) for one in todo)
            bar.advance(sum(len(one.tokens) for one in found))
    return CacheRun(added, skipped, tokens, time.perf_counter() - begin, TeacherCache(folder).summary())


def _distinct(sequences: list[Sequence]) -> list[Sequence]:
    return list({tuple(found.tokens.tolist()): found for found in sequences}.values())


def as_teacher(teacher: Any) -> tuple[Any, torch.device | None]:
    """(a teacher, the device that its model is on)."""
    if isinstance(teacher, nn.Module):
        teacher = ModelTeacher(teacher)
    model = getattr(teacher, "model", None)
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return teacher, None if parameter is None else parameter.device


class _Progress:
    """A bar that counts batches, with tokens per second."""

    def __init__(self, batches: Any, progress: bool | None) -> None:
        self._bar: Any = None
        self._tokens, self._begin = 0, time.perf_counter()
        tqdm = tqdm_for(progress)
        if tqdm is None:
            return
        try:
            total = len(batches)
        except TypeError:  # an iterator, or a DataLoader of one
            total = None
        self._bar = tqdm(total=total, desc="caching", unit="batch")

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, tokens: int) -> None:
        """One more batch of this many tokens."""
        self._tokens += tokens
        if self._bar is not None:
            rate = self._tokens / max(time.perf_counter() - self._begin, 1e-9)
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            self._bar.update()
