"""What a shard says of itself: its header and its index. They are read without torch, which takes seconds.

What a shard is made of is in format.py, which also reads its sequences.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from minitron_kernels.distillation.cache.spec import FORMAT, VERSION
from minitron_kernels.pruning.checkpoint.safetensors_files import DTYPES, SafetensorsFile, StoredTensor

SHARD_NAME = re.compile(r"rows-[0-9a-f]{12}-\d{6}\.safetensors")
DIGEST_BYTES = 32
REMEDY = "delete it and cache its sequences again"


@dataclass(frozen=True)
class Field:
    """A field of all sequences: its dtype as the file says it, the shape of a row, and where it begins."""

    dtype_name: str
    shape: tuple[int, ...]
    begin: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape) * DTYPES[self.dtype_name][1]


def seal_of(header_sha256: bytes, tables: Sequence[bytes]) -> bytes:
    """What index.seal holds."""
    whole = hashlib.sha256(header_sha256)
    for table in tables:
        whole.update(table)
    return whole.digest()


class ShardIndex:
    """The header and the index of a shard, checked. No file stays open.

    Raises:
        ValueError: it is damaged, of another cache, another shard, or no shard of a cache at all.
    """

    def __init__(self, path: Path, spec_sha256: str) -> None:
        self.path = path
        file = SafetensorsFile(path)
        try:
            self.size = file.size
            self._check_metadata(file, spec_sha256)
            names = [name for name in file.tensors if name.startswith("index.")]
            tables = {name: _read(file, file.tensors[name]) for name in names}
            sealed = tables.pop("index.seal", b"")
            if sealed != seal_of(bytes.fromhex(file.header_sha256), list(tables.values())):
                raise ValueError(f"{path}: its index does not match its seal: it is damaged; {REMEDY}")
            self.fields = {
                name: Field(x.dtype_name, x.shape[1:], x.begin)
                for name, x in file.tensors.items()
                if name not in names
            }
            self.digests = np.frombuffer(tables.pop("index.digest"), np.uint8).reshape(-1, DIGEST_BYTES)
            self.lengths = np.frombuffer(tables.pop("index.length"), "<i8")
            self.crc32s = np.frombuffer(tables.pop("index.crc32"), "<i8")
            self.begins = {
                name.removeprefix("index."): np.frombuffer(table, "<i8") for name, table in tables.items()
            }
        finally:
            file.close()

    def _check_metadata(self, file: SafetensorsFile, spec_sha256: str) -> None:
        path, found = file.path, file.metadata
        if found.get("format") != FORMAT:
            raise ValueError(f"{path}: is not a shard of a teacher's cache: move it out of the folder")
        if found.get("version") != str(VERSION):
            raise ValueError(f"{path}: is of version {found.get('version')} of the format, not {VERSION}")
        if found.get("spec") != spec_sha256:
            raise ValueError(
                f"{path}: belongs to a cache of another spec (another teacher, tier or setting): move it "
                "back to its own folder"
            )
        if found.get("shard") != path.name:
            raise ValueError(
                f"{path}: is the shard {found.get('shard')} under another name: rename it, or delete the copy"
            )

    def __len__(self) -> int:
        return len(self.lengths)


S = TypeVar("S", bound=ShardIndex)


def open_shards(folder: Path, spec_sha256: str, kind: type[S]) -> list[S]:
    """The shards of a cache's folder as they are now, by name.

    Raises:
        ValueError: a safetensors file in the folder is not a whole shard of this cache; names it.
    """
    names = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")
    for name in names:
        if not SHARD_NAME.fullmatch(name):
            raise ValueError(
                f"{folder / name}: is not a shard of a teacher's cache: move it out of the folder"
            )
    return [kind(folder / name, spec_sha256) for name in names]


def totals(shards: Sequence[ShardIndex]) -> tuple[int, int]:
    """(different sequences, their tokens): what several writers have both is counted once."""
    if not shards:
        return 0, 0
    whole = np.concatenate([shard.digests for shard in shards])
    lengths = np.concatenate([shard.lengths for shard in shards])
    keys = np.ascontiguousarray(whole).view("V32").reshape(-1)
    _, first = np.unique(keys, return_index=True)
    return len(first), int(lengths[first].sum())


def _read(file: SafetensorsFile, tensor: StoredTensor) -> bytes:
    data = bytearray(tensor.nbytes)
    file.read_into(memoryview(data), tensor.begin)
    return bytes(data)
