"""Where a cache's sequences are: all shards of a folder, and a search by digest."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minitron_kernels.distillation.cache.format import Shard
from minitron_kernels.distillation.cache.shard_index import open_shards
from minitron_kernels.distillation.cache.spec import CacheSpec


class CacheIndex:
    """The shards of a folder as they are now; {digest: (shard, number)}.

    Raises:
        ValueError: a safetensors file in the folder is not a whole shard of this cache; names it.
    """

    def __init__(self, folder: Path, spec: CacheSpec) -> None:
        self.shards = open_shards(folder, spec.sha256, Shard)
        digests = [shard.digests for shard in self.shards]
        whole = np.concatenate(digests) if digests else np.zeros((0, 32), np.uint8)
        prefixes = np.ascontiguousarray(whole[:, :8]).view("<u8").reshape(-1)
        self._order = prefixes.argsort(kind="stable")
        self._prefixes = prefixes[self._order]
        self._first = np.cumsum([0, *map(len, self.shards)])

    def __len__(self) -> int:
        return len(self._order)

    def find(self, digest: bytes) -> tuple[Shard, int] | None:
        """(shard, number in it) of a sequence; of several the first."""
        prefix = np.frombuffer(digest[:8], "<u8")[0]
        at = int(np.searchsorted(self._prefixes, prefix))
        while at < len(self._prefixes) and self._prefixes[at] == prefix:
            place = int(self._order[at])
            which = int(np.searchsorted(self._first, place, side="right")) - 1
            shard, number = self.shards[which], place - int(self._first[which])
            if shard.digests[number].tobytes() == digest:
                return shard, number
            at += 1
        return None
