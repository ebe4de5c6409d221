"""What a cache holds, in figures, by its spec and the indices of its shards; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minitron_kernels.distillation.cache.shard_index import ShardIndex, open_shards, totals
from minitron_kernels.distillation.cache.shard_list import lost_shards
from minitron_kernels.distillation.cache.spec import CacheSpec, read_spec


@dataclass(frozen=True)
class CacheSummary:
    """What a cache holds, in figures."""

    folder: Path
    spec: CacheSpec
    shards: int
    sequences: int
    tokens: int
    nbytes: int
    lost: tuple[str, ...] = ()  # shards that were deleted, each in a line with what to do

    @property
    def bytes_per_token(self) -> float:
        """Bytes on the disk for each token."""
        return self.nbytes / max(self.tokens, 1)

    def __str__(self) -> str:
        spec = self.spec
        of_tier = {
            "sampled": f"up to {spec.k} ids of {spec.samples} draws a position",
            "topk": f"up to {spec.k} ids a position, tail at temperature "
            f"{', '.join(f'{t:g}' for t in spec.temperatures)}, log-probabilities as {spec.quantiser}",
            "hidden": f"hidden states of {spec.hidden_size} in bfloat16",
        }[spec.tier]
        return (
            f"{self.folder}: {spec.tier} ({of_tier})\n"
            f"  {self.sequences} sequences, {self.tokens} tokens, {self.shards} shards, "
            f"{self.nbytes / 2**20:.1f} MiB, {self.bytes_per_token:.1f} bytes a token\n"
            f"  teacher {spec.teacher}, vocabulary {spec.vocab_size}, "
            f"tokenizer {spec.tokenizer or 'not known'}"
        ) + "".join(f"\n  not whole: {line}" for line in self.lost)


def summary_of(folder: Path, spec: CacheSpec, shards: Sequence[ShardIndex]) -> CacheSummary:
    """The figures of a cache with these shards."""
    sequences, tokens = totals(shards)
    nbytes = sum(shard.size for shard in shards)
    lost = lost_shards(folder, shards)
    return CacheSummary(folder, spec, len(shards), sequences, tokens, nbytes, lost)


def summarise(folder: Path) -> CacheSummary:
    """TeacherCache(folder).summary(), without torch.

    Raises:
        ValueError: the folder is not a cache; a shard is damaged or of another cache; names the file.
    """
    spec = read_spec(folder)
    return summary_of(folder, spec, open_shards(folder, spec.sha256, ShardIndex))
