"""Reads a cache: the rows of any batch's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_kernels.distillation.cache.format import Shard
from minitron_kernels.distillation.cache.index import CacheIndex
from minitron_kernels.distillation.cache.payload import decode, decode_tokens
from minitron_kernels.distillation.cache.sequences import Sequence, described, digest, sequences_of
from minitron_kernels.distillation.cache.shard_index import totals
from minitron_kernels.distillation.cache.spec import CacheSpec, read_spec
from minitron_kernels.distillation.cache.summary import CacheSummary, summary_of


class UncachedError(ValueError):
    """A sequence of a batch is not in the cache."""


class TeacherCache:
    """A cache, for reading.

    The folder is looked at when the first row is asked for, and by refresh(): shards that appear later are
    not seen before. It keeps no file open and has no lock, so that it may be given to DataLoader workers,
    forked or spawned, and used in several threads. Only the index is in memory, about 100 bytes a sequence.

    Args:
        folder: of the cache.
        check: whether each row's checksum is looked at when it is read. Its tokens are compared anyway.

    Raises:
        ValueError: the folder is not a cache; later, a shard is damaged, cut off, or of another cache; names
            the file.
    """

    def __init__(self, folder: str | Path, *, check: bool = True) -> None:
        self.folder, self.check = Path(folder), check
        self.spec = read_spec(self.folder)
        self._index: CacheIndex | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None}

    @property
    def index(self) -> CacheIndex:
        """The shards, opened at first use."""
        if self._index is None:
            self._index = CacheIndex(self.folder, self.spec)
        return self._index

    def refresh(self) -> None:
        """Looks at the folder again."""
        self._index = CacheIndex(self.folder, self.spec)

    def __len__(self) -> int:
        """Number of sequences."""
        return totals(self.index.shards)[0]

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences."""
        return totals(self.index.shards)[1]

    def __contains__(self, token_ids: Tensor) -> bool:
        return self.index.find(digest(token_ids)) is not None

    def row(self, token_ids: Tensor) -> dict[str, Tensor]:
        """The payload of a sequence [T]; see payload.py.

        Raises:
            UncachedError: it is not there.
            ValueError: its shard is damaged.
        """
        found = self.index.find(digest(token_ids))
        if found is None:
            raise UncachedError(f"{described(token_ids)} is not in the cache {self.folder}")
        shard, number = found
        fields = shard.read(number, check=self.check)
        length = int(shard.lengths[number])
        if not torch.equal(decode_tokens(fields, length, self.spec), token_ids.to("cpu", torch.int64)):
            raise ValueError(f"{shard.path}: sequence {number} has other tokens than its digest says")
        return decode(fields, length, self.spec)

    def missing(self, batch: Mapping[str, Any]) -> list[Sequence]:
        """The sequences of a batch that are not there; see sequences_of() for what a batch is."""
        return [found for found in sequences_of(batch) if found.tokens not in self]

    def lookup(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **batch: Any
    ) -> dict[str, Tensor]:
        """The rows of a batch, each at the slot of its token; on the CPU.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T]; see sequences_of(), as for all others.
            batch: position_ids and more.

        Returns:
            Of the tier: ids [B, T, k] with -1, counts or logprobs [B, T, k], log_tail
            [B, T, temperatures]; or hidden [B, T, H]. Where there is padding, ids are -1, log_tail is 0 and
            hidden states are 0.

        Raises:
            UncachedError: a sequence is not there; names it.
            ValueError: the batch cannot be read by its tokens; a shard is damaged.
        """
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, **batch}
        sequences = sequences_of(batch)
        return assembled(sequences, [self._row_of(found) for found in sequences], input_ids.shape, self.spec)

    def _row_of(self, found: Sequence) -> dict[str, Tensor]:
        try:
            return self.row(found.tokens)
        except UncachedError as error:
            raise UncachedError(
                f"row {found.row} of the batch, slots {found.begin} to {found.end}: {error} (of "
                f"{len(self.index)} sequences): cache it by cache_teacher(), or give fallback=. Another "
                "truncation or template makes another sequence; padding must be marked by attention_mask"
            ) from None

    def summary(self) -> CacheSummary:
        """What it holds, in figures."""
        return summary_of(self.folder, self.spec, self.index.shards)

    def verify(self) -> CacheSummary:
        """Reads everything, and checks each checksum and digest.

        Raises:
            ValueError: something is damaged, or a shard was deleted; names the first file.
        """
        self.refresh()
        for shard in self.index.shards:
            for number in range(len(shard)):
                _verify(shard, number, self.spec)
        summary = self.summary()
        if summary.lost:
            raise ValueError(summary.lost[0])
        return summary


def _verify(shard: Shard, number: int, spec: CacheSpec) -> None:
    fields, length = shard.read(number), int(shard.lengths[number])
    if digest(decode_tokens(fields, length, spec)) != shard.digests[number].tobytes():
        raise ValueError(f"{shard.path}: sequence {number} has other tokens than its digest says")
    if any(len(x) != length for x in decode(fields, length, spec).values()):
        raise ValueError(f"{shard.path}: sequence {number} has another number of rows than tokens")


_FILL = {"ids": -1, "counts": 0, "logprobs": -torch.inf, "log_tail": 0, "hidden": 0}


def assembled(
    sequences: list[Sequence], payloads: list[dict[str, Tensor]], shape: tuple[int, ...], spec: CacheSpec
) -> dict[str, Tensor]:
    """Payloads at the slots of their sequences, in tensors of a batch's shape."""
    k = max((p["ids"].shape[1] for p in payloads if "ids" in p), default=1)
    wide = {
        "sampled": {"ids": (k, torch.int64), "counts": (k, torch.int64)},
        "topk": {
            "ids": (k, torch.int64),
            "logprobs": (k, torch.float32),
            "log_tail": (len(spec.temperatures), torch.float32),
        },
        "hidden": {"hidden": (spec.hidden_size or 0, torch.bfloat16)},
    }[spec.tier]
    whole = (1, *shape) if len(shape) == 1 else tuple(shape)
    result = {}
    for name, (columns, dtype) in wide.items():
        x = torch.full((*whole, columns), _FILL[name], dtype=dtype, device="cpu")
        for found, payload in zip(sequences, payloads, strict=True):
            values = payload[name]
            x[found.row, found.begin : found.end, : values.shape[1]] = values
        result[name] = x.reshape(*shape, columns)
    return result
