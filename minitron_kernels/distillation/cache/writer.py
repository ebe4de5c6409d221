"""Writes a cache: sequences gather in memory, and go to the disk as one shard at a time."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from minitron_kernels.distillation.cache.files import clean, disk_error, publish
from minitron_kernels.distillation.cache.format import Fields, Row, as_row, shard_parts
from minitron_kernels.distillation.cache.index import CacheIndex
from minitron_kernels.distillation.cache.payload import check_tokens, encode
from minitron_kernels.distillation.cache.sequences import digest
from minitron_kernels.distillation.cache.shard_list import write_list
from minitron_kernels.distillation.cache.spec import CacheSpec, create_spec

SHARD_BYTES = 256 << 20


class TeacherCacheWriter:
    """Adds sequences to a cache.

        with TeacherCacheWriter(folder, spec) as writer:
            writer.add(token_ids, {"ids": ids, "logprobs": logprobs, "log_tail": log_tail})

    A shard appears complete, by one rename, once it is on the disk; it is never changed. A process that is
    killed at any moment loses at most the sequences of the shard that it was gathering; the next writer goes
    on behind what is there. Any number of writers may work in one folder, on any number of machines: each
    has shard names of its own. What two of them add both is stored twice, and read once.

    Args:
        folder: of the cache; made if there is none.
        spec: what the cache holds. That of an existing cache must be the same.
        shard_bytes: size of a shard, and of what is kept in memory.

    Raises:
        ValueError: the folder is a cache of another spec, holds other files, or a damaged shard.
        OSError: it cannot be written.
    """

    def __init__(self, folder: str | Path, spec: CacheSpec, *, shard_bytes: int = SHARD_BYTES) -> None:
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
        self.folder, self.spec, self.shard_bytes = Path(folder), spec, shard_bytes
        create_spec(self.folder, spec)
        try:
            clean(self.folder)
        except OSError as error:
            raise disk_error(error, self.folder) from None
        self._index = CacheIndex(self.folder, spec)
        self._added: set[bytes] = set()
        self._name = secrets.token_hex(6)
        self._shards = 0
        self._rows: list[Row] = []
        self._unlisted: dict[Path, list[bytes]] = {}
        self._nbytes = 0
        self._like: Fields = {}

    def __contains__(self, token_ids: Tensor) -> bool:
        """Whether the sequence was there when this writer began, or was added since."""
        key = digest(token_ids)
        return key in self._added or self._index.find(key) is not None

    def add(self, token_ids: Tensor, payload: Mapping[str, Any]) -> bool:
        """Adds a sequence; False if it is there already, and nothing was done.

        Args:
            token_ids: [T] integers.
            payload: of the spec's tier; see payload.py.

        Raises:
            TypeError, ValueError: tokens or payload are not those of the spec; nothing was added.
            OSError: a shard could not be written; what was added is kept for the next flush().
        """
        token_ids = check_tokens(token_ids, self.spec)
        if token_ids in self:
            return False
        fields = encode(token_ids, payload, self.spec)
        row = as_row(token_ids, fields)
        self._like = {name: field[:0] for name, field in fields.items()}
        self._rows.append(row)
        self._added.add(row.digest)
        self._nbytes += row.nbytes
        if self._nbytes >= self.shard_bytes:
            self.flush()
        return True

    def flush(self) -> None:
        """Writes what was added since the last shard as one more; returns when it is on the disk.

        Raises:
            OSError: it could not be written. Nothing half-written is left, and a later call tries again.
        """
        if self._rows:
            self._write_shard()
        for path in list(self._unlisted):
            try:
                write_list(path, self._unlisted[path])
            except OSError as error:
                raise disk_error(error, path) from None
            del self._unlisted[path]

    def _write_shard(self) -> None:
        name = f"rows-{self._name}-{self._shards:06d}.safetensors"
        path = self.folder / name
        try:
            publish(path, shard_parts(self._rows, self._like, name, self.spec.sha256), replace=True)
        except OSError as error:
            raise disk_error(error, path) from None
        self._unlisted[path] = [row.digest for row in self._rows]
        self._shards += 1
        self._rows, self._nbytes = [], 0

    def __enter__(self) -> TeacherCacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Writes what is left; after an error too, since what was added before it is whole."""
        if error is None:
            self.flush()
            return
        with suppress(OSError):
            self.flush()
