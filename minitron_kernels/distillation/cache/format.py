"""The shards of a cache: safetensors files of many sequences, each found and checked for itself.

A shard holds, for S sequences of N tokens together:

    index.digest   [S, 32] U8     SHA-256 of each sequence's tokens: see sequences.digest()
    index.length   [S] I64        their tokens
    index.crc32    [S] I64        CRC-32 of all that follows for a sequence, field by field
    index.<field>  [S + 1] I64    where each sequence begins in <field>
    index.seal     [32] U8        SHA-256 of the header's SHA-256 and of all of the above
    tokens, ...                   the fields, of the tier: see payload.py

The header's metadata name the format, its version, the spec (by hash) and the shard itself. So a bit that
changed anywhere is found, in what is read and at the time that it is: by the seal when a shard is opened, by
a CRC-32 when a sequence is.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minitron_kernels._files import reason
from minitron_kernels.distillation.cache.sequences import described, digest
from minitron_kernels.distillation.cache.shard_index import DIGEST_BYTES, REMEDY, ShardIndex, seal_of
from minitron_kernels.distillation.cache.spec import FORMAT, VERSION
from minitron_kernels.pruning.checkpoint.safetensors_files import DTYPES, read_at, torch_dtype

_NAMES = {torch_dtype(name): name for name in DTYPES}

Fields = Mapping[str, Tensor]


@dataclass
class Row:
    """One sequence on its way into a shard."""

    digest: bytes
    length: int
    crc32: int
    parts: dict[str, np.ndarray[Any, Any]]  # bytes of each field
    rows: dict[str, int]  # first dimension of each field

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the shard."""
        return sum(part.nbytes for part in self.parts.values())


def as_row(tokens: Tensor, fields: Fields) -> Row:
    """A sequence with its fields, copied and with its checksum."""
    parts = {name: as_bytes(field) for name, field in fields.items()}
    return Row(
        digest(tokens), len(tokens), crc32(parts), parts, {name: len(field) for name, field in fields.items()}
    )


def as_bytes(x: Tensor) -> np.ndarray[Any, Any]:
    """A copy of a tensor's bytes."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().copy()


def crc32(parts: Mapping[str, Any]) -> int:
    """CRC-32 of fields, in the order of their names."""
    value = 0
    for name in sorted(parts):
        value = zlib.crc32(parts[name], value)
    return value


def shard_parts(rows: list[Row], like: Fields, name: str, spec_sha256: str) -> list[Any]:
    """The bytes of a shard file, in pieces.

    like: the fields of any sequence, for their dtypes and shapes.
    """
    index: dict[str, np.ndarray[Any, Any]] = {
        "index.digest": np.frombuffer(b"".join(row.digest for row in rows), np.uint8).reshape(
            -1, DIGEST_BYTES
        ),
        "index.length": np.array([row.length for row in rows], "<i8"),
        "index.crc32": np.array([row.crc32 for row in rows], "<i8"),
    }
    for field in like:
        index[f"index.{field}"] = np.cumsum([0, *(row.rows[field] for row in rows)]).astype("<i8")
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "version": str(VERSION),
            "spec": spec_sha256,
            "shard": name,
            "sequences": str(len(rows)),
            "tokens": str(sum(row.length for row in rows)),
        }
    }
    at = 0
    for key, table in index.items():
        at = _describe(header, key, "U8" if table.dtype == np.uint8 else "I64", table.shape, at)
    at = _describe(header, "index.seal", "U8", (DIGEST_BYTES,), at)
    for field, tensor in like.items():
        count = int(index[f"index.{field}"][-1])
        at = _describe(header, field, _NAMES[tensor.dtype], (count, *tensor.shape[1:]), at)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    tables = [table.tobytes() for table in index.values()]
    parts: list[Any] = [struct.pack("<Q", len(text)) + text, *tables, seal(text, tables)]
    for field in like:
        parts += [row.parts[field].data for row in rows]
    return parts


def _describe(header: dict[str, Any], name: str, dtype: str, shape: tuple[int, ...], at: int) -> int:
    end = at + math.prod(shape) * DTYPES[dtype][1]
    header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
    return end


def seal(header: bytes, tables: list[bytes]) -> bytes:
    """What index.seal holds, of a header as it is written."""
    return seal_of(hashlib.sha256(header).digest(), tables)


class Shard(ShardIndex):
    """A shard whose sequences can be read. No file stays open."""

    def read(self, number: int, *, check: bool = True) -> dict[str, Tensor]:
        """The fields of the sequence of this number.

        Raises:
            ValueError: the shard was damaged, or changed since it was opened.
        """
        fd = self._open()
        try:
            parts = {name: self._read_field(fd, name, number) for name in self.fields}
        finally:
            os.close(fd)
        if check and crc32(parts) != int(self.crc32s[number]):
            raise ValueError(
                f"{self.path}: sequence {number} does not match its checksum: it is damaged; {REMEDY}"
            )
        dtypes = {name: torch_dtype(field.dtype_name) for name, field in self.fields.items()}
        return {
            name: torch.frombuffer(parts[name], dtype=dtypes[name]).reshape(-1, *field.shape)
            if parts[name]
            else torch.empty((0, *field.shape), dtype=dtypes[name], device="cpu")
            for name, field in self.fields.items()
        }

    def _open(self) -> int:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read any more ({reason(error)})") from None
        if (size := os.fstat(fd).st_size) != self.size:
            os.close(fd)
            raise ValueError(f"{self.path}: had {self.size} bytes and has {size}: it was changed; {REMEDY}")
        return fd

    def _read_field(self, fd: int, name: str, number: int) -> bytearray:
        field, begins = self.fields[name], self.begins[name]
        begin, end = int(begins[number]), int(begins[number + 1])
        data = bytearray((end - begin) * field.row_bytes)
        if read_at(fd, memoryview(data), field.begin + begin * field.row_bytes) < len(data):
            raise ValueError(f"{self.path}: ends inside sequence {number}: it was cut off; {REMEDY}")
        return data

    def name_of(self, number: int, tokens: Tensor) -> str:
        """A sequence as error messages name it."""
        return f"{self.path}: sequence {number}, {described(tokens)}"
